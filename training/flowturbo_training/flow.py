"""The rectified flow loss, as SD3 was trained and as its adapters are: for the LoRA and the ControlNet alike.

    x_s = (1 - s)·x0 + s·noise,  loss = mean |v(x_s, s, y) - (noise - x0)|²

s is logit-normal (Scaling Rectified Flow Transformers, arXiv 2403.03206, section 3.1), then shifted as the model's schedule is: s' = k·s / (1 + (k - 1)·s).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .state import StepRandomness


@dataclass
class FlowSettings:
    """How an adapter is trained on the rectified flow loss."""

    shift: float
    """Of the model's schedule."""
    steps: int = 1000
    batch: int = 4
    lr: float = 1e-4
    warm_up: int = 50
    clip: float = 1.0
    average: float = 0.99
    logit_mean: float = 0.0
    logit_std: float = 1.0


Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B, C, h, w], sigma [B]) → velocity like x."""


def draw_sigmas(rng: StepRandomness, rows: int, settings: FlowSettings) -> torch.Tensor:
    """[rows] in (0, 1)."""
    s = torch.sigmoid(torch.randn(rows, generator=rng.torch) * settings.logit_std + settings.logit_mean)
    return settings.shift * s / (1 + (settings.shift - 1) * s)


def flow_loss(predict: Predict, latents: torch.Tensor, rng: StepRandomness, settings: FlowSettings) -> torch.Tensor:
    """The loss of one batch of latents [B, C, h, w]; noise and sigmas are drawn from `rng`."""
    sigma = draw_sigmas(rng, len(latents), settings).to(latents.device)
    noise = torch.randn(latents.shape, generator=rng.torch).to(latents.device)
    s = sigma[:, None, None, None]
    velocity = predict((1 - s) * latents + s * noise, sigma)
    return ((velocity.float() - (noise - latents)) ** 2).mean()


@torch.no_grad()
def mean_loss(loss_of: Callable[[StepRandomness], torch.Tensor], seed: int, batches: int = 8) -> float:
    """The mean over batches that are the same at every call: what is compared before and after training."""
    return sum(float(loss_of(StepRandomness(seed, "probe", k))) for k in range(batches)) / batches
