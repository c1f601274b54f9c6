"""The shapes model from nothing: tokenizers, text encoders, VAE, predictor, refiner, and the diffusers folder.

Each part is a stage with its own state file (state.py), so the same command goes on after a kill, and a stage that is
done is not done again.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from .card import write_card
from .detector import score
from .predictor import PredictorSettings, PredictorShape, build_transformer, train_predictor, with_larger_table
from .refiner import Batch, RefinerSettings, build_refiner, train_refiner
from .sampling import sample, shifted_sigmas, velocity_of
from .state import Stage, StepRandomness
from .run_ends import RunEndSettings, prepare_run_ends, train_on_run_ends
from .text import Captions, TextEncoders, build_tokenizers, train_text
from .vae import build_vae, decode_all, ideal_latents, round_trip, train_vae
from .world import draw_scene, draw_scenes, render

SHIFT = 2.5
"""The schedule's shift for this model: of 1, 1.5, 2, 2.5 and 3 the one whose schedules with R come nearest to many steps."""


REFINER = RefinerSettings(
    steps=900, batch=32, lr=1.5e-3, clip=1.0, average=0.995, delta_max=0.2,
    schedules=[(n, SHIFT) for n in (4, 5, 6, 8, 10)], schedule_share=0.85, same_point_share=0.3, last_intervals=2, landing_steps=4,
)  # fmt: skip

RUN_ENDS = RunEndSettings(shift=SHIFT, guidance=(1.0, 2.0, 2.0, 2.0, 3.0, 4.5))

GUIDANCE = 2.0
"""The scale that draws best here, of 2, 3 and 4.5, at both sizes."""


def for_both_sizes(settings: PredictorSettings) -> PredictorSettings:
    """The predictor's second stage: mostly 128 px, less noise and smaller steps, since only the outlines are inexact there."""
    return replace(settings, large_share=0.6, large_from=0.0, sigma_mean_large=0.7, muon_lr=0.01, adam_lr=7.5e-4)


@dataclass
class Minutes:
    """Compute time of each stage (state.compute_seconds): under 80 minutes, and for the refiner about ten for its first part and half an hour for the runs and
    its second."""

    text: float = 2
    vae: float = 9
    predictor: float = 48
    larger: float = 18

    def scaled(self, factor: float) -> Minutes:
        return Minutes(**{name: value * factor for name, value in asdict(self).items()})


class Log:
    """Lines on the terminal and in `log.txt`, with the time since the start."""

    def __init__(self, path: Path):
        self._path, self._start = path, time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, line: str) -> None:
        text = f"[{(time.monotonic() - self._start) / 60:6.1f} min] {line}"
        print(text, flush=True)
        with open(self._path, "a") as file:
            file.write(text + "\n")


