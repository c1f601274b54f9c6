"""`python -m flowturbo_training`: shapes, refiner, lora, controlnet, features."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from pathlib import Path

# On a shared machine threads that spin while they wait take the time from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flowturbo_training", description="Training for flowturbo. Every command goes on where a killed one stopped."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _shapes(commands.add_parser("shapes", help="train the shapes model from nothing and write its diffusers folder"))
    _refiner(commands.add_parser("refiner", help="train a velocity refiner for an SD3-class diffusers folder"))
    _lora(commands.add_parser("lora", help="train a LoRA for an SD3-class diffusers folder"))
    _controlnet(commands.add_parser("controlnet", help="train a ControlNet for an SD3-class diffusers folder"))
    _features(commands.add_parser("features", help="train the classifier of the quality benchmark's Fréchet distance"))
    chosen = parser.parse_args(arguments)
    try:
        return chosen.run(chosen)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last saved state", file=sys.stderr)
        return 130


def _shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--state", type=Path, help="where the state of training is kept (default: OUT.state)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scale", type=float, default=1.0, help="part of the full training time, for trials")
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile, which needs a C++ compiler")
    parser.set_defaults(run=run_shapes)


def run_shapes(chosen: argparse.Namespace) -> int:
    from dataclasses import replace

    from .predictor import PredictorSettings, PredictorShape
    from .shapes import REFINER, RUN_ENDS, Minutes, train

    torch.set_num_threads(chosen.threads)
    minutes = Minutes()
    scaled = minutes.scaled(chosen.scale)
    scaled_down = lambda number: max(1, round(number * chosen.scale))  # noqa: E731
    refiner = replace(REFINER, steps=scaled_down(REFINER.steps))
    run_ends = replace(RUN_ENDS, steps=scaled_down(RUN_ENDS.steps), shards=scaled_down(RUN_ENDS.shards), rows=max(8, scaled_down(RUN_ENDS.rows)))
    state = chosen.state or Path(f"{chosen.out}.state")
    train(chosen.out, state, scaled, chosen.seed, PredictorShape(), PredictorSettings(compile=not chosen.no_compile), refiner, run_ends,
          max(8, round(200 * min(1, chosen.scale))))  # fmt: skip
    return 0


def _data(parser: argparse.ArgumentParser, source=None) -> None:
    """The pictures and captions of training, for refiners and adapters."""
    source = source or parser.add_mutually_exclusive_group()
    source.add_argument("--images", type=Path, help="a folder of pictures with NAME.txt beside NAME.png, or a metadata.jsonl")
    source.add_argument("--dataset", help="a Hugging Face dataset, by name or path")
    source.add_argument("--latents", type=Path, help="a cache that an earlier run wrote: nothing is encoded")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--caption-column", default="text")
    parser.add_argument("--limit", type=int, help="use so many examples at most")
    parser.add_argument("--max-sequence-length", type=int, default=256, help="T5 tokens (default 256)")
    parser.add_argument("--state", type=Path, help="cache and state of training (default: OUT.state)")


def _hardware(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--caption-dropout", type=float, default=0.1, help="share of the examples whose caption is left out (default 0.1)")
    parser.add_argument("--precision", default="bf16", choices=("bf16", "no"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")


def _refiner(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a diffusers folder; for --dry-run a transformer's config.json will do")
    _data(parser)
    parser.add_argument("--size", type=int, help="pixels of a side (default: the model's native size)")
    parser.add_argument("--out", type=Path, help="where to write (default: MODEL/refiner)")
    parser.add_argument("--layers", type=int, default=1, choices=(1, 2))
    parser.add_argument("--heads", type=int, help="attention heads, for a narrower refiner (with --init fresh)")
    parser.add_argument("--init", default="block", choices=("block", "fresh", "trained"), help="from the predictor's last blocks, fresh, or from MODEL/refiner")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=16, help="rows on each device")
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--clip", type=float, default=0.01, help="norm to which gradients are clipped")
    parser.add_argument("--average", type=float, default=0.9995, help="decay of the weights' moving average")
    parser.add_argument("--delta-max", type=float, default=0.12, help="longest step of the paper's range")
    parser.add_argument("--schedules", default="8,10,12", help="flowturbo schedules (numbers of blocks) whose neighbouring points are trained")
    parser.add_argument("--schedule-share", type=float, default=0.5, help="share of the pairs that come from --schedules")
    parser.add_argument("--own-states-share", type=float, default=0.0, help="share of the pairs at a state that the sampler has corrected")
    parser.add_argument("--last-intervals", type=int, help="train only the last so many intervals of --schedules, where R blocks are")
    parser.add_argument("--landing-steps", type=int, default=0, help="pairs that end at 0 aim at where so many steps of the predictor land (0: the paper's loss)")
    parser.add_argument("--runs", type=int, default=0, help="then train on the ends of the sampler's own runs from so many starts (0: do not)")
    parser.add_argument("--runs-guidance", default="4.5", help="guidance scales of the runs, separated by commas (default 4.5)")
    parser.add_argument("--runs-steps", type=int, default=2000, help="steps of training on them")
    parser.add_argument("--runs-batch", type=int, default=4, help="runs in a batch, on each device")
    parser.add_argument("--runs-lr", type=float, help="learning rate there (default: that of --lr)")
    parser.add_argument("--last-steps", type=int, default=0, help="then train on the last steps of the schedules in MODEL/schedules.json from so many starts (0: do not)")
    parser.add_argument("--last-steps-of", help="numbers of steps of the schedules, such as 4,5,6 (default: all)")
    parser.add_argument("--last-steps-for", type=int, default=2000, metavar="STEPS", help="steps of training on them")
    parser.add_argument("--last-steps-batch", type=int, default=4, help="runs in a batch, on each device")
    parser.add_argument("--last-steps-lr", type=float, help="learning rate there (default: that of --lr)")
    parser.add_argument("--last-steps-loss", default="pixels", choices=("pixels", "latents"), help="compared as pictures, which takes the decoder's memory, or as latents")
    _hardware(parser)
    parser.add_argument("--dry-run", action="store_true", help="print sizes, memory and disk, and stop; reads no weights")
    parser.set_defaults(run=run_refiner)


def run_refiner(chosen: argparse.Namespace) -> int:
    import json

    from .requirements import load_config, requirements_of

    config = load_config(chosen.model)
    layers, heads, initial = chosen.layers, chosen.heads, chosen.init
    if initial == "trained":
        trained_config = load_config(chosen.model / "refiner" / "config.json")
        layers, heads, initial = trained_config["num_layers"], trained_config["num_attention_heads"], "fresh"
    vae_file = chosen.model / "vae" / "config.json"
    vae = json.loads(vae_file.read_text()) if vae_file.exists() else {}
    factor = 2 ** (len(vae["block_out_channels"]) - 1) if vae else 8
    size = chosen.size or config.get("sample_size", 128) * factor
    tokens = (chosen.model / "tokenizer_3" / "tokenizer_config.json")
    t5 = min(chosen.max_sequence_length, json.loads(tokens.read_text()).get("model_max_length", 512)) if tokens.exists() else chosen.max_sequence_length
    clip_file = chosen.model / "text_encoder" / "config.json"
    clip = json.loads(clip_file.read_text()).get("max_position_embeddings", 77) if clip_file.exists() else 77
    required = requirements_of(
        chosen.model, layers=layers, heads=heads, initialise_from=initial, size=size, factor=factor,
        batch=chosen.batch, text_tokens=clip + t5, checkpointing=chosen.gradient_checkpointing,
    )  # fmt: skip
    print("\n".join(required.lines()), flush=True)
    if required.share > 0.05:
        print(f"note: the refiner is {required.share:.1%} of the predictor; above 5 % its evaluations are no longer nearly free", flush=True)
    if chosen.dry_run:
        return 0
    from .last_steps import LastSteps, LastStepSettings, gains, mark_refined, prepare_last_steps, read_schedules, train_on_last_steps

    schedules_file = chosen.model / "schedules.json"
    improved = {}
    if chosen.last_steps:
        counts = [int(n) for n in chosen.last_steps_of.split(",")] if chosen.last_steps_of else None
        fitted = [steps for steps in read_schedules(schedules_file, size, size) if counts is None or len(steps.weights) in counts]
        if not fitted:
            raise ValueError(f"{schedules_file} has no schedules of {chosen.last_steps_of} steps: run `flowturbo calibrate` for them first")
    if not (chosen.images or chosen.dataset or chosen.latents):
        raise ValueError("Expected the data: --images FOLDER, --dataset NAME or --latents CACHE")
    if not (chosen.model / "model_index.json").exists():
        raise ValueError(f"{chosen.model}: not a diffusers folder (no model_index.json)")

    from accelerate import Accelerator
    from diffusers import SD3Transformer2DModel

    from .data import CachedBatches, dataset_examples, folder_examples, precompute, shuffled
    from .refiner import RefinerSettings, build_refiner, train_refiner
    from .run_ends import RunEndSettings, prepare_run_ends, train_on_run_ends

    accelerator = Accelerator(mixed_precision=chosen.precision, cpu=chosen.cpu)
    dtype = torch.bfloat16 if chosen.precision == "bf16" else torch.float32
    out = chosen.out or chosen.model / "refiner"
    state = chosen.state or Path(f"{out}.state")
    log = print if accelerator.is_main_process else lambda _: None
    cache = chosen.latents or state / "cache"
    if chosen.latents is None and accelerator.is_main_process:
        if chosen.images:
            examples = shuffled(folder_examples(chosen.images), chosen.seed, chosen.limit)
            count, rows, made_from = len(examples), iter(examples), {"images": str(chosen.images.resolve())}
        else:
            from itertools import islice

            count, rows = dataset_examples(chosen.dataset, chosen.split, chosen.image_column, chosen.caption_column)
            if chosen.limit:
                count, rows = min(count, chosen.limit), islice(rows, chosen.limit)
            made_from = {"dataset": chosen.dataset, "split": chosen.split}
        precompute(
            rows, count, chosen.model, cache, size=size, device=accelerator.device, dtype=dtype,
            max_sequence_length=chosen.max_sequence_length, made_from=made_from, log=log,
        )  # fmt: skip
    accelerator.wait_for_everyone()
    batches = CachedBatches(cache, chosen.caption_dropout)
    predictor = SD3Transformer2DModel.from_pretrained(chosen.model / "transformer", torch_dtype=dtype)
    batches.check(predictor)
    scheduler = json.loads((chosen.model / "scheduler" / "scheduler_config.json").read_text())
    settings = RefinerSettings(
        steps=chosen.steps, batch=chosen.batch, lr=chosen.lr, clip=chosen.clip, average=chosen.average,
        delta_max=chosen.delta_max, schedules=[(int(n), float(scheduler.get("shift", 1.0))) for n in chosen.schedules.split(",")],
        schedule_share=chosen.schedule_share, same_point_share=chosen.own_states_share, last_intervals=chosen.last_intervals, landing_steps=chosen.landing_steps,
    )  # fmt: skip
    runs = chosen.runs and RunEndSettings(
        shift=float(scheduler.get("shift", 1.0)), guidance=tuple(float(g) for g in chosen.runs_guidance.split(",")),
        rows=min(8, chosen.runs), shards=-(-chosen.runs // min(8, chosen.runs)), steps=chosen.runs_steps, batch=chosen.runs_batch,
        lr=chosen.runs_lr or chosen.lr, clip=chosen.clip, average=chosen.average,
    )  # fmt: skip
    torch.manual_seed(chosen.seed)
    if chosen.init == "trained":
        refiner = SD3Transformer2DModel.from_pretrained(chosen.model / "refiner", torch_dtype=torch.float32)
    else:
        refiner = build_refiner(predictor, layers=layers, heads=heads, initialise_from=initial).float()
    how = {"accelerator": accelerator, "checkpointing": chosen.gradient_checkpointing}
    refiner = train_refiner(predictor, refiner, batches, state, settings, chosen.seed, log, **how)
    if runs:
        process = (accelerator.process_index, accelerator.num_processes)
        told = CachedBatches(cache, dropout=0)
        prepare_run_ends(predictor, told, told.null, state / "runs", runs, chosen.seed, log, device=accelerator.device, part=process)
        predictor.to("cpu")
        accelerator.wait_for_everyone()
        refiner = train_on_run_ends(refiner, told.null, state / "runs", state, runs, chosen.seed, log, **how)
    if chosen.last_steps:
        rows = min(8, chosen.last_steps)
        scales = len({steps.guidance for steps in fitted})
        trained = -(-chosen.last_steps // rows)
        # An eighth of the runs besides is kept apart, of each scale.
        held = max(1, trained // (8 * scales))
        ends = LastStepSettings(
            shift=float(scheduler.get("shift", 1.0)), rows=rows, held=held, shards=trained + held * scales, steps=chosen.last_steps_for,
            batch=chosen.last_steps_batch, lr=chosen.last_steps_lr or chosen.lr, clip=chosen.clip, average=chosen.average,
        )  # fmt: skip
        process = (accelerator.process_index, accelerator.num_processes)
        told = CachedBatches(cache, dropout=0)
        prepare_last_steps(
            predictor, told, told.null, fitted, state / "last-steps", ends, chosen.seed, log, device=accelerator.device, part=process
        )
        predictor.to("cpu")
        accelerator.wait_for_everyone()
        last = LastSteps(state / "last-steps", fitted, ends, told.null, accelerator.device)
        decode = _decoder(chosen.model, accelerator.device) if chosen.last_steps_loss == "pixels" else lambda latents: latents
        refiner = train_on_last_steps(refiner, last, decode, state, ends, chosen.seed, log, **how)
        improved = {steps: gain > interval for steps, (gain, interval) in gains(refiner, last, decode, log, chosen.last_steps_batch).items()}
    if accelerator.is_main_process:
        # The dtype of the predictor's file, so that one engine build has one dtype.
        refiner.to(_file_dtype(chosen.model / "transformer")).save_pretrained(out)
        log(f"wrote {out}")
        # What schedules.json says of the refiner is of the one beside it.
        if out.resolve() == (chosen.model / "refiner").resolve() and schedules_file.exists():
            mark_refined(schedules_file, size, size, improved)
            log(f"{schedules_file}: {sum(improved.values())} schedules end with the refiner")
    return 0


def _decoder(model: Path, device: torch.device):
    """Latents as the sampler has them → pictures, with a gradient."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(model / "vae", torch_dtype=torch.float32).to(device).eval().requires_grad_(False)
    return lambda latents: vae.decode(latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample


def _file_dtype(folder: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(sorted(folder.glob("*.safetensors"))[0], "pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


def _adapter(parser: argparse.ArgumentParser, steps: int, lr: float) -> argparse._MutuallyExclusiveGroup:
    """What the LoRA's command and the ControlNet's have in common; gives the group of data sources."""
    parser.add_argument("--model", type=Path, required=True, help="an SD3-class diffusers folder")
    source = parser.add_mutually_exclusive_group(required=True)
    _data(parser, source)
    parser.add_argument("--size", help="pixels of a side, or several sizes separated by commas, of which each batch has one (default: the model's native size)")
    parser.add_argument("--held", type=int, default=0, help="so many examples are kept apart to measure the loss on (default 0: it is measured on the others)")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=4, help="rows on each device, at the smallest size (default 4)")
    parser.add_argument("--lr", type=float, default=lr, help=f"learning rate (default {lr:g})")
    parser.add_argument("--warm-up", type=int, default=50, help="steps over which the learning rate rises (default 50)")
    parser.add_argument("--clip", type=float, default=1.0, help="norm to which gradients are clipped (default 1)")
    parser.add_argument("--average", type=float, default=0.99, help="decay of the weights' moving average (default 0.99)")
    parser.add_argument("--logit-mean", type=float, default=0.0, help="of the noise levels, before the shift of the model's schedule (default 0; more: more noise)")
    parser.add_argument("--logit-std", type=float, default=1.0)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"), help="of the file (default float16)")
    parser.add_argument("--threads", type=int, help="processor threads (default: torch's)")
    parser.add_argument("--trial", type=int, default=64, metavar="CAPTIONS", help="with --shapes: captions that the result is measured on (default 64)")
    _hardware(parser)
    return source


def _lora(parser: argparse.ArgumentParser) -> None:
    source = _adapter(parser, steps=1000, lr=1e-4)
    # The names are repeated here so that --help needs no torch; tests compare them with styles.STYLES.
    source.add_argument("--shapes", choices=("outlined",), help="for the shapes model: pictures of its world in another style, made as needed")
    parser.add_argument("--out", type=Path, required=True, help="the .safetensors file to write; its card is beside it, with .md")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, help="the matrices' product is scaled by alpha / rank (default: the rank)")
    parser.add_argument("--targets", default="attention", help="layers, separated by commas: attention, feed-forward, modulation, or ends of names such as attn2.to_q (default attention)")
    parser.add_argument("--trigger", help="for the card: words of the captions that call the style")
    parser.set_defaults(run=run_lora)


def _controlnet(parser: argparse.ArgumentParser) -> None:
    source = _adapter(parser, steps=5000, lr=5e-5)
    source.add_argument("--shapes", action="store_const", const="", help="for the shapes model: pictures of its world and their outlines, made as needed")
    parser.add_argument("--conditions", type=Path, help="with --images: a folder of control pictures, each with the name of its picture")
    parser.add_argument("--condition-column", default="conditioning_image", help="with --dataset: the column of control pictures")
    parser.add_argument("--canny", action="store_true", help="control pictures are the edges of the pictures")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--layers", type=int, help="blocks (default: half of the transformer's)")
    parser.set_defaults(run=run_controlnet)


_LEAST = {"limit": 1, "max_sequence_length": 1, "held": 0, "steps": 1, "batch": 1, "threads": 1, "trial": 0, "layers": 1}
_SHARES = ("caption_dropout", "average")
_ABOVE_ZERO = ("lr", "clip", "logit_std", "alpha")


def _checked_sizes(chosen: argparse.Namespace) -> list[int]:
    """The sizes to train at. What is wrong with the model's folder and with numbers is said here, before anything is read or encoded."""
    import json

    from .requirements import load_config

    # diffusers would take a folder that is not there for a name on the hub, and ask for it there.
    if not (chosen.model / "model_index.json").exists():
        raise ValueError(f"{chosen.model}: {'not a diffusers folder (no model_index.json)' if chosen.model.is_dir() else 'no such folder'}")
    given = {name: value for name, value in vars(chosen).items() if value is not None}
    flag = lambda name: f"--{name.replace('_', '-')}"  # noqa: E731
    for name, least in _LEAST.items():
        if given.get(name, least) < least:
            raise ValueError(f"Expected {flag(name)} to be at least {least} but received {given[name]}")
    for name in _SHARES:
        if not 0 <= given[name] <= 1:
            raise ValueError(f"Expected {flag(name)} to be from 0 to 1 but received {given[name]}")
    for name in _ABOVE_ZERO:
        if not 0 < given.get(name, 1) < float("inf"):
            raise ValueError(f"Expected {flag(name)} to be above 0 but received {given[name]}")

    config = load_config(chosen.model)
    factor = 2 ** (len(json.loads((chosen.model / "vae" / "config.json").read_text())["block_out_channels"]) - 1)
    try:
        sizes = [int(size) for size in (chosen.size or str(config.get("sample_size", 128) * factor)).split(",")]
    except ValueError:
        raise ValueError(f'Expected --size to be a number, or several separated by commas, but received "{chosen.size}"') from None
    step = factor * config.get("patch_size", 2)
    most = step * config["pos_embed_max_size"] if config.get("pos_embed_max_size") else None
    for size in sizes:
        if size < 1 or size % step:
            raise ValueError(f"Expected --size to be a multiple of {step} but received {size}")
        if most and size > most:
            raise ValueError(f"Expected --size to be at most {most}, for which the transformer has positions, but received {size}")
    return sizes


def _adapter_data(chosen: argparse.Namespace, sizes: list[int], accelerator, log, **control):
    """The batches of training and of measuring, the number of examples and the settings."""
    from .adapters import Source, prepare, shift_of
    from .flow import FlowSettings

    source = Source(
        images=chosen.images, dataset=chosen.dataset, latents=chosen.latents, world=chosen.shapes, split=chosen.split,
        columns=(chosen.image_column, chosen.caption_column, *((chosen.condition_column,) if control else ())),
        limit=chosen.limit, held=chosen.held, **control,
    )  # fmt: skip
    cache = (chosen.state or Path(f"{chosen.out}.state")) / "cache"
    training, measured, count = prepare(
        source, chosen.model, sizes, cache, seed=chosen.seed, dropout=chosen.caption_dropout, max_sequence_length=chosen.max_sequence_length,
        precision=torch.bfloat16 if chosen.precision == "bf16" else torch.float32, accelerator=accelerator, log=log,
    )  # fmt: skip
    settings = FlowSettings(
        shift=shift_of(chosen.model), steps=chosen.steps, batch=chosen.batch, lr=chosen.lr, warm_up=chosen.warm_up, clip=chosen.clip,
        average=chosen.average, logit_mean=chosen.logit_mean, logit_std=chosen.logit_std,
    )  # fmt: skip
    return training, measured, count, settings


def _check_finite(losses: tuple[float, float]) -> None:
    """The last step may have been the one that was too long."""
    if not all(map(math.isfinite, losses)):
        raise FloatingPointError("The loss is not finite after training, so that nothing is written: remove the state, and lower --lr or train with --precision no")


def _time_since(start: float, accelerator) -> str:
    from .state import compute_seconds

    minutes = f"{(time.monotonic() - start) / 60:.1f} minutes"
    return f"{minutes} ({compute_seconds() / 60:.1f} of computing)" if accelerator.device.type == "cpu" else minutes


def _data_in_words(chosen: argparse.Namespace, count: int) -> str:
    """For the card: a folder's or a data set's name, not its path on this machine."""
    if chosen.shapes is not None:
        style = f' in the style "{chosen.shapes}"' if chosen.shapes else ""
        return f"{count:,} pictures of a procedural world (`training/flowturbo_training/world.py`){style}; no picture of anyone or by anyone is in it"
    name = Path(chosen.dataset or chosen.images or chosen.latents).name
    return f"{count:,} pictures with captions, `{name}`"


def run_lora(chosen: argparse.Namespace) -> int:
    if chosen.out.suffix != ".safetensors":
        raise ValueError(f"Expected --out to be a file that ends in .safetensors but received {chosen.out}")
    sizes = _checked_sizes(chosen)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    from accelerate import Accelerator

    from .adapters import load_transformer
    from .card import adapter_card
    from .lora import LoraSettings, add_lora, measure_style, save_lora, train_lora

    start = time.monotonic()
    accelerator = Accelerator(mixed_precision=chosen.precision, cpu=chosen.cpu)
    log = print if accelerator.is_main_process else lambda _: None
    dtype = torch.bfloat16 if chosen.precision == "bf16" else torch.float32
    lora = LoraSettings(rank=chosen.rank, alpha=chosen.alpha, targets=chosen.targets.split(","))
    torch.manual_seed(chosen.seed)
    transformer = add_lora(load_transformer(chosen.model, dtype), lora)
    training, measured, count, settings = _adapter_data(chosen, sizes, accelerator, log)
    training.check(transformer)
    state = chosen.state or Path(f"{chosen.out}.state")
    losses = train_lora(transformer, training, measured, state, settings, chosen.seed, log, accelerator=accelerator, checkpointing=chosen.gradient_checkpointing)
    log(f"loss {losses[0]:.4f} without the LoRA, {losses[1]:.4f} with it")
    _check_finite(losses)
    if not accelerator.is_main_process:
        return 0
    values = save_lora(transformer, chosen.out, getattr(torch, chosen.dtype))
    log(f"wrote {chosen.out}: {values:,} values, {chosen.out.stat().st_size / 1e3:.0f} kB, {_time_since(start, accelerator)}")
    report = measure_style(transformer.cpu(), chosen.model, chosen.trial, log) if chosen.shapes and chosen.trial else {}
    facts = {
        "model": chosen.model.resolve().name, "rank, alpha": f"{lora.rank}, {lora.alpha or lora.rank:g}", "layers": ", ".join(lora.targets),
        "values, type": f"{values:,}, {chosen.dtype}",
    }  # fmt: skip
    adapter_card(chosen.out.with_suffix(".md"), chosen.out.stem, "LoRA", facts, _data_in_words(chosen, count), sizes, settings, losses, report, chosen.trigger)
    return 0


def run_controlnet(chosen: argparse.Namespace) -> int:
    sizes = _checked_sizes(chosen)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if sum((chosen.shapes is not None, chosen.conditions is not None, chosen.canny)) > 1:
        raise ValueError("Expected one source of control pictures: --conditions, --canny or --shapes")
    if chosen.images and not (chosen.conditions or chosen.canny):
        raise ValueError("Expected the control pictures: --conditions FOLDER or --canny")
    if chosen.conditions and not chosen.images:
        raise ValueError("Expected --images beside --conditions: the pictures that they are of")
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs

    from .adapters import load_transformer
    from .card import adapter_card
    from .controlnet import build_controlnet, measure_control, train_controlnet

    start = time.monotonic()
    # The text's half of the last block reaches no output.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(mixed_precision=chosen.precision, cpu=chosen.cpu, kwargs_handlers=[unused])
    log = print if accelerator.is_main_process else lambda _: None
    dtype = torch.bfloat16 if chosen.precision == "bf16" else torch.float32
    transformer = load_transformer(chosen.model, dtype)
    torch.manual_seed(chosen.seed)
    layers = chosen.layers or max(1, transformer.config.num_layers // 2)
    controlnet = build_controlnet(transformer, layers)
    training, measured, count, settings = _adapter_data(chosen, sizes, accelerator, log, control=True, conditions=chosen.conditions, canny=chosen.canny)
    training.check(transformer)
    state = chosen.state or Path(f"{chosen.out}.state")
    losses = train_controlnet(
        transformer, controlnet, training, measured, state, settings, chosen.seed, log, accelerator=accelerator, checkpointing=chosen.gradient_checkpointing
    )
    log(f"loss {losses[0]:.4f} without the ControlNet, {losses[1]:.4f} with it")
    _check_finite(losses)
    if not accelerator.is_main_process:
        return 0
    controlnet.to(getattr(torch, chosen.dtype)).save_pretrained(chosen.out)
    values = sum(p.numel() for p in controlnet.parameters())
    size = sum(f.stat().st_size for f in chosen.out.iterdir()) / 1e6
    log(f"wrote {chosen.out}: {values / 1e6:.2f} M parameters, {size:.1f} MB, {_time_since(start, accelerator)}")
    report = measure_control(transformer.cpu(), controlnet.cpu(), chosen.model, chosen.trial, log) if chosen.shapes is not None and chosen.trial else {}
    facts = {"model": chosen.model.resolve().name, "layers": str(layers), "parameters, type": f"{values / 1e6:.2f} M, {chosen.dtype}"}
    adapter_card(chosen.out / "README.md", chosen.out.name, "ControlNet", facts, _data_in_words(chosen, count), sizes, settings, losses, report)
    return 0


def _features(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the ONNX file to write")
    parser.add_argument("--state", type=Path, help="where the state of training is kept (default: OUT.state)")
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=run_features)


def run_features(chosen: argparse.Namespace) -> int:
    from .features import Features, accuracy, export, train_features
    from .state import Stage

    torch.manual_seed(chosen.seed)
    model = Features()
    state = chosen.state or Path(f"{chosen.out}.state")
    train_features(model, Stage(state, "features", chosen.minutes * 60), chosen.seed, print)
    print("right answers on held-out renders: " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy(model).items()))
    export(model, chosen.out)
    print(f"wrote {chosen.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
