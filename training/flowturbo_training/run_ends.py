"""The second part of a refiner's training: the ends of the sampler's own runs.

The loss of refiner.py covers states on the way from noise to a picture, with the predictor's velocity there as the target. A run
of few blocks is in other states when its R blocks begin: it carries the error of the long steps before, and that error is much the
same from run to run. So here the refiner sees such states and learns to land where a fine run from the same start lands:

    x, cache = the H and P blocks of a schedule               once for each run, kept on disk
    x_0      = a run of `reference` predictor blocks          likewise
    loss     = mean |R blocks(x, cache) - x_0|² / mean |R blocks that reuse(x, cache) - x_0|²

The gradient goes through both evaluations of each R block and through guidance. Training needs the refiner alone, not the
predictor; the relative loss gives every schedule the same weight, however near it comes without a refiner. It is progressive
distillation's target (Salimans & Ho, arXiv 2202.00512) on FlowTurbo's R blocks.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from .descent import descend
from .refiner import Batch
from .sampling import run_blocks, shifted_sigmas, velocity_of
from .state import StepRandomness, replace_atomically


@dataclass
class RunEndSettings:
    """Which runs are made, and how the refiner is trained on their ends."""

    shift: float
    """Of the schedules' sigmas: the model's own."""
    guidance: tuple[float, ...]
    """Scales of the runs; one that occurs twice is drawn twice as often."""
    shards: int = 40
    rows: int = 96
    """Runs in a shard. They have the same guidance scale and start."""
    schedules: int = 3
    """Schedules run from each start."""
    predicted: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 9)
    """Numbers of P blocks behind the H block, drawn alike."""
    refined: tuple[int, ...] = (1, 1, 2, 2, 3)
    """Numbers of R blocks."""
    reference: int = 10
    """Blocks of the run that the refiner is to land with: H and P, as the sampler runs without a refiner. A finer end would be nearer to
    many steps in the latents, but hardly in the picture, and cannot be learnt: of the difference to it little repeats itself."""
    edited: float = 0.2
    """Share of the shards that start from a picture that was noised to a sigma from 0.3 to 0.9, as editing and stages do."""
    steps: int = 2000
    batch: int = 24
    lr: float = 1e-3
    warm_up: int = 50
    clip: float = 1.0
    average: float = 0.995


@torch.no_grad()
def prepare_run_ends(
    predictor: torch.nn.Module,
    batch: Batch,
    null: tuple[torch.Tensor, torch.Tensor],
    folder: Path,
    settings: RunEndSettings,
    seed: int,
    log,
    *,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> int:
    """Makes the runs, shard by shard; shards that are there already are kept. Process i of n makes `part` (i, n) of them.
    Gives how many ends of runs are there now.

    `batch` gives captions that are not dropped (and pictures, for those runs that start from one), `null` is the empty
    caption's context [1, L, D] and pooled [1, P].
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = velocity_of(predictor.eval().to(device))
    null = tuple(v.to(device).float() for v in null)
    dtype = next(predictor.parameters()).dtype

    def velocity(x, sigma, context, pooled):
        return network(x.to(dtype), sigma, context.to(dtype), pooled.to(dtype)).float()

    for shard in range(part[0], settings.shards, part[1]):
        path = _file(folder, shard)
        if path.exists():
            continue
        rng = StepRandomness(seed, "run-ends/runs", shard)
        guidance = rng.python.choice(settings.guidance)
        sigma = rng.python.uniform(0.3, 0.9) if rng.python.random() < settings.edited else 1.0
        latents, context, pooled = (v.to(device).float() for v in batch(rng, settings.rows))
        rows = len(latents)
        start = torch.randn(latents.shape, generator=rng.torch).to(device)
        start = (1 - sigma) * latents + sigma * start
        condition = _both_halves(null, (context, pooled))

        def run(blocks, steps):
            sigmas = shifted_sigmas(steps, settings.shift, sigma)
            return run_blocks(velocity, start, None, *condition, blocks=blocks, sigmas=sigmas[: len(blocks) + 1], guidance=guidance)

        reference, _ = run("H" + "P" * (settings.reference - 1), settings.reference)
        tensors = {"reference": reference, "context": context, "pooled": pooled}
        ends = []
        for k in range(settings.schedules):
            predicted, refined = rng.python.choice(settings.predicted), rng.python.choice(settings.refined)
            steps = 1 + predicted + refined
            x, cache = run("H" + "P" * predicted, steps)
            # Rows first, so that rows can be read alone.
            tensors |= {f"x.{k}": x, f"cache.{k}": cache.unflatten(0, (-1, rows)).transpose(0, 1)}
            ends.append({"blocks": "R" * refined, "sigmas": shifted_sigmas(steps, settings.shift, sigma)[-refined - 1 :]})
        note = {"guidance": json.dumps(guidance), "ends": json.dumps(ends)}
        own = {name: value.cpu().contiguous() for name, value in tensors.items()}
        replace_atomically(path, lambda beside: save_file(own, beside, note))
        log(f"run ends: shard {shard + 1} of {settings.shards}: {rows} runs, guidance {guidance:g}, from sigma {sigma:.2f}")
    files = [safe_open(path, "pt") for path in sorted(folder.glob("run-ends-*.safetensors"))]
    return sum(file.get_slice("reference").get_shape()[0] * len(json.loads(file.metadata()["ends"])) for file in files)


