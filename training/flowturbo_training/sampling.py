"""The samplers of flowturbo in PyTorch, for measuring while training; the product's own are TypeScript.

Blocks E, H, P and R as in the fixtures: the cache holds the unguided pair, and what goes on after an R block is the
velocity of its first evaluation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(x [B, C, h, w], sigma [B], context [B, L, D], pooled [B, P]) → velocity like x."""


def shifted_sigmas(steps: int, shift: float, start: float = 1.0) -> list[float]:
    """sigma_0 … sigma_N = 0, N = steps: u uniform, sigma = s·u / (1 + (s - 1)·u); `start` is sigma_0."""
    first = start / (shift - (shift - 1) * start)
    return [(lambda u: shift * u / (1 + (shift - 1) * u))(first * (1 - i / steps)) for i in range(steps + 1)]


def velocity_of(transformer: torch.nn.Module) -> Velocity:
    """The network as a function of sigma: its timestep input is 1000·sigma."""

    def velocity(x, sigma, context, pooled):
        return transformer(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=context,
            pooled_projections=pooled,
            return_dict=False,
        )[0]

    return velocity


@torch.no_grad()
def sample(
    predictor: Velocity,
    noise: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    *,
    blocks: str,
    sigmas: list[float],
    guidance: float = 1.0,
    refiner: Velocity | None = None,
) -> torch.Tensor:
    """Runs `blocks` (e.g. "HPPPRR") from noise [B, C, h, w]; see `run_blocks`."""
    return run_blocks(predictor, noise, None, context, pooled, blocks=blocks, sigmas=sigmas, guidance=guidance, refiner=refiner)[0]


def run_blocks(
    predictor: Velocity | None,
    x: torch.Tensor,
    cache: torch.Tensor | None,
    context: torch.Tensor,
    pooled: torch.Tensor,
    *,
    blocks: str,
    sigmas: list[float],
    guidance: float = 1.0,
    refiner: Velocity | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Runs `blocks` over `sigmas` [len(blocks) + 1] from a state x [B, C, h, w] and the cached velocity of the run so far, if any.

    Context and pooled hold 2B rows, unconditional first; with guidance 1 the unconditional rows are dropped. R blocks alone
    need no predictor. An R block with `refiner` None merely reuses the velocity. Gives the state and the cache [2B or B, C, h, w].
    """
    batch = x.shape[0]
    guided = guidance != 1
    if not guided:
        context, pooled = context[-batch:], pooled[-batch:]
    rows = 2 if guided else 1

    def evaluate(x, sigma):
        return predictor(torch.cat([x] * rows), x.new_full((rows * batch,), sigma), context, pooled)

    def refine(x, velocity, sigma):
        if refiner is None:
            return velocity
        x_and_v = torch.cat([torch.cat([x] * rows), velocity], 1)
        return velocity + refiner(x_and_v, x.new_full((rows * batch,), sigma), context, pooled)

    def guide(velocity):
        if not guided:
            return velocity
        without, with_ = velocity.chunk(2)
        return without + guidance * (with_ - without)

    for block, now, then in zip(blocks, sigmas[:-1], sigmas[1:], strict=True):
        h = then - now
        if block == "E":
            cache = evaluate(x, now)
            x = x + h * guide(cache)
            continue
        if block == "R":
            if cache is None:
                raise ValueError(f"Expected a block that fills the cache before R but received {blocks}")
            d0 = refine(x, cache, now)
            d1 = refine(x + h * guide(d0), d0, then)
        else:
            d0 = cache if block == "P" and cache is not None else evaluate(x, now)
            d1 = evaluate(x + h * guide(d0), then)
        x = x + h / 2 * (guide(d0) + guide(d1))
        cache = d0 if block == "R" else d1
    return x, cache
