"""The velocity refiner: a network of one or two blocks that brings a velocity from one point of a trajectory to another.

    x_t = (1 - t)·x0 + t·noise,  v_t = V(x_t, t, y)        the predictor V is frozen and unguided
    x_t' = x_t + (t' - t)·v_t,   0 <= t' <= t
    loss = mean |V(x_t', t', y) - (r(x_t' ⊕ v_t, t', y) + v_t)|²

(FlowTurbo, arXiv 2409.18128, section 3.2.) Both calls of V and the refiner see the same condition y, dropped for some rows, so that
the refiner serves both halves of guidance. Pairs (t, t') come from the paper's range, t' = t - U(0, 0.12], and from
neighbouring sigmas of the schedules that the sampler will use, whose last steps are longer than that.

At t' = 0 that target says little: without noise there is none to predict, V(x, 0) is the mean of what it might have been, and
the half of it that enters the last step makes the step too short. With `landing_steps` = m pairs that end at 0 have the
target that makes the step x_t + (t' - t)/2·(v_t + d) land where m Euler steps of the predictor land:

    d = 2·(x_0 - x_t)/(t' - t) - v_t
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import SD3Transformer2DModel

from .descent import descend
from .sampling import shifted_sigmas
from .state import StepRandomness

Batch = Callable[[StepRandomness, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""(randomness, rows) → latents [B, C, h, w] scaled and shifted, context [B, L, D], pooled [B, P]; captions dropped already."""


@dataclass
class RefinerSettings:
    """How a refiner is trained. `schedules` are (steps, shift); `schedule_share` of the pairs are their neighbouring points."""

    steps: int = 10_000
    batch: int = 16
    lr: float = 2e-5
    warm_up: int = 100
    clip: float = 0.01
    average: float = 0.9995
    delta_max: float = 0.12
    schedules: list[tuple[int, float]] = field(default_factory=lambda: [(8, 3.0), (10, 3.0), (12, 3.0)])
    schedule_share: float = 0.5
    same_point_share: float = 0.0
    """Share of the pairs where v comes from another state of the same time: a sampler's first R has such a velocity,
    taken at the predicted point where the corrected one is asked for."""
    last_intervals: int | None = None
    """Only the last so many intervals of each schedule: where R blocks are."""
    landing_steps: int = 0
    """Steps of the predictor that pairs ending at 0 aim at; 0: the paper's target there too."""


def build_refiner(
    predictor: SD3Transformer2DModel,
    *,
    layers: int = 1,
    heads: int | None = None,
    initialise_from: str = "block",
) -> SD3Transformer2DModel:
    """A refiner for `predictor`: doubled input channels, the same condition, `layers` blocks, an output of zeros.

    `initialise_from` "block" copies the embedders and the predictor's last blocks (the same width is needed);
    "fresh" is the DiT initialisation at any number of `heads` of the predictor's head width.
    """
    if layers not in (1, 2):
        raise ValueError(f"Expected a refiner of 1 or 2 layers but received {layers}")
    if initialise_from not in ("block", "fresh"):
        raise ValueError(f'Expected initialise_from "block" or "fresh" but received "{initialise_from}"')
    own = predictor.config
    heads = heads or own.num_attention_heads
    copies = initialise_from == "block"
    if copies and heads != own.num_attention_heads:
        raise ValueError(
            f"A refiner that starts from the predictor's blocks needs its {own.num_attention_heads} heads, not {heads}: "
            "leave out --heads, or use --init fresh"
        )
    dual = set(own.dual_attention_layers or ()) if copies else set()
    first = own.num_layers - layers
    if first < 0:
        raise ValueError(f"The predictor has {own.num_layers} layers: fewer than the refiner's {layers}")
    refiner = SD3Transformer2DModel(
        sample_size=own.sample_size,
        patch_size=own.patch_size,
        in_channels=2 * own.in_channels,
        out_channels=own.out_channels,
        num_layers=layers,
        attention_head_dim=own.attention_head_dim,
        num_attention_heads=heads,
        joint_attention_dim=own.joint_attention_dim,
        caption_projection_dim=heads * own.attention_head_dim,
        pooled_projection_dim=own.pooled_projection_dim,
        pos_embed_max_size=own.pos_embed_max_size,
        qk_norm=own.qk_norm,
        dual_attention_layers=tuple(k - first for k in sorted(dual) if k >= first),
    )
    if predictor.device.type == "meta":
        return refiner
    if copies:
        source = {k: v for k, v in predictor.state_dict().items() if not k.startswith("transformer_blocks.")}
        for k in range(layers):
            prefix = f"transformer_blocks.{first + k}."
            for name, value in predictor.state_dict().items():
                if name.startswith(prefix):
                    source[f"transformer_blocks.{k}.{name[len(prefix):]}"] = value
        patch = source["pos_embed.proj.weight"]
        # The state's half sees what the predictor saw, the velocity's half starts unseen.
        source["pos_embed.proj.weight"] = torch.cat([patch, torch.zeros_like(patch)], 1)
        refiner.load_state_dict(source)
    else:
        from .predictor import initialise

        initialise(refiner)
        if heads == own.num_attention_heads:
            refiner.pos_embed.pos_embed.copy_(predictor.pos_embed.pos_embed)
        elif predictor.pos_embed.pos_embed.abs().sum() > 0:
            refiner.pos_embed.pos_embed.copy_(_narrowed(predictor.pos_embed.pos_embed, heads * own.attention_head_dim))
    with torch.no_grad():
        refiner.proj_out.weight.zero_()
        refiner.proj_out.bias.zero_()
    return refiner


