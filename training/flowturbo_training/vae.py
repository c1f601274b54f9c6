"""The VAE of the shapes model, whose latent space is made for diffusion.

A latent pixel is meant to be the mean colour of its 4 x 4 block of the picture: three channels, smooth, on one scale
at every resolution. Flat shapes survive that: how much of a block an object covers says where its outline runs, and
the decoder learns to draw it sharply again. For the transformer it is a picture of 16 x 16 pixels, which it learns in
a fraction of the samples that a free 16-channel latent space of equal fidelity took (whose channels are mostly noise
that cannot be predicted). The encoder is trained to give exactly these means, the decoder to invert them with a
little noise added, so that the transformer's small errors do not show.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .state import Average, Stage, StepRandomness, warm_up_then_decay
from .world import draw_scene, draw_scenes, render

FACTOR = 4
CHANNELS = 3
SCALE, SHIFT = 1.65, 0.06
"""latents = (mean colour - SHIFT)·SCALE, about unit size over the world (test_shapes.py)."""


def ideal_latents(pictures: torch.Tensor) -> torch.Tensor:
    """What the encoder is trained to give, scaled and shifted: [B, 3, H, W] in [-1, 1] → [B, 3, H/4, W/4]."""
    return (F.avg_pool2d(pictures, FACTOR) - SHIFT) * SCALE


def build_vae() -> AutoencoderKL:
    """An f4 autoencoder in SD3's layout: no quant convolutions, one attention head in the middle."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[16, 32, 64],
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=64,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=SCALE,
        shift_factor=SHIFT,
    )


def encode(vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
    """The mode of the posterior, shifted and scaled."""
    return (vae.encode(pictures).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents → pictures, not clamped."""
    return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample


@torch.no_grad()
def decode_all(vae: AutoencoderKL, latents: torch.Tensor, batch: int = 16) -> torch.Tensor:
    """Decodes a long batch in parts, clamped to [-1, 1]."""
    return torch.cat([decode(vae, part) for part in latents.split(batch)]).clamp(-1, 1)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over pictures [B, 3, H, W] in [-1, 1], dB."""
    return float((10 * torch.log10(4 / ((a - b) ** 2).mean((1, 2, 3)).clamp(min=1e-12))).mean())


@torch.no_grad()
def round_trip(vae: AutoencoderKL, size: int, count: int = 48) -> tuple[float, float, torch.Tensor]:
    """On held-out pictures: PSNR of decode(encode(x)), error of the encoder's latents (rms), and those pictures."""
    pictures = render(draw_scenes(1_000_003, count), size)
    latents = torch.cat([encode(vae, p) for p in pictures.split(16)])
    back = decode_all(vae, latents)
    return psnr(back, pictures), float((latents - ideal_latents(pictures)).square().mean().sqrt()), back


def train_vae(vae: AutoencoderKL, stage: Stage, seed: int, log, batch: int = 12, noise: float = 0.06) -> None:
    """Trains encoder and decoder; leaves the averaged weights in `vae`."""
    average = Average(vae, 0.998)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=1.0, betas=(0.9, 0.99), weight_decay=0)
    stage.track(model=vae, average=average, optimiser=optimiser)
    if stage.done:
        average.swap()
        return
    vae.to(memory_format=torch.channels_last)
    reported, more = stage.spent, True
    while more:
        rng = StepRandomness(seed, stage.name, stage.step)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * warm_up_then_decay(stage.step, stage.progress)
        pictures = render([draw_scene(rng.python) for _ in range(batch)], 64).contiguous(memory_format=torch.channels_last)
        target = F.avg_pool2d(pictures, FACTOR)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            mean = posterior.mean.float()
            # The decoder learns from the encoder's means, with noise as large as a sampler may leave behind.
            level = noise * torch.rand(batch, 1, 1, 1, generator=rng.torch) / SCALE
            seen = mean + level * torch.randn(mean.shape, generator=rng.torch)
            back = vae.decode(seen).sample.float()
        # The posterior's variance is tied to a small constant: these latents are used by their mean.
        tight = (posterior.logvar.float() + 8).square().mean()
        loss = F.mse_loss(back, pictures) + 0.3 * F.l1_loss(back, pictures) + F.mse_loss(mean, target) + 1e-3 * tight
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        average.update(stage.step)
        more = stage.tick()
        if stage.spent - reported > 30 or not more:
            average.swap()
            at_64, error, _ = round_trip(vae, 64)
            at_128, _, _ = round_trip(vae, 128, 8)
            average.swap()
            log(f"vae {stage.progress:6.1%} step {stage.step} loss {loss.item():.4f} round trip {at_64:.2f} dB at 64 px, "
                f"{at_128:.2f} at 128; latents off by {error:.4f}")  # fmt: skip
            reported = stage.spent
            stage.pause()
    average.swap()
