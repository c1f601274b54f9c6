"""What training a refiner needs, computed before it starts: sizes, memory, disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel

from .refiner import build_refiner

GB = 1e9


@dataclass
class Requirements:
    predictor_parameters: int
    refiner_parameters: int
    share: float
    latent_shape: tuple[int, int, int]
    tokens: int
    weights_bytes: int
    training_bytes: int
    activation_bytes: int
    cache_bytes_per_example: int

    def lines(self) -> list[str]:
        return [
            f"predictor: {self.predictor_parameters / 1e6:.1f} M parameters (frozen, bf16: {self.predictor_parameters * 2 / GB:.2f} GB)",
            f"refiner: {self.refiner_parameters / 1e6:.1f} M parameters, {self.share:.1%} of the predictor",
            f"latents: {' x '.join(map(str, self.latent_shape))}, {self.tokens} tokens with the text",
            f"memory: {self.weights_bytes / GB:.2f} GB predictor + {self.training_bytes / GB:.2f} GB refiner with AdamW, gradients "
            f"and average (float32) + about {self.activation_bytes / GB:.2f} GB activations "
            f"= {(self.weights_bytes + self.training_bytes + self.activation_bytes) / GB:.1f} GB",
            f"disk: {self.cache_bytes_per_example / 1e6:.2f} MB an example, {self.cache_bytes_per_example * 1000 / GB:.2f} GB for 1,000",
        ]


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def load_config(model: Path) -> dict:
    path = Path(model) / "transformer" / "config.json"
    path = path if path.exists() else Path(model)
    if path.is_dir() or not path.exists():
        raise ValueError(f"{model}: no transformer/config.json there: name a diffusers folder, or a transformer's config.json")
    return {k: v for k, v in json.loads(path.read_text()).items() if not k.startswith("_")}


def requirements_of(model: Path, *, layers: int, heads: int | None, initialise_from: str, size: int, factor: int, batch: int,
                    text_tokens: int, checkpointing: bool) -> Requirements:  # fmt: skip
    """From the configuration alone: both networks are made on the meta device, no weight is read."""
    with torch.device("meta"):
        predictor = SD3Transformer2DModel(**load_config(model))
        refiner = build_refiner(predictor, layers=layers, heads=heads, initialise_from=initialise_from)
    config, own = predictor.config, refiner.config
    side = size // factor
    tokens = (side // config.patch_size) ** 2 + text_tokens
    width = own.num_attention_heads * own.attention_head_dim
    # About 34 activations of the width a token and block (attention, two MLPs of 4 widths, norms), two bytes each; with
    # checkpointing one block's at a time. The frozen predictor keeps none but the widest layer's.
    kept = 34 * width * 2 * tokens * batch * (1 if checkpointing else layers)
    wide = 12 * config.num_attention_heads * config.attention_head_dim * 2 * tokens * batch
    context = text_tokens * config.joint_attention_dim
    return Requirements(
        predictor_parameters=parameters(predictor),
        refiner_parameters=parameters(refiner),
        share=parameters(refiner) / parameters(predictor),
        latent_shape=(config.in_channels, side, side),
        tokens=tokens,
        weights_bytes=parameters(predictor) * 2,
        training_bytes=parameters(refiner) * 4 * 5,
        activation_bytes=kept + wide,
        cache_bytes_per_example=(config.in_channels * side * side + context + config.pooled_projection_dim) * 2,
    )