def contact_sheet(pictures: torch.Tensor, path: Path, columns: int = 8) -> None:
    """Pictures [B, 3, S, S] in [-1, 1] as one PNG."""
    size = pictures.shape[-1]
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (size + 2), rows * (size + 2)), (255, 255, 255))
    pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    for i, picture in enumerate(pixels):
        sheet.paste(Image.fromarray(picture), ((i % columns) * (size + 2), (i // columns) * (size + 2)))
    sheet.save(path)


@torch.no_grad()
def draw(transformer, encoders, captions, vae, scenes, size, *, blocks, guidance, seed=0, refiner=None, batch=32):
    """Pictures [B, 3, size, size] of scenes from noise; rows in the order of the scenes."""
    steps, pictures = len(blocks), []
    sigmas = shifted_sigmas(steps, SHIFT)
    generator = torch.Generator().manual_seed(seed)
    transformer.eval()
    for start in range(0, len(scenes), batch):
        part = scenes[start : start + batch]
        context, pooled = encoders(*captions([""] * len(part) + [s.caption for s in part]))
        side = size // 4
        noise = torch.randn(len(part), transformer.config.in_channels, side, side, generator=generator)
        latents = sample(
            velocity_of(transformer), noise, context, pooled, blocks=blocks, sigmas=sigmas, guidance=guidance,
            refiner=velocity_of(refiner) if refiner is not None else None,
        )  # fmt: skip
        pictures.append(decode_all(vae, latents))
    return torch.cat(pictures)


def show(result: dict[str, float]) -> str:
    return " ".join(f"{k} {v:.3f}" if k != "n" else f"n {v}" for k, v in result.items())


def train(out: Path, state: Path, minutes: Minutes, seed: int, shape: PredictorShape, settings: PredictorSettings,
          refining: RefinerSettings, run_ends: RunEndSettings, captions_measured: int = 200) -> None:  # fmt: skip
    """All stages of the training; `state` holds what a killed run goes on from, samples and log.txt."""
    log = Log(state / "log.txt")
    work = state / "parts"
    if not (work / "tokenizer_3/tokenizer.json").exists():
        build_tokenizers(work)
    captions = Captions(work)

    torch.manual_seed(seed)
    encoders = TextEncoders(captions=captions)
    train_text(encoders, captions, Stage(state, "text", minutes.text * 60), seed, log)
    encoders.eval().requires_grad_(False)
    torch.manual_seed(seed + 1)
    vae = build_vae()
    train_vae(vae, Stage(state, "vae", minutes.vae * 60), seed, log)
    vae.eval().requires_grad_(False)

    torch.manual_seed(seed + 2)
    transformer = build_transformer(shape)

    def on_interval(stage: Stage) -> None:
        for size, count in ((64, 64), (128, 24)):
            scenes = draw_scenes(2_000_003, count)
            pictures = draw(transformer, encoders, captions, vae, scenes, size, blocks="HPPPPPPP", guidance=GUIDANCE)
            log(f"  H1P7 at {size} px: {show(score(pictures, scenes))}")
            contact_sheet(pictures[:48], state / f"samples-{size}-{stage.step:06d}.png")
        transformer.train()

    train_predictor(
        transformer, encoders, captions, Stage(state, "predictor", minutes.predictor * 60), settings, seed, log, on_interval
    )
    train_predictor(
        transformer, encoders, captions, Stage(state, "larger", minutes.larger * 60), for_both_sizes(settings), seed, log, on_interval
    )
    transformer.eval().requires_grad_(False)

    torch.manual_seed(seed + 3)
    refiner = build_refiner(transformer, layers=1, heads=4, initialise_from="fresh")
    train_refiner(transformer, refiner, world_batches(encoders, captions), state, refining, seed, log)
    with torch.no_grad():
        null = encoders(*captions([""]))
    ends = prepare_run_ends(transformer, world_batches(encoders, captions, dropout=0), null, state / "runs", run_ends, seed, log)
    train_on_run_ends(refiner, null, state / "runs", state, run_ends, seed, log)

    folder = export(out, work, encoders, vae, transformer, refiner)
    log(f"wrote {folder}")
    report = measure(encoders, captions, vae, transformer, refiner, log, captions_measured)
    facts = {
        "text encoders": f"{_millions(encoders)}, {minutes.text:g} minutes at most",
        "VAE, factor 4, 3 channels": f"{_millions(vae)}, {minutes.vae:g} minutes, {round_trip(vae, 64)[0]:.1f} dB at 64 px, "
        f"{round_trip(vae, 128, 16)[0]:.1f} dB at 128 px",
        "transformer": f"{_millions(transformer)}, {minutes.predictor:g} and {minutes.larger:g} minutes",
        "refiner": f"{_millions(refiner)}, {refining.steps} steps on the trajectory and {run_ends.steps} on {ends:,} ends of runs",
    }
    write_card(folder, report, facts, shape, (settings, for_both_sizes(settings)), GUIDANCE)


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f} M parameters"


def world_batches(encoders: TextEncoders, captions: Captions, dropout: float = 0.1) -> Batch:
    """Fresh pictures of the world as the refiner's data; a third of the batches are at 128 px."""

    @torch.no_grad()
    def batch(rng: StepRandomness, rows: int):
        large = rng.python.random() < 1 / 3
        scenes = [draw_scene(rng.python, pair_share=0.5) for _ in range(max(1, rows // 3) if large else rows)]
        texts = ["" if rng.python.random() < dropout else s.caption for s in scenes]
        return ideal_latents(render(scenes, 128 if large else 64)), *encoders(*captions(texts))

    return batch


def export(out: Path, work: Path, encoders, vae, transformer, refiner) -> Path:
    """The diffusers folder in float16. The position tables grow to 256 px, so that a stage may go there."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizers = Captions(work)
    side = 2 * transformer.config.pos_embed_max_size
    pipeline = StableDiffusion3Pipeline(
        transformer=with_larger_table(transformer, side).half(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae.to(memory_format=torch.contiguous_format).half(),
        text_encoder=encoders.clip_l.half(),
        tokenizer=tokenizers.clip,
        text_encoder_2=encoders.clip_g.half(),
        tokenizer_2=tokenizers.clip,
        text_encoder_3=encoders.t5.half(),
        tokenizer_3=tokenizers.t5,
    )
    pipeline.save_pretrained(out)
    with_larger_table(refiner, side).half().save_pretrained(out / "refiner")
    # What was rounded to float16 is what is measured from here on.
    for part in (encoders, vae, transformer, refiner):
        part.half().float()
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        shutil.rmtree(out / name)
        shutil.copytree(work / name, out / name)
    return out


CHOICES = (("HPPPPPPPPP", None), ("HPPPPPPPRR", "trained"), ("HPPPPPPPRR", "reuse"), ("EEEEEEEEEE", None))


def measure(encoders, captions, vae, transformer, refiner, log, count: int, guidance: float = GUIDANCE) -> dict:
    """A first look with the trainer's own detector; the npm package's quality benchmark is the real measurement."""
    report = {}
    for size, n in ((64, count), (128, count // 2)):
        scenes = draw_scenes(3_000_017, n)
        for blocks, kind in CHOICES:
            pictures = draw(
                transformer, encoders, captions, vae, scenes, size, blocks=blocks, guidance=guidance,
                refiner=refiner if kind == "trained" else None,
            )  # fmt: skip
            name = f"{size} px {blocks}" + (f" ({kind})" if kind else "")
            report[name] = score(pictures, scenes)
            log(f"{name}: {show(report[name])}")
    return report
