"""A refiner for the last step of calibrated schedules.

`flowturbo calibrate` fits noise levels and weights of a few steps so that they end where many steps end. What is left of the error
differs from picture to picture; in the last step, after which nothing enlarges a mistake, the refiner can take part of it away. That
step goes from sigma to 0, h = -sigma; v is the velocity (both halves, unguided) that it evaluates, v_before the one of the step before:

    x'    = x + now·guide(v) + old·guide(v_before) + older·…               the step as it was fitted
    v_mid = v + e·(v - v_before)                                           extrapolated to the middle of the step, where both are guided or none
    x''   = x' + h·guide(r(x' - h/2·guide(v_mid) ⊕ v_mid, sigma/2))        block C of flowturbo on a calibrated schedule
    loss  = mean |decode(x'') - decode(x_ref)|² / mean |decode(x') - decode(x_ref)|²

x_ref is where a fine run from the same noise ends. A refiner that gives zeros leaves the schedule as it was fitted. Training needs the
runs, which are kept on disk, the refiner and the decoder, not the predictor. Some of the runs are kept apart: on them each schedule is
measured with the refiner and without, and those that it improves are marked in schedules.json.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file

from .descent import descend
from .refiner import Batch
from .sampling import Velocity, shifted_sigmas, velocity_of
from .state import StepRandomness, replace_atomically

Decode = Callable[[torch.Tensor], torch.Tensor]
"""Latents [B, C, h, w] → pictures [B, 3, H, W] in [-1, 1]; the identity for a loss in latents."""


@dataclass(frozen=True)
class FittedSteps:
    """An entry of schedules.json: where each step evaluates, and the weights of its velocity and of the two before."""

    guidance: float
    """That it was fitted to; 1 for none."""
    sigmas: tuple[float, ...]
    weights: tuple[tuple[float, float, float], ...]
    scales: tuple[float | None, ...]
    """Guidance scale of each step, None for none."""


@dataclass
class LastStepSettings:
    """Which runs are made, and how the refiner is trained on their last steps."""

    shift: float
    """Of the fine run's sigmas: the model's own."""
    shards: int = 40
    rows: int = 32
    """Runs in a shard; they have the same guidance scale."""
    held: int = 4
    """Shards for each guidance scale that are not trained on, but measured."""
    reference: int = 30
    """Steps of the fine run, of Adams and Bashforth's method."""
    steps: int = 2000
    batch: int = 16
    lr: float = 8e-4
    warm_up: int = 50
    clip: float = 1.0
    average: float = 0.995


def read_schedules(file: Path, width: int, height: int) -> list[FittedSteps]:
    """The calibrated schedules of a size, of three steps or more."""
    if not file.exists():
        raise ValueError(f"{file} is missing: run `flowturbo calibrate` for this model first")
    entries = json.loads(file.read_text()).get("calibrated", [])
    found = [entry for entry in entries if _is_usable(entry, width, height)]
    if not found:
        raise ValueError(f"{file} has no schedules of {width} x {height} pixels: run `flowturbo calibrate` for that size first")
    return [_steps_of(entry) for entry in found]


def mark_refined(file: Path, width: int, height: int, improved: dict[FittedSteps, bool]) -> None:
    """Writes into schedules.json which schedules the refiner improves. A mark of those that were not measured is of another refiner: it goes."""
    content = json.loads(file.read_text())
    for entry in content.get("calibrated", []):
        entry.pop("refined", None)
        if _is_usable(entry, width, height) and _steps_of(entry) in improved:
            entry["refined"] = improved[_steps_of(entry)]
    if "calibrated" not in content:
        return
    # A line for each schedule, as flowturbo writes them.
    lines = ",\n".join(f"    {json.dumps(entry, separators=(',', ':'))}" for entry in content.pop("calibrated"))
    text = f'{json.dumps(content, indent=2)[:-2]},\n  "calibrated": [\n{lines}\n  ]\n}}\n'
    replace_atomically(file, lambda beside: beside.write_text(text))


