"""The classifier whose features measure a Fréchet distance between sets of pictures of the procedural world.

It learns from exact renders (and from blurred and noisy ones, so that it is no judge of single pixels) what a caption
says of a picture; the 64 numbers before its heads are the features. Exported to ONNX, with the pictures' preprocessing.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from .state import Stage, StepRandomness, warm_up_then_decay
from .text import HEADS, answers
from .world import draw_scene, draw_scenes, render

SIZE = 64
FEATURES = 64


class Features(torch.nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] → features [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:])
        )
        self.norms = torch.nn.ModuleList(torch.nn.GroupNorm(4, b) for b in widths[1:])
        self.out = torch.nn.Linear(widths[-1] * 16, FEATURES)
        self.heads = torch.nn.Linear(FEATURES, sum(n for _, n in HEADS))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        x = pictures
        for convolution, norm in zip(self.convolutions, self.norms):
            x = F.gelu(norm(convolution(x)))
        return self.out(x.flatten(1))

    def answers(self, features: torch.Tensor) -> list[torch.Tensor]:
        return list(self.heads(F.gelu(features)).split([n for _, n in HEADS], -1))


def _worn(pictures: torch.Tensor, rng: StepRandomness) -> torch.Tensor:
    """Some noise on all, a blur on a half."""
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    half = (torch.rand(len(pictures), 1, 1, 1, generator=rng.torch) < 0.5).float()
    level = 0.1 * torch.rand(len(pictures), 1, 1, 1, generator=rng.torch)
    return torch.lerp(pictures, blurred, half) + level * torch.randn(pictures.shape, generator=rng.torch)


@torch.no_grad()
def accuracy(model: Features, count: int = 1000, seed: int = 1_000_033) -> dict[str, float]:
    """Share of held-out exact renders whose answer is right, for each head."""
    scenes = draw_scenes(seed, count)
    guesses = [torch.cat(g) for g in zip(*(model.answers(model(render(scenes[i : i + 100], SIZE))) for i in range(0, count, 100)))]
    right = answers(scenes)
    return {name: float((g.argmax(-1) == right[:, k]).float().mean()) for k, ((name, _), g) in enumerate(zip(HEADS, guesses))}


def train_features(model: Features, stage: Stage, seed: int, log, batch: int = 96) -> None:
    optimiser = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=1e-2)
    stage.track(model=model, optimiser=optimiser)
    model.train()
    more, reported = not stage.done, stage.spent
    while more:
        rng = StepRandomness(seed, stage.name, stage.step)
        for group in optimiser.param_groups:
            group["lr"] = 2e-3 * warm_up_then_decay(stage.step, stage.progress)
        scenes = [draw_scene(rng.python, pair_share=0.5) for _ in range(batch)]
        target = answers(scenes)
        loss = sum(F.cross_entropy(g, target[:, k]) for k, g in enumerate(model.answers(model(_worn(render(scenes, SIZE), rng)))))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        more = stage.tick()
        if stage.spent - reported > 20 or not more:
            log(f"features {stage.progress:6.1%} step {stage.step} loss {loss.item():.3f}")
            reported = stage.spent
    model.eval()


def export(model: Features, path: Path) -> None:
    """Writes the ONNX file: `pictures` [B, 3, 64, 64] in [-1, 1] → `features` [B, 64]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = torch.export.Dim("batch", min=1, max=4096)
    program = torch.onnx.export(
        model.eval(), (torch.zeros(2, 3, SIZE, SIZE),), dynamo=True, external_data=False, verbose=False, opset_version=20,
        input_names=["pictures"], output_names=["features"], dynamic_shapes={"pictures": {0: batch}},
    )  # fmt: skip
    program.save(str(path))
