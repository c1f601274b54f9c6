"""What training a LoRA and training a ControlNet share: the data of each size, the model, and trials on the shapes model's captions."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, SD3Transformer2DModel

from .data import CachedBatches, Example, MixedBatches, TextAndVae, dataset_examples, folder_examples, precompute, shuffled, with_control_pictures
from .edges import as_picture, canny
from .sampling import Velocity, sample, shifted_sigmas
from .styles import world_examples
from .vae import decode_all
from .world import Scene

WORLD_COUNT = 2048
"""Pictures of the procedural world that are made where nothing else is said."""


@dataclass
class Source:
    """Where the examples come from: one of `images`, `dataset` and `world` (a style of the procedural world, "" for its own look), or a cache of an earlier run."""

    images: Path | None = None
    dataset: str | None = None
    latents: Path | None = None
    world: str | None = None
    split: str = "train"
    columns: tuple[str, ...] = ("image", "text")
    """Of a data set: picture, caption and, for a ControlNet, control picture."""
    control: bool = False
    conditions: Path | None = None
    """A folder of control pictures, by the names of the pictures."""
    canny: bool = False
    """Control pictures are made of the pictures."""
    limit: int | None = None
    held: int = 0
    """Examples that are kept apart, on which the loss is measured before and after."""

    def examples(self, size: int, seed: int) -> tuple[int, Iterable[Example], dict]:
        """How many there are, these, and what they are made from."""
        if self.world is not None:
            count = (self.limit or WORLD_COUNT) + self.held
            return count, world_examples(self.world or None, seed * 1000 + size, count, size, self.control), {"world": self.world, "seed": seed}
        if self.images:
            pictures = shuffled(folder_examples(self.images), seed, None)
            if self.conditions:
                pictures = with_control_pictures(pictures, self.conditions)
            pictures = pictures[: self.limit and self.limit + self.held]
            return len(pictures), pictures, {"images": str(self.images.resolve())}
        columns = self.columns[:2] if self.canny or not self.control else self.columns
        count, rows = dataset_examples(self.dataset, self.split, *columns)
        count = min(count, self.limit + self.held) if self.limit else count
        return count, islice(rows, count), {"dataset": self.dataset, "split": self.split}


def prepare(source: Source, model: Path, sizes: list[int], cache: Path, *, seed: int, dropout: float, max_sequence_length: int, precision: torch.dtype,
            accelerator: Accelerator, log) -> tuple[MixedBatches, MixedBatches, int]:  # fmt: skip
    """Fills the caches, `cache`/SIZE and `cache`/held-SIZE. Gives the training's batches, those on which it is measured, and how many examples are trained on."""
    if source.latents is None and accelerator.is_main_process:
        for size in sizes:
            count, rows, made_from = source.examples(size, seed)
            if count <= source.held:
                raise ValueError(f"Expected --held to be less than the {count} examples but received {source.held}")
            if source.control:
                made_from["control"] = str(source.conditions.resolve()) if source.conditions else "canny" if source.canny else "given"
            rows = iter(rows)
            for name, part in ((f"held-{size}", source.held), (str(size), count - source.held)):
                if part:
                    precompute(
                        islice(rows, part), part, model, cache / name, size=size, device=accelerator.device, dtype=precision,
                        max_sequence_length=max_sequence_length, made_from=made_from, log=log,
                        control_of=(lambda pictures: as_picture(canny(pictures))) if source.canny else None,
                    )  # fmt: skip
    accelerator.wait_for_everyone()
    found = source.latents or cache
    # A cache of a refiner is one folder, of an adapter one for each size.
    alone = any(found.glob("shard-*.safetensors"))
    training = [found] if alone else sorted(f for f in found.glob("[0-9]*") if f.is_dir()) if source.latents else [cache / str(s) for s in sizes]
    held = [] if alone else sorted(f for f in found.glob("held-*") if source.latents or f.name in {f"held-{s}" for s in sizes} and source.held)
    if not training:
        raise ValueError(f"{found}: no cached latents there: name the folder `cache` of an earlier training's state")
    caches = [CachedBatches(f, dropout, source.control) for f in training]
    measured = [CachedBatches(f, 0, source.control) for f in held or training]
    return MixedBatches(caches), MixedBatches(measured), sum(map(len, caches))


def load_transformer(model: Path, dtype: torch.dtype) -> SD3Transformer2DModel:
    """The frozen transformer of a diffusers folder."""
    return SD3Transformer2DModel.from_pretrained(model / "transformer", torch_dtype=dtype).requires_grad_(False)


def shift_of(model: Path) -> float:
    """That of the model's schedule."""
    return float(json.loads((model / "scheduler" / "scheduler_config.json").read_text()).get("shift", 1.0))


def prediction(network: torch.nn.Module, context: torch.Tensor, pooled: torch.Tensor, residuals=None):
    """The transformer as a function of (x, sigma), in its own type; `residuals` (x, sigma) gives those of a ControlNet."""
    dtype = next(network.parameters()).dtype

    def predict(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        more = {} if residuals is None else {"block_controlnet_hidden_states": [r.to(dtype) for r in residuals(x, sigma)]}
        return network(
            hidden_states=x.to(dtype), timestep=sigma * 1000, encoder_hidden_states=context.to(dtype), pooled_projections=pooled.to(dtype),
            return_dict=False, **more,
        )[0].float()  # fmt: skip

    return predict


class Trial:
    """Draws scenes with a model folder's own text encoders and autoencoder, to measure an adapter of the shapes model."""

    def __init__(self, model: Path, guidance: float = 2.0, steps: int = 16):
        self._parts = TextAndVae(model, torch.device("cpu"), torch.float32, 16)
        self._vae: AutoencoderKL = self._parts.pipeline.vae
        self._shift, self._guidance, self._steps = shift_of(model), guidance, steps

    def control(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([self._parts.control(part) for part in pictures.split(16)])

    def draw(self, velocity: Velocity, scenes: list[Scene], size: int, seed: int = 0) -> torch.Tensor:
        """Pictures [B, 3, size, size], Euler; the noise depends on seed, size and place alone, so that two networks can be compared."""
        channels, factor = self._vae.config.latent_channels, 2 ** (len(self._vae.config.block_out_channels) - 1)
        noise = torch.randn(len(scenes), channels, size // factor, size // factor, generator=torch.Generator().manual_seed(seed))
        context, pooled = self._parts.text([""] * len(scenes) + [s.caption for s in scenes])
        latents = sample(
            velocity, noise, context, pooled, blocks="E" * self._steps, sigmas=shifted_sigmas(self._steps, self._shift), guidance=self._guidance
        )
        return decode_all(self._vae, latents)
