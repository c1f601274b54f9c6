"""The predictor of the shapes model: a small MMDiT trained by flow matching on the latents of the procedural world.

Three choices make it learn on two cores. Its latents are low-dimensional (vae.py), its text features are ready before
it starts (text.py), and its position table is made for small grids: the usual frequencies, spread over 10,000
positions, leave most channels of a 16 x 16 table constant, so here they are spread over the table's own width. The hidden
matrices are trained with Muon (orthogonalised momentum; Jordan et al. 2024), which reached a given loss in far fewer
samples than AdamW in trials, everything else with AdamW.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from .state import Average, Stage, StepRandomness, warm_up_then_decay
from .text import Captions, TextEncoders
from .vae import ideal_latents
from .world import draw_scene, render


@dataclass
class PredictorShape:
    """Sizes of the transformer; `native` is the picture size, in pixels, whose latents are sample_size on a side."""

    layers: int = 5
    heads: int = 6
    head_width: int = 32
    latent_channels: int = 3
    native: int = 64
    largest: int = 128
    factor: int = 4
    context_width: int = 192
    pooled_width: int = 192


def position_table(width: int, side: int, span: int | None = None) -> torch.Tensor:
    """Sine and cosine of both coordinates for a side x side table: [1, side², width].

    Wavelengths run from three patches to four times `span` (by default the side), geometrically. Coordinates are counted from the centre,
    so that the middle of a larger table with the same span is the smaller table.
    """
    quarter = width // 4
    wavelengths = torch.logspace(0, 1, quarter, base=4.0 * (span or side) / 3.0) * 3.0
    angle = (torch.arange(side) - (side - 1) / 2)[:, None] * (2 * torch.pi / wavelengths)
    one = torch.cat([angle.sin(), angle.cos()], -1)
    row = one[:, None].expand(side, side, -1)
    column = one[None].expand(side, side, -1)
    return torch.cat([column, row], -1).reshape(1, side * side, width)


def build_transformer(shape: PredictorShape) -> SD3Transformer2DModel:
    """A fresh transformer: Xavier weights, adaLN and output at zero, so that every block starts as the identity."""
    width = shape.heads * shape.head_width
    model = SD3Transformer2DModel(
        sample_size=shape.native // shape.factor,
        patch_size=2,
        in_channels=shape.latent_channels,
        out_channels=shape.latent_channels,
        num_layers=shape.layers,
        attention_head_dim=shape.head_width,
        num_attention_heads=shape.heads,
        joint_attention_dim=shape.context_width,
        caption_projection_dim=width,
        pooled_projection_dim=shape.pooled_width,
        pos_embed_max_size=shape.largest // shape.factor // 2,
        qk_norm="rms_norm",
    )
    initialise(model)
    with torch.no_grad():
        model.pos_embed.pos_embed.copy_(position_table(width, model.config.pos_embed_max_size))
    return model


def initialise(model: SD3Transformer2DModel) -> None:
    """The DiT initialisation, which diffusers leaves to the trainer."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.xavier_uniform_(parameter)
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        if _is_modulation(name) or name.startswith("proj_out"):
            torch.nn.init.zeros_(parameter)
    patch = model.pos_embed.proj.weight
    torch.nn.init.xavier_uniform_(patch.view(patch.shape[0], -1))


def _is_modulation(name: str) -> bool:
    return ".linear." in name and ("norm1" in name or "norm_out" in name)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: for matrices that map features to features."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for (rows, columns), parameters in by_shape.items():
                updates = []
                for parameter in parameters:
                    state = self.state[parameter]
                    if "momentum" not in state:
                        state["momentum"] = torch.zeros_like(parameter)
                    state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                    updates.append(parameter.grad.lerp(state["momentum"], group["momentum"]))
                scale = group["lr"] * max(1.0, rows / columns) ** 0.5
                for parameter, update in zip(parameters, orthogonalise(torch.stack(updates))):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-scale)


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Newton-Schulz towards the nearest orthogonal matrices: [K, m, n] → [K, m, n]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(fast_dtype())
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the processor multiplies it faster than float32, else float32."""
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def compiled(transformer: torch.nn.Module, log) -> torch.nn.Module:
    """The transformer through torch.compile where there is a C++ compiler (a quarter faster), else as it is."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        log("no C++ compiler: the predictor is not compiled")
        return transformer
    return torch.compile(transformer, dynamic=False)