def train_on_run_ends(
    refiner: torch.nn.Module,
    null: tuple[torch.Tensor, torch.Tensor],
    folder: Path,
    state: Path,
    settings: RunEndSettings,
    seed: int,
    log,
    *,
    accelerator: Accelerator | None = None,
    checkpointing: bool = False,
    save_every: int = 200,
) -> torch.nn.Module:
    """Trains `refiner` on the runs in `folder` for `settings.steps` steps, going on where a killed run stopped."""
    accelerator = accelerator or Accelerator(cpu=True)
    files = [safe_open(_file(folder, shard), "pt") for shard in range(settings.shards)]
    null = tuple(v.to(accelerator.device).float() for v in null)
    smallest = min(math.prod(file.get_slice("reference").get_shape()[1:]) for file in files)

    def loss_of(network: torch.nn.Module, rng: StepRandomness) -> tuple[torch.Tensor, torch.Tensor]:
        file = files[rng.python.randrange(len(files))]
        note = file.metadata()
        ends, guidance = json.loads(note["ends"]), json.loads(note["guidance"])
        k = rng.python.randrange(len(ends))
        count, *shape = file.get_slice(f"x.{k}").get_shape()
        # As many values in each batch: fewer rows of a larger size.
        rows = max(1, min(count, settings.batch * smallest // math.prod(shape)))
        chosen = rng.python.sample(range(count), rows)

        def read(name: str) -> torch.Tensor:
            values = file.get_slice(name)
            return torch.cat([values[i : i + 1] for i in chosen]).to(accelerator.device).float()

        x, reference = read(f"x.{k}"), read("reference")
        cache = read(f"cache.{k}").transpose(0, 1).flatten(0, 1)
        condition = _both_halves(null, (read("context"), read("pooled")))

        def error(network):
            landed, _ = run_blocks(None, x, cache, *condition, **ends[k], guidance=guidance, refiner=network)
            return ((landed - reference) ** 2).mean()

        with torch.no_grad():
            reuse = error(None)
        return error(velocity_of(network)) / reuse, torch.ones_like(reuse)

    return descend(
        refiner, loss_of, Path(state) / "run-ends.pt", settings, seed, log,
        accelerator=accelerator, checkpointing=checkpointing, save_every=save_every,
    )  # fmt: skip


def _both_halves(null: tuple[torch.Tensor, ...], captions: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Context and pooled [2B, …] as the sampler takes them: the empty caption's rows, then those of the captions."""
    return [torch.cat([empty.expand_as(own), own]) for empty, own in zip(null, captions)]


def _file(folder: Path, shard: int) -> Path:
    return Path(folder) / f"run-ends-{shard:05d}.safetensors"
