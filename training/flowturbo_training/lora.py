"""A LoRA for an SD3-class transformer: low-rank matrices beside its linear layers, trained on the rectified flow loss.

    y = W·x + (alpha / rank)·B·A·x,  A [rank, in] random, B [out, rank] zero at the start

The file is that of diffusers: `transformer.MODULE.lora_A.weight` and `.lora_B.weight`, with PEFT's settings, alpha among them, as JSON in the metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from .adapters import Trial, prediction
from .card import FIGURES
from .descent import descend
from .detector import score
from .flow import FlowSettings, flow_loss, mean_loss
from .sampling import velocity_of
from .state import StepRandomness, replace_atomically
from .styles import filled
from .world import draw_scenes

_FEED_FORWARD = ("net.0.proj", "net.2")
GROUPS: dict[str, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    "feed-forward": tuple(f"{part}.{name}" for part in ("ff", "ff_context") for name in _FEED_FORWARD),
    "modulation": ("norm1.linear", "norm1_context.linear"),
}
"""Names of layers by group; attention's are those that diffusers trains by default."""


@dataclass
class LoraSettings:
    rank: int = 16
    alpha: float | None = None
    """The rank, where it is not given: a scale of 1."""
    targets: list[str] = field(default_factory=lambda: ["attention"])
    """Groups, or ends of the names of linear layers."""


def add_lora(transformer: SD3Transformer2DModel, settings: LoraSettings) -> SD3Transformer2DModel:
    """Puts a LoRA beside the layers that `settings.targets` name; only its matrices, in float32, need a gradient."""
    linear = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = []
    for target in settings.targets:
        names = GROUPS.get(target, (target,))
        found = [n for n in names if any(layer == n or layer.endswith("." + n) for layer in linear)]
        if not found:
            raise ValueError(f'Expected --targets to name {", ".join(GROUPS)} or linear layers of the transformer but received "{target}"')
        targets += found
    if settings.rank < 1:
        raise ValueError(f"Expected --rank to be at least 1 but received {settings.rank}")
    transformer.requires_grad_(False)
    transformer.add_adapter(
        LoraConfig(r=settings.rank, lora_alpha=settings.alpha or settings.rank, init_lora_weights="gaussian", target_modules=sorted(set(targets)))
    )
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return transformer


def train_lora(
    transformer: SD3Transformer2DModel, batch, measured, state: Path, settings: FlowSettings, seed: int, log, *, accelerator: Accelerator | None = None,
    checkpointing: bool = False, save_every: int = 200, log_every: int = 50,
) -> tuple[float, float]:  # fmt: skip
    """Trains the LoRA that `add_lora` put there, going on from `state` where a killed run stopped; its averaged weights stay in the transformer.

    Gives the loss on batches of `measured` without and with it.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    transformer.to(accelerator.device)

    def loss_of(network: torch.nn.Module, rng: StepRandomness, source=batch) -> torch.Tensor:
        latents, context, pooled = (v.to(accelerator.device).float() for v in source(rng, settings.batch))
        return flow_loss(prediction(network, context, pooled), latents, rng, settings)

    descend(
        transformer, lambda network, rng: (loss_of(network, rng), None), Path(state) / "lora.pt", settings, seed, log,
        accelerator=accelerator, checkpointing=checkpointing, save_every=save_every, log_every=log_every,
    )  # fmt: skip
    with accelerator.autocast():
        with_lora = mean_loss(lambda rng: loss_of(transformer, rng, measured), seed)
        transformer.disable_adapters()
        without = mean_loss(lambda rng: loss_of(transformer, rng, measured), seed)
        transformer.enable_adapters()
    return without, with_lora


def save_lora(transformer: SD3Transformer2DModel, file: Path, dtype: torch.dtype) -> int:
    """Writes the file as diffusers does; gives its number of values."""
    layers = {k: v.detach().cpu().to(dtype).contiguous() for k, v in get_peft_model_state_dict(transformer).items()}
    metadata = transformer.peft_config["default"].to_dict()
    # Sets have no order of their own: sorted, the same training writes the same file.
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in metadata.items()}

    def write(beside: Path) -> None:
        StableDiffusion3Pipeline.save_lora_weights(
            beside.parent, transformer_lora_layers=layers, transformer_lora_adapter_metadata=metadata, weight_name=beside.name
        )
        _sort_metadata(beside)

    replace_atomically(file, write)
    return sum(v.numel() for v in layers.values())


def _sort_metadata(file: Path) -> None:
    """The library writes the entries of the metadata in a random order."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # The tensors begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


@torch.no_grad()
def measure_style(transformer: SD3Transformer2DModel, model: Path, count: int, log) -> dict[str, dict[str, float]]:
    """On captions that were not trained on, without the LoRA and with it: how many things are outlined, and the detector's accuracies once they are filled."""
    trial, report = Trial(model), {}
    transformer.float()
    for size in (64, 128):
        scenes = draw_scenes(3_000_017, count)
        for name in ("without", "with"):
            (transformer.enable_adapters if name == "with" else transformer.disable_adapters)()
            pictures = [filled(p, s) for p, s in zip(trial.draw(velocity_of(transformer), scenes, size), scenes)]
            result = score(torch.stack([p for p, _ in pictures]), scenes)
            result["outlined"] = sum(hollow > 0.05 for _, hollow in pictures) / count
            report[f"{size} px, {name}"] = result
            log(f"{size} px, {name}: " + " ".join(f"{k} {result[k]:.3f}" for k in FIGURES if k in result))
    transformer.enable_adapters()
    return report
