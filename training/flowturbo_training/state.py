"""Training state that survives a kill at any moment.

Every stage keeps one file: weights, optimiser, averages, step and the compute time spent so far. It is written beside
the old one and renamed over it, so there is always a complete one. Randomness is not stored but derived: step k of a
stage draws from a generator seeded by (seed, stage, k), so a resumed run sees the same batches as an unbroken one.
"""

from __future__ import annotations

import os
import random
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def replace_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """`write` to a temporary file beside `path`, flushed to disk, then renamed over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    write(beside)
    with open(beside, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)


def save_atomically(value: Any, path: Path) -> None:
    """torch.save, completely or not at all."""
    replace_atomically(path, lambda beside: torch.save(value, beside))


def load(path: Path) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True)


class StepRandomness:
    """The sources of randomness of one training step: a torch generator and a Python one."""

    def __init__(self, seed: int, stage: str, step: int):
        key = zlib.crc32(f"{seed}/{stage}/{step}".encode())
        self.torch = torch.Generator().manual_seed(key)
        self.python = random.Random(key)


class Average:
    """Exponential moving average of a module's parameters, warming up with the number of steps."""

    def __init__(self, module: torch.nn.Module, decay: float):
        self.decay = decay
        self.parameters = dict(module.named_parameters())
        self.values = {k: p.detach().clone() for k, p in self.parameters.items() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        names = list(self.values)
        torch._foreach_lerp_([self.values[k] for k in names], [self.parameters[k].detach() for k in names], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the module's parameters with the averages; a second call puts them back."""
        for name, value in self.values.items():
            parameter = self.parameters[name]
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)


def compute_seconds() -> float:
    """CPU time of this process over its threads: about the time on an idle machine, whatever else runs beside it."""
    return time.process_time() / torch.get_num_threads()


class Stage:
    """One stage's progress: a step counter, compute seconds, and what it saves."""

    def __init__(self, folder: Path, name: str, seconds: float, save_every: float = 75.0):
        self.path = Path(folder) / f"{name}.pt"
        self.name, self.seconds, self.save_every = name, seconds, save_every
        self.step = 0
        self.spent = 0.0
        self.done = False
        self._mark, self._saved = compute_seconds(), time.monotonic()
        self._objects: dict[str, Any] = {}
        self.restored: dict[str, Any] | None = load(self.path) if self.path.exists() else None
        if self.restored:
            self.step, self.spent, self.done = (self.restored[k] for k in ("step", "spent", "done"))

    def track(self, **objects: Any) -> None:
        """Objects with state_dict and load_state_dict, or averages; restored at once if there is something to restore."""
        self._objects = objects
        if self.restored:
            for key, value in objects.items():
                stored = self.restored["objects"][key]
                if isinstance(value, Average):
                    for name in value.values:
                        value.values[name].copy_(stored[name])
                else:
                    value.load_state_dict(stored)
            self.restored = None
        self._mark, self._saved = compute_seconds(), time.monotonic()

    @property
    def progress(self) -> float:
        """Part of the budget that is spent, 0 to 1."""
        return min(1.0, self.spent / self.seconds)

    def tick(self) -> bool:
        """Counts one step and its time; saves when it is time to. False once the budget is spent."""
        now = compute_seconds()
        self.spent += now - self._mark
        self._mark = now
        self.step += 1
        if self.progress >= 1:
            self.finish()
            return False
        if time.monotonic() - self._saved > self.save_every:
            self.save()
        return True

    def pause(self) -> None:
        """Leaves out the time since the last tick (evaluation, samples) from the budget."""
        self._mark = compute_seconds()

    def save(self) -> None:
        objects = {k: v.values if isinstance(v, Average) else v.state_dict() for k, v in self._objects.items()}
        save_atomically({"step": self.step, "spent": self.spent, "done": self.done, "objects": objects}, self.path)
        self._saved = time.monotonic()

    def finish(self) -> None:
        self.done = True
        self.save()


def warm_up_then_decay(step: int, progress: float, warm_up: int = 100, hold: float = 0.2, floor: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, a short plateau, then linear decay to `floor` (most of the gain is there)."""
    decay = 1.0 if progress < hold else floor + (1 - floor) * (1 - progress) / (1 - hold)
    return min(1.0, (step + 1) / warm_up) * decay
