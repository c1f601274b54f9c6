"""Training data for the refiner: pictures with captions, turned once into latents and text embeddings on disk.

The text encoders and the VAE are larger than the refiner by far, so they run once over the data, shard by shard, and are
freed before training starts. A cache is a folder of `shard-*.safetensors` (latents [n, C, h, w], context [n, L, D],
pooled [n, P]) beside `null.safetensors` (the empty caption) and `cache.json` (what it was made from); each shard is
written completely or not at all, so a killed run goes on with the next one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file

from .requirements import load_config
from .state import StepRandomness, replace_atomically

PICTURES = {".png", ".jpg", ".jpeg", ".webp"}
SHARD = 64


def folder_examples(folder: Path) -> list[tuple[Path, str]]:
    """Pictures with captions: metadata.jsonl ({"file_name", "text"} a line), else NAME.txt beside each NAME.png."""
    listing = folder / "metadata.jsonl"
    if listing.exists():
        examples = []
        for number, line in enumerate(listing.read_text().splitlines(), 1):
            entry = json.loads(line)
            if "file_name" not in entry or "text" not in entry:
                raise ValueError(f'{listing}:{number}: expected "file_name" and "text" but found {", ".join(entry)}')
            examples.append((folder / entry["file_name"], entry["text"]))
    else:
        pictures = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
        examples = [(p, p.with_suffix(".txt").read_text().strip()) for p in pictures if p.with_suffix(".txt").exists()]
    missing = [str(p) for p, _ in examples if not p.exists()]
    if missing:
        raise ValueError(f"{listing} names pictures that are not there, {missing[0]} first")
    if not examples:
        raise ValueError(f"{folder}: no captioned pictures: give each NAME.png a NAME.txt, or write a metadata.jsonl")
    return examples


def dataset_examples(name: str, split: str, picture: str, caption: str) -> tuple[int, Iterator[tuple[Image.Image, str]]]:
    """A Hugging Face dataset, by name or by the path of a local one (also one of save_to_disk)."""
    import datasets

    if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
        data = datasets.load_from_disk(name)
        data = data[split] if isinstance(data, datasets.DatasetDict) else data
    else:
        data = datasets.load_dataset(name, split=split)
    for column in (picture, caption):
        if column not in data.column_names:
            raise ValueError(f'{name} has no column "{column}": it has {", ".join(data.column_names)}')
    return len(data), ((row[picture], row[caption]) for row in data)


def fit(picture: Image.Image, size: int) -> torch.Tensor:
    """Orientation applied, scaled to cover size x size, centre cropped: [3, size, size] in [-1, 1]."""
    fitted = ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8).view(size, size, 3)
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


class TextAndVae:
    """The frozen parts of a diffusers folder that make training data."""

    def __init__(self, model: Path, device: torch.device, dtype: torch.dtype, max_sequence_length: int = 256):
        from diffusers import StableDiffusion3Pipeline

        index = json.loads((Path(model) / "model_index.json").read_text())
        # Parts that a folder leaves out (SD3 without T5) have to be named as missing.
        missing = {k: None for k in ("text_encoder_3", "tokenizer_3") if index.get(k, [None])[0] is None}
        self.pipeline = StableDiffusion3Pipeline.from_pretrained(
            model, transformer=None, torch_dtype=dtype, **missing
        ).to(device)
        # encode_prompt asks the transformer for its context's width where there is no T5; its weights are not needed.
        with torch.device("meta"):
            self.pipeline.register_modules(transformer=SD3Transformer2DModel(**load_config(model)))
        tokenizer = self.pipeline.tokenizer_3
        self.length = min(max_sequence_length, tokenizer.model_max_length) if tokenizer else max_sequence_length
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def text(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        context, _, pooled, _ = self.pipeline.encode_prompt(
            captions, captions, captions, do_classifier_free_guidance=False,
            max_sequence_length=self.length, device=self.device,
        )  # fmt: skip
        return context, pooled

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A sample of the posterior, shifted and scaled."""
        vae = self.pipeline.vae
        posterior = vae.encode(pictures.to(self.device, self.dtype)).latent_dist
        draw = torch.randn(posterior.mean.shape, generator=generator).to(self.device, self.dtype)
        return (posterior.mean + posterior.std * draw - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def precompute(
    examples: Iterator[tuple[Image.Image | Path, str]],
    count: int,
    model: Path,
    cache: Path,
    *,
    size: int,
    device: torch.device,
    dtype: torch.dtype,
    max_sequence_length: int,
    made_from: dict,
    log,
) -> None:
    """Writes the cache; shards that are there already are kept."""
    cache.mkdir(parents=True, exist_ok=True)
    info = {"model": str(Path(model).resolve()), "size": size, "count": count, "maxSequenceLength": max_sequence_length, **made_from}
    note = cache / "cache.json"
    if note.exists() and json.loads(note.read_text()) != info:
        raise ValueError(f"{cache} was made from something else ({note.read_text().strip()}): remove it, or name another --cache")
    note.write_text(json.dumps(info))
    shards = -(-count // SHARD)
    done = [s for s in range(shards) if (cache / f"shard-{s:05d}.safetensors").exists()]
    if len(done) == shards and (cache / "null.safetensors").exists():
        return
    parts = TextAndVae(model, device, dtype, max_sequence_length)
    step = 2 ** len(parts.pipeline.vae.config.block_out_channels[1:]) * 2
    if size % step:
        raise ValueError(f"Expected --size to be a multiple of {step} but received {size}")
    context, pooled = parts.text([""])
    _write({"context": context, "pooled": pooled}, cache / "null.safetensors")
    pending: list[tuple[Image.Image | Path, str]] = []
    shard = 0

    def flush() -> None:
        nonlocal shard, pending
        path = cache / f"shard-{shard:05d}.safetensors"
        if not path.exists():
            pictures = []
            for source, _ in pending:
                try:
                    pictures.append(fit(Image.open(source) if isinstance(source, Path) else source, size))
                except OSError as error:
                    raise ValueError(f"{source}: not a readable picture ({error})") from error
            rows = []
            for start in range(0, len(pending), 8):
                captions = [c for _, c in pending[start : start + 8]]
                generator = torch.Generator().manual_seed(shard * SHARD + start)
                rows.append((parts.latents(torch.stack(pictures[start : start + 8]), generator), *parts.text(captions)))
            names = ("latents", "context", "pooled")
            _write({n: torch.cat([r[i] for r in rows]) for i, n in enumerate(names)}, path)
            log(f"data: shard {shard + 1} of {shards}")
        shard, pending = shard + 1, []

    for example in examples:
        pending.append(example)
        if len(pending) == SHARD:
            flush()
    if pending:
        flush()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    own = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    replace_atomically(path, lambda beside: save_file(own, beside))


class CachedBatches:
    """Random rows of a cache as a `refiner.Batch`; captions are dropped with probability `dropout`. `null` is the empty one."""

    def __init__(self, cache: Path, dropout: float = 0.1):
        shards = sorted(Path(cache).glob("shard-*.safetensors"))
        if not shards or not (Path(cache) / "null.safetensors").exists():
            raise ValueError(f"{cache}: no cached latents (shard-*.safetensors and null.safetensors) there")
        self._files = [safe_open(s, "pt") for s in shards]
        self._rows = [(k, i) for k, f in enumerate(self._files) for i in range(f.get_slice("latents").get_shape()[0])]
        with safe_open(Path(cache) / "null.safetensors", "pt") as null:
            self.null = (null.get_tensor("context").float(), null.get_tensor("pooled").float())
        self._dropout = dropout

    def __len__(self) -> int:
        return len(self._rows)

    def check(self, predictor) -> None:
        """The predictor must be the one the cache was made for: channels and widths."""
        first = self._files[0]
        config = predictor.config
        for name, axis, wanted in (
            ("latents", 1, config.in_channels),
            ("context", 2, config.joint_attention_dim),
            ("pooled", 1, config.pooled_projection_dim),
        ):
            found = first.get_slice(name).get_shape()[axis]
            if found != wanted:
                raise ValueError(f"The cache's {name} have {found} channels, the predictor takes {wanted}: it is another model's")

    def __call__(self, rng: StepRandomness, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        chosen = [self._rows[rng.python.randrange(len(self._rows))] for _ in range(rows)]
        parts = []
        for name in ("latents", "context", "pooled"):
            parts.append(torch.cat([self._files[k].get_slice(name)[i : i + 1] for k, i in chosen]).float())
        for row in range(rows):
            if rng.python.random() < self._dropout:
                parts[1][row], parts[2][row] = self.null[0][0], self.null[1][0]
        return parts[0], parts[1], parts[2]


def shuffled(examples: list, seed: int, limit: int | None) -> list:
    """A fixed random order, cut at `limit`."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    return order[:limit]