class Optimisers:
    """Muon for the blocks' matrices and AdamW for the rest, stepped, scheduled and saved as one."""

    def __init__(self, model: torch.nn.Module, muon_lr: float, adam_lr: float, weight_decay: float = 0.01):
        hidden, other = [], []
        for name, parameter in model.named_parameters():
            inner = parameter.ndim == 2 and "transformer_blocks" in name and not _is_modulation(name)
            (hidden if inner and muon_lr > 0 else other).append(parameter)
        self.parts = [torch.optim.AdamW(other, lr=adam_lr, betas=(0.9, 0.98), weight_decay=weight_decay)]
        if hidden:
            self.parts.append(Muon(hidden, lr=muon_lr, weight_decay=weight_decay))
        self.peaks = [p.param_groups[0]["lr"] for p in self.parts]

    def step(self, factor: float) -> None:
        for part, peak in zip(self.parts, self.peaks):
            part.param_groups[0]["lr"] = peak * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        return {"parts": [p.state_dict() for p in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        for part, stored in zip(self.parts, state["parts"]):
            part.load_state_dict(stored)


@dataclass
class PredictorSettings:
    """How the predictor is trained. Batches are counted in pictures; those at 128 px come `large_share` of the steps."""

    batch: int = 64
    batch_large: int = 20
    large_share: float = 0.25
    large_from: float = 0.3
    muon_lr: float = 0.02
    adam_lr: float = 1.5e-3
    average: float = 0.998
    caption_dropout: float = 0.1
    pair_share: float = 0.6
    compile: bool = True
    # sigma = sigmoid(normal(mean, deviation)); more noise for the larger size, whose pixels repeat each other more.
    sigma_mean: float = 0.4
    sigma_deviation: float = 1.2
    sigma_mean_large: float = 1.1


def train_predictor(
    transformer: SD3Transformer2DModel,
    encoders: TextEncoders,
    captions: Captions,
    stage: Stage,
    settings: PredictorSettings,
    seed: int,
    log,
    on_interval=None,
    interval: float = 300.0,
) -> None:
    """Flow matching: v = noise - latents at x = (1 - sigma)·latents + sigma·noise, frozen text encoders.

    Leaves the averaged weights in `transformer`. `on_interval(stage)` is called with the averaged weights in place,
    every `interval` seconds of the budget; its time is not counted.
    """
    average = Average(transformer, settings.average)
    optimisers = Optimisers(transformer, settings.muon_lr, settings.adam_lr)
    stage.track(model=transformer, average=average, optimisers=optimisers)
    if stage.done:
        average.swap()
        return
    encoders.eval().requires_grad_(False)
    transformer.train()
    network = compiled(transformer, log) if settings.compile else transformer
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype() == torch.bfloat16)
    losses: dict[int, list[float]] = {}
    seen, reported, next_interval = 0, stage.spent, stage.spent + interval
    more = True
    while more:
        rng = StepRandomness(seed, stage.name, stage.step)
        large = stage.progress >= settings.large_from and rng.python.random() < settings.large_share
        size, batch = (128, settings.batch_large) if large else (64, settings.batch)
        scenes = [draw_scene(rng.python, pair_share=settings.pair_share) for _ in range(batch)]
        latents = ideal_latents(render(scenes, size))
        texts = ["" if rng.python.random() < settings.caption_dropout else s.caption for s in scenes]
        with torch.no_grad():
            context, pooled = encoders(*captions(texts))
        mean = settings.sigma_mean_large if large else settings.sigma_mean
        sigma = torch.sigmoid(torch.randn(batch, generator=rng.torch) * settings.sigma_deviation + mean)
        noise = torch.randn(latents.shape, generator=rng.torch)
        s = sigma[:, None, None, None]
        with autocast:
            velocity = network(
                hidden_states=(1 - s) * latents + s * noise,
                timestep=sigma * 1000,
                encoder_hidden_states=context,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        loss = ((velocity.float() - (noise - latents)) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        optimisers.step(warm_up_then_decay(stage.step, stage.progress))
        average.update(stage.step)
        more = stage.tick()
        seen += batch
        losses.setdefault(size, []).append(loss.item())
        if stage.spent - reported > 20 or not more:
            rate = seen / (stage.spent - reported)
            shown = " ".join(f"loss at {k} px {sum(v) / len(v):.4f}" for k, v in sorted(losses.items()))
            log(f"predictor {stage.progress:6.1%} step {stage.step} {rate:.0f} pictures/s {shown}")
            seen, reported, losses = 0, stage.spent, {}
        if more and on_interval and stage.spent >= next_interval:
            average.swap()
            on_interval(stage)
            average.swap()
            stage.pause()
            next_interval = stage.spent + interval
    average.swap()


def with_larger_table(model: SD3Transformer2DModel, side: int) -> SD3Transformer2DModel:
    """The same network with a position table of `side`: it then takes larger pictures than it was trained for."""
    span = model.config.pos_embed_max_size
    larger = SD3Transformer2DModel.from_config({**model.config, "pos_embed_max_size": side})
    weights = dict(model.state_dict())
    width = model.config.num_attention_heads * model.config.attention_head_dim
    weights["pos_embed.pos_embed"] = position_table(width, side, span)
    larger.load_state_dict(weights)
    return larger.eval()


def describe(shape: PredictorShape, settings: PredictorSettings) -> dict:
    """What was trained and how, for the model card."""
    return {"shape": asdict(shape), "settings": asdict(settings)}


def save_transformer(model: SD3Transformer2DModel, folder: Path) -> None:
    model.save_pretrained(folder)