def _narrowed(table: torch.Tensor, width: int) -> torch.Tensor:
    """A position table of fewer channels: each quarter (sine and cosine of column and row) keeps frequencies evenly spread."""
    old = table.shape[-1] // 4
    new = width // 4
    if width > table.shape[-1]:
        raise ValueError(f"Expected a refiner no wider than the predictor ({table.shape[-1]}) but received {width}")
    kept = torch.linspace(0, old - 1, new).round().long()
    return torch.cat([table[..., q * old + kept] for q in range(4)], -1)


def draw_times(rng: StepRandomness, rows: int, settings: RefinerSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs (t, t') [B] with 1 >= t >= t' >= 0."""
    pairs = []
    for _ in range(rows):
        if rng.python.random() < settings.schedule_share:
            sigmas = shifted_sigmas(*rng.python.choice(settings.schedules))
            i = rng.python.randrange(max(0, len(sigmas) - 1 - (settings.last_intervals or len(sigmas))), len(sigmas) - 1)
            pairs.append((sigmas[i], sigmas[i + 1]))
        else:
            t = rng.python.random()
            pairs.append((t, max(0.0, t - settings.delta_max * (1 - rng.python.random()))))
    now, then = zip(*pairs)
    return torch.tensor(now), torch.tensor(then)


def refiner_loss(
    predictor: torch.nn.Module,
    refiner: torch.nn.Module,
    latents: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    rng: StepRandomness,
    settings: RefinerSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of section 4 and, for comparison, the error of keeping v_t: two scalars."""
    now, then = draw_times(rng, len(latents), settings)
    noise = torch.randn(latents.shape, generator=rng.torch)
    now, then, noise = (v.to(latents.device) for v in (now, then, noise))
    wide = (slice(None), None, None, None)

    def predict(x, sigma, context=context, pooled=pooled):
        return predictor(
            hidden_states=x.to(predictor.dtype), timestep=sigma * 1000, encoder_hidden_states=context.to(predictor.dtype),
            pooled_projections=pooled.to(predictor.dtype), return_dict=False,
        )[0].float()  # fmt: skip

    with torch.no_grad():
        x = (1 - now[wide]) * latents + now[wide] * noise
        v = predict(x, now)
        x_then = x + (then - now)[wide] * v
        target = predict(x_then, then)
        ends = (then == 0) & (now > 0)
        same = [rng.python.random() < settings.same_point_share and not (end and settings.landing_steps) for end in ends.tolist()]
        if settings.landing_steps and ends.any():
            # Evenly in t: the last evaluation is at t/m.
            start, cond = now[ends], (context[ends], pooled[ends])
            landed = x[ends] - (start / settings.landing_steps)[wide] * v[ends]
            for k in range(1, settings.landing_steps):
                sigma = start * (1 - k / settings.landing_steps)
                landed = landed - (start / settings.landing_steps)[wide] * predict(landed, sigma, *cond)
            target[ends] = 2 * (x[ends] - landed) / start[wide] - v[ends]
        if any(same):
            # One step further along the refined velocity: a corrected state, whose cached velocity is the predicted one's.
            rows = torch.tensor(same, device=latents.device)
            corrected = x[rows] + ((then - now)[wide] / 2)[rows] * (v[rows] + target[rows])
            v, x_then = v.clone(), x_then.clone()
            v[rows] = target[rows]
            x_then[rows] = corrected
            target = target.clone()
            target[rows] = predict(corrected, then[rows], context[rows], pooled[rows])
    offset = refiner(
        hidden_states=torch.cat([x_then, v], 1), timestep=then * 1000, encoder_hidden_states=context,
        pooled_projections=pooled, return_dict=False,
    )[0].float()  # fmt: skip
    return ((target - v - offset) ** 2).mean(), ((target - v) ** 2).mean().detach()


def train_refiner(
    predictor: SD3Transformer2DModel,
    refiner: SD3Transformer2DModel,
    batch: Batch,
    state: Path,
    settings: RefinerSettings,
    seed: int,
    log,
    *,
    accelerator: Accelerator | None = None,
    checkpointing: bool = False,
    save_every: int = 200,
    log_every: int = 50,
) -> SD3Transformer2DModel:
    """Trains `refiner` for `settings.steps` steps, going on from `state` where a killed run stopped; its averaged weights are returned."""
    accelerator = accelerator or Accelerator(cpu=True)
    predictor.eval().requires_grad_(False).to(accelerator.device)

    def loss_of(network: torch.nn.Module, rng: StepRandomness) -> tuple[torch.Tensor, torch.Tensor]:
        latents, context, pooled = (v.to(accelerator.device).float() for v in batch(rng, settings.batch))
        return refiner_loss(predictor, network, latents, context, pooled, rng, settings)

    return descend(
        refiner, loss_of, Path(state) / "refiner.pt", settings, seed, log,
        accelerator=accelerator, checkpointing=checkpointing, save_every=save_every, log_every=log_every,
    )  # fmt: skip
