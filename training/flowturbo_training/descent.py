"""The loop that trains a network beside a frozen one: refiners, LoRAs, ControlNets.

Only what is trained is stored, so that the state of a LoRA is small however large its model is. Step k draws from a generator
seeded by (seed, stage, process, k): a run that was killed goes on as an unbroken one would have.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator

from .state import Average, StepRandomness, load, save_atomically


class Descent(Protocol):
    """How far and how fast `descend` goes."""

    steps: int
    lr: float
    warm_up: int
    clip: float
    average: float


def descend(
    network: torch.nn.Module,
    loss_of: Callable[[torch.nn.Module, StepRandomness], tuple[torch.Tensor, torch.Tensor | None]],
    path: Path,
    settings: Descent,
    seed: int,
    log,
    *,
    accelerator: Accelerator,
    checkpointing: bool = False,
    save_every: int = 200,
    log_every: int = 50,
) -> torch.nn.Module:
    """AdamW on the parameters of `network` that need a gradient; their averages are in the network that is returned.

    `loss_of` gives a loss and, for a refiner, that of merely reusing the velocity, which the log compares it with. The state is kept at `path`,
    whose stem names the stage and its randomness.
    """
    name = path.stem
    network.train()
    if checkpointing:
        network.enable_gradient_checkpointing()
    trained = {k: p for k, p in network.named_parameters() if p.requires_grad}
    optimiser = torch.optim.AdamW(trained.values(), lr=settings.lr, betas=(0.9, 0.98), weight_decay=1e-2)
    wrapped, optimiser = accelerator.prepare(network, optimiser)
    average = Average(network, settings.average)
    step = 0
    if path.exists():
        stored = load(path)
        differing = [k for k, p in trained.items() if k not in stored["model"] or stored["model"][k].shape != p.shape]
        if differing:
            raise ValueError(f"{path} is the state of another training, without {differing[0]} of this shape: remove it, or name another --state")
        step = stored["step"]
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(stored["model"][key])
        optimiser.load_state_dict(stored["optimiser"])
        for key, value in average.values.items():
            value.copy_(stored["average"][key])
        log(f"{name}: going on at step {step}")
    sums = torch.zeros(2, device=accelerator.device)
    counted = 0
    while step < settings.steps:
        rng = StepRandomness(seed, f"{name}/{accelerator.process_index}", step)
        factor = min(1.0, (step + 1) / settings.warm_up) * min(1.0, 2 * (1 - step / settings.steps) + 0.01)
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * factor
        with accelerator.autocast():
            loss, reuse = loss_of(wrapped, rng)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"The loss is {loss.item()} at step {step} of {name}: lower its learning rate (now {settings.lr}) or train with --precision no"
            )
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trained.values(), settings.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(step)
        step += 1
        sums += torch.stack([loss.detach(), loss.detach() if reuse is None else reuse])
        counted += 1
        done = step == settings.steps
        if step % log_every == 0 or done:
            loss_mean, reuse_mean = (sums / counted).tolist()
            compared = "" if reuse is None else f" = {loss_mean / reuse_mean:.3f} of reusing the velocity"
            log(f"{name} step {step}/{settings.steps} loss {loss_mean:.5f}{compared}")
            sums.zero_()
            counted = 0
        if (step % save_every == 0 or done) and accelerator.is_main_process:
            model = {k: p.detach() for k, p in trained.items()}
            save_atomically({"step": step, "model": model, "optimiser": optimiser.state_dict(), "average": average.values}, path)
    average.swap()
    accelerator.wait_for_everyone()
    return network.eval()