def _is_usable(entry: dict, width: int, height: int) -> bool:
    return (entry["width"], entry["height"]) == (width, height) and entry["sigmas"][0] == 1 and len(entry["weights"]) > 2


def _steps_of(entry: dict) -> FittedSteps:
    whole = float(entry["guidanceScale"])
    factors = entry.get("scales") or [1.0] * len(entry["weights"])
    scales = tuple(whole * factor if guided else None for factor, guided in zip(factors, entry["guided"]))
    return FittedSteps(whole, tuple(entry["sigmas"]), tuple(tuple(w) for w in entry["weights"]), scales)


def guide(velocity: torch.Tensor, scale: float | None) -> torch.Tensor:
    """u + g·(c - u) of a pair [2B, …]; a velocity without guidance is what it is."""
    if scale is None:
        return velocity
    without, with_ = velocity.chunk(2)
    return without + scale * (with_ - without)


def run_fitted(
    evaluate: Callable[[torch.Tensor, float, bool], torch.Tensor], x: torch.Tensor, steps: FittedSteps, first: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Where a calibrated schedule ends [B, …], and its last two velocities [2B or B, …], the latest first; `first` is that at x, a pair if guided."""
    known: list[tuple[torch.Tensor, float | None]] = []
    for i, (sigma, weights, scale) in enumerate(zip(steps.sigmas, steps.weights, steps.scales)):
        if i == 0:
            v = first[len(first) - len(x) :] if scale is None else first
        else:
            v = evaluate(x, sigma, scale is not None)
        known = [(v, scale), *known[:2]]
        for place, (weight, (velocity, own)) in enumerate(zip(weights, known)):
            # The velocity before is guided as the step is where both are guided, the one before that as its own step was: so flowturbo's graphs do it.
            anew = place == 1 and scale is not None and own is not None
            x = x + weight * guide(velocity, scale if anew else own)
    return x, known[0][0], known[1][0]


def refine_end(
    refiner: Velocity, x: torch.Tensor, v: torch.Tensor, before: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor, steps: FittedSteps
) -> torch.Tensor:
    """x'' of the formula above; context and pooled have as many rows as v."""
    start, last = steps.sigmas[-3], steps.sigmas[-2]
    h = -last
    scale = steps.scales[-1]
    ahead = v + h / (2 * (last - start)) * (v - before) if len(v) == len(before) else v
    point = x - h / 2 * guide(ahead, scale)
    rows = torch.cat([torch.cat([point] * (len(v) // len(x))), ahead], 1)
    return x + h * guide(refiner(rows, x.new_full((len(v),), last / 2), context, pooled), scale)


@torch.no_grad()
def prepare_last_steps(
    predictor: torch.nn.Module,
    batch: Batch,
    null: tuple[torch.Tensor, torch.Tensor],
    schedules: list[FittedSteps],
    folder: Path,
    settings: LastStepSettings,
    seed: int,
    log,
    *,
    device: torch.device | str = "cpu",
    part: tuple[int, int] = (0, 1),
) -> None:
    """Makes the runs, shard by shard; shards that are there already are kept. Process i of n makes `part` (i, n) of them.

    From each start the fine run and every schedule of the shard's guidance scale are run. `batch` gives captions that are not dropped,
    `null` is the empty caption's context [1, L, D] and pooled [1, P].
    """
    folder.mkdir(parents=True, exist_ok=True)
    network = velocity_of(predictor.eval().to(device))
    null = tuple(v.to(device).float() for v in null)
    dtype = next(predictor.parameters()).dtype
    scales = _scales(schedules)
    for shard in range(part[0], settings.shards, part[1]):
        path = _file(folder, shard)
        if path.exists():
            continue
        rng = StepRandomness(seed, "last-steps/runs", shard)
        guidance = scales[shard % len(scales)]
        latents, context, pooled = (v.to(device).float() for v in batch(rng, settings.rows))
        start = torch.randn(latents.shape, generator=rng.torch).to(device)
        whole = None if guidance == 1 else guidance

        def evaluate(x, sigma, guided):
            rows = torch.cat([x] * (2 if guided else 1))
            given = (v.to(dtype) for v in _condition(null, context, pooled, guided))
            return network(rows.to(dtype), x.new_full((len(rows),), sigma).to(dtype), *given).float()

        # All runs begin at sigma = 1 with the same velocity.
        first = evaluate(start, 1.0, whole is not None)
        sigmas = shifted_sigmas(settings.reference, settings.shift)
        tensors = {"reference": _fine_run(evaluate, start, sigmas, whole, first)}
        tensors |= {"context": context, "pooled": pooled}
        own = [steps for steps in schedules if steps.guidance == guidance]
        for k, steps in enumerate(own):
            x, v, before = run_fitted(evaluate, start, steps, first)
            # Rows first, so that rows can be read alone.
            tensors |= {f"x.{k}": x} | {f"{name}.{k}": w.unflatten(0, (-1, len(x))).transpose(0, 1) for name, w in (("v", v), ("before", before))}
        note = {"schedules": json.dumps([[steps.guidance, steps.sigmas, steps.weights, steps.scales] for steps in own])}
        kept = {name: value.cpu().contiguous() for name, value in tensors.items()}
        replace_atomically(path, lambda beside: save_file(kept, beside, note))
        log(f"last steps: shard {shard + 1} of {settings.shards}: {len(start)} starts, {len(own)} schedules, guidance {guidance:g}")


def _fine_run(evaluate, x: torch.Tensor, sigmas: list[float], guidance: float | None, first: torch.Tensor) -> torch.Tensor:
    before = None
    for i, (now, then) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        h = then - now
        v = guide(evaluate(x, now, guidance is not None) if i > 0 else first, guidance)
        more = 0 if before is None else h * h / (2 * (now - sigmas[i - 1]))
        x = x + (h + more) * v - (0 if before is None else more * before)
        before = v
    return x


class LastSteps:
    """The runs on disk, of given schedules: those that are trained on, and those that are kept apart."""

    def __init__(self, folder: Path, schedules: list[FittedSteps], settings: LastStepSettings, null, device):
        self.device = device
        self.null = tuple(v.to(device).float() for v in null)
        scales = len(_scales(schedules))
        files = [safe_open(_file(folder, shard), "pt") for shard in range(settings.shards)]
        for file, shard in zip(files, range(settings.shards)):
            own = [steps for steps in schedules if steps.guidance == _scales(schedules)[shard % scales]]
            if _schedules_in(file) != own:
                raise ValueError(f"{_file(folder, shard)} was made for other schedules than those of schedules.json: remove {folder}")
        border = max(0, settings.shards - settings.held * scales)
        self.trained, self.held = files[:border], files[border:]
        if not self.trained:
            raise ValueError(f"Expected more shards than the {settings.held} kept apart for each of {scales} guidance scales but received {settings.shards}")

    def read(self, file, k: int, rows: list[int]):
        """Schedule k of a shard: its steps, and of some rows the state x, the two velocities, the condition and the reference."""
        steps = _schedules_in(file)[k]

        def of(name: str) -> torch.Tensor:
            values = file.get_slice(name)
            return torch.cat([values[i : i + 1] for i in rows]).to(self.device).float()

        v, before = (of(f"{name}.{k}").transpose(0, 1).flatten(0, 1) for name in ("v", "before"))
        return steps, of(f"x.{k}"), v, before, _condition(self.null, of("context"), of("pooled"), steps.scales[-1] is not None), of("reference")


def train_on_last_steps(
    refiner: torch.nn.Module,
    runs: LastSteps,
    decode: Decode,
    state: Path,
    settings: LastStepSettings,
    seed: int,
    log,
    *,
    accelerator: Accelerator | None = None,
    checkpointing: bool = False,
    save_every: int = 200,
) -> torch.nn.Module:
    """Trains `refiner` for `settings.steps` steps, going on where a killed run stopped."""
    accelerator = accelerator or Accelerator(cpu=True)

    def loss_of(network: torch.nn.Module, rng: StepRandomness) -> tuple[torch.Tensor, torch.Tensor]:
        file = runs.trained[rng.python.randrange(len(runs.trained))]
        k = rng.python.randrange(len(_schedules_in(file)))
        count = file.get_slice("reference").get_shape()[0]
        chosen = rng.python.sample(range(count), min(count, settings.batch))
        steps, x, v, before, condition, reference = runs.read(file, k, chosen)
        with torch.no_grad():
            target = decode(reference)
            kept = _errors(decode(x), target)
        refined = _errors(decode(refine_end(velocity_of(network), x, v, before, *condition, steps)), target)
        # Between the sum of errors, which the worst pictures make, and the mean of their ratios, which the best make.
        weight = 1 / (kept + 0.3 * kept.mean())
        return (refined * weight).sum() / (kept * weight).sum(), torch.ones_like(kept[0])

    return descend(
        refiner, loss_of, Path(state) / "last-steps.pt", settings, seed, log,
        accelerator=accelerator, checkpointing=checkpointing, save_every=save_every,
    )  # fmt: skip


@torch.no_grad()
def gains(refiner: torch.nn.Module, runs: LastSteps, decode: Decode, log, batch: int = 16) -> dict[FittedSteps, tuple[float, float]]:
    """For each schedule what the refiner adds to the PSNR in dB on the runs that are kept apart, and half the width of its 95 % interval."""
    network = velocity_of(refiner.eval())
    values: dict[FittedSteps, list[torch.Tensor]] = {}
    for file in runs.held:
        count = file.get_slice("reference").get_shape()[0]
        for k, steps in enumerate(_schedules_in(file)):
            for first in range(0, count, batch):
                _, x, v, before, condition, reference = runs.read(file, k, list(range(first, min(count, first + batch))))
                target = decode(reference)
                kept, refined = (_errors(decode(end), target) for end in (x, refine_end(network, x, v, before, *condition, steps)))
                values.setdefault(steps, []).append(10 * torch.log10(kept.clamp_min(1e-7) / refined.clamp_min(1e-7)))
    result = {}
    for steps, parts in values.items():
        each = torch.cat(parts).double()
        result[steps] = (each.mean().item(), 1.96 * each.std().item() / len(each) ** 0.5)
        rows = sum(1 if scale is None else 2 for scale in steps.scales)
        log("last steps: guidance {:g}, {} steps, {} rows: {:+.2f} ± {:.2f} dB on {} runs kept apart".format(steps.guidance, len(steps.weights), rows, *result[steps], len(each)))
    return result


def _errors(picture: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return ((picture - target) ** 2).flatten(1).mean(1) / 4


def _scales(schedules: list[FittedSteps]) -> list[float]:
    return sorted({steps.guidance for steps in schedules})


def _condition(null: tuple[torch.Tensor, ...], context: torch.Tensor, pooled: torch.Tensor, guided: bool) -> list[torch.Tensor]:
    """Context and pooled as the sampler takes them: with guidance the empty caption's rows first."""
    if not guided:
        return [context, pooled]
    return [torch.cat([empty.expand_as(own), own]) for empty, own in zip(null, (context, pooled))]


def _schedules_in(file) -> list[FittedSteps]:
    # A shard of an earlier version has no scales: its schedules are others than any.
    stored = (entry if len(entry) == 4 else [*entry, []] for entry in json.loads(file.metadata()["schedules"]))
    return [FittedSteps(g, tuple(sigmas), tuple(tuple(w) for w in weights), tuple(scales)) for g, sigmas, weights, scales in stored]


def _file(folder: Path, shard: int) -> Path:
    return Path(folder) / f"last-steps-{shard:05d}.safetensors"
