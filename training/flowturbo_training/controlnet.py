"""A ControlNet for an SD3-class transformer: a copy of its first blocks that sees a control picture too, trained on the rectified flow loss.

It is what `SD3ControlNetModel.from_transformer` makes, with zeros where it joins the transformer, so that training begins at the transformer's own
pictures. As with the public ones of this kind (`force_zeros_for_pooled_projection`) it gets zeros for the pooled text, and the control picture's latents scaled
but not shifted.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from diffusers import SD3ControlNetModel, SD3Transformer2DModel

from .adapters import Trial, prediction
from .card import FIGURES
from .descent import descend
from .detector import score
from .edges import agreement, as_picture, canny
from .flow import FlowSettings, flow_loss, mean_loss
from .state import StepRandomness
from .world import draw_scenes, render


def build_controlnet(transformer: SD3Transformer2DModel, layers: int) -> SD3ControlNetModel:
    """A ControlNet of `layers` blocks that starts from the transformer's first ones."""
    most = transformer.config.num_layers - 1
    if not 1 <= layers <= most:
        raise ValueError(f"Expected --layers from 1 to {most}, fewer than the transformer's, but received {layers}")
    # from_transformer writes its own numbers into the configuration that it is given: not into the transformer's.
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    config["dual_attention_layers"] = tuple(k for k in config.get("dual_attention_layers") or () if k < layers)
    names = ("pos_embed", "time_text_embed", "context_embedder", "transformer_blocks")
    like = SimpleNamespace(config=config, **{name: getattr(transformer, name) for name in names})
    controlnet = SD3ControlNetModel.from_transformer(like, num_layers=layers, num_extra_conditioning_channels=0)
    return controlnet.float()


def residuals_of(network: torch.nn.Module, control: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor, scale: float = 1.0):
    """What the ControlNet adds to the transformer's blocks, as a function of (x, sigma)."""

    def residuals(x: torch.Tensor, sigma: torch.Tensor):
        return network(
            hidden_states=x, timestep=sigma * 1000, controlnet_cond=control, conditioning_scale=scale, encoder_hidden_states=context,
            pooled_projections=torch.zeros_like(pooled), return_dict=False,
        )[0]  # fmt: skip

    return residuals


def train_controlnet(
    transformer: SD3Transformer2DModel, controlnet: SD3ControlNetModel, batch, measured, state: Path, settings: FlowSettings, seed: int, log, *,
    accelerator: Accelerator | None = None, checkpointing: bool = False, save_every: int = 200, log_every: int = 50,
) -> tuple[float, float]:  # fmt: skip
    """Trains `controlnet`, going on from `state` where a killed run stopped; its averaged weights stay in it.

    Gives the loss on batches of `measured` without and with it.
    """
    accelerator = accelerator or Accelerator(cpu=True)
    transformer.eval().requires_grad_(False).to(accelerator.device)
    if checkpointing:
        # The gradient passes through the frozen transformer.
        transformer.enable_gradient_checkpointing()

    def loss_of(network: torch.nn.Module | None, rng: StepRandomness, source=batch) -> torch.Tensor:
        latents, context, pooled, control = (v.to(accelerator.device).float() for v in source(rng, settings.batch))
        residuals = network and residuals_of(network, control, context, pooled)
        return flow_loss(prediction(transformer, context, pooled, residuals), latents, rng, settings)

    descend(
        controlnet, lambda network, rng: (loss_of(network, rng), None), Path(state) / "controlnet.pt", settings, seed, log,
        accelerator=accelerator, checkpointing=checkpointing, save_every=save_every, log_every=log_every,
    )  # fmt: skip
    with accelerator.autocast():
        return mean_loss(lambda rng: loss_of(None, rng, measured), seed), mean_loss(lambda rng: loss_of(controlnet, rng, measured), seed)


@torch.no_grad()
def measure_control(transformer: SD3Transformer2DModel, controlnet: SD3ControlNetModel, model: Path, count: int, log) -> dict[str, dict[str, float]]:
    """On scenes that were not trained on, without the ControlNet and with it: how well the edges of pictures agree with those asked for, and the detector's accuracies."""
    trial, report = Trial(model), {}
    transformer.float()
    controlnet.float()
    for size in (64, 128):
        scenes = draw_scenes(3_000_017, count)
        edges = canny(render(scenes, size))
        control = trial.control(as_picture(edges))
        for name in ("without", "with"):

            def velocity(x, sigma, context, pooled):
                rows = control.repeat(len(x) // len(control), 1, 1, 1)
                residuals = residuals_of(controlnet, rows, context, pooled) if name == "with" else None
                return prediction(transformer, context, pooled, residuals)(x, sigma)

            pictures = trial.draw(velocity, scenes, size)
            result = {**score(pictures, scenes), "edges": agreement(canny(pictures), edges)}
            report[f"{size} px, {name}"] = result
            log(f"{size} px, {name}: " + " ".join(f"{k} {result[k]:.3f}" for k in FIGURES if k in result))
    return report
