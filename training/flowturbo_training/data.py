"""Training data: pictures with captions, turned once into latents and text embeddings on disk.

The text encoders and the VAE are larger than a refiner or an adapter by far, so they run once over the data, shard by shard, and are
freed before training starts. A cache is a folder of `shard-*.safetensors` (latents [n, C, h, w], context [n, L, D],
pooled [n, P], for a ControlNet control [n, C, h, w]) beside `null.safetensors` (the empty caption) and `cache.json` (what it was made from); each shard is
written completely or not at all, so a killed run goes on with the next one.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
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

Source = Image.Image | Path
Example = tuple[Source, str] | tuple[Source, str, Source]
"""A picture, its caption and, for a ControlNet, its control picture."""


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
        pictures = _pictures_in(folder)
        examples = [(p, p.with_suffix(".txt").read_text().strip()) for p in pictures if p.with_suffix(".txt").exists()]
    missing = [str(p) for p, _ in examples if not p.exists()]
    if missing:
        raise ValueError(f"{listing} names pictures that are not there, {missing[0]} first")
    if not examples:
        raise ValueError(f"{folder}: no captioned pictures: give each NAME.png a NAME.txt, or write a metadata.jsonl")
    return examples


def _pictures_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)


def with_control_pictures(examples: list[tuple[Path, str]], folder: Path) -> list[Example]:
    """Each picture with that of the same name, whatever its ending, in `folder`."""
    by_name = {p.stem: p for p in _pictures_in(folder)}
    missing = [p for p, _ in examples if p.stem not in by_name]
    if missing:
        raise ValueError(f"{folder}: no control picture for {len(missing)} of {len(examples)} pictures, {missing[0].stem} first: give it the picture's name")
    return [(p, caption, by_name[p.stem]) for p, caption in examples]


def dataset_examples(name: str, split: str, *columns: str) -> tuple[int, Iterator[tuple]]:
    """A Hugging Face dataset, by name or by the path of a local one (also one of save_to_disk); picture, caption, control picture by their columns."""
    import datasets

    if (Path(name) / "dataset_info.json").exists() or (Path(name) / "dataset_dict.json").exists():
        data = datasets.load_from_disk(name)
        data = data[split] if isinstance(data, datasets.DatasetDict) else data
    else:
        data = datasets.load_dataset(name, split=split)
    for column in columns:
        if column not in data.column_names:
            raise ValueError(f'{name} has no column "{column}": it has {", ".join(data.column_names)}')
    return len(data), (tuple(row[column] for column in columns) for row in data)


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
    def control(self, pictures: torch.Tensor) -> torch.Tensor:
        """What a ControlNet made by `from_transformer` is given: the posterior's mode, scaled and, as diffusers' pipeline has it for these, not shifted."""
        vae = self.pipeline.vae
        return vae.encode(pictures.to(self.device, self.dtype)).latent_dist.mode() * vae.config.scaling_factor

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A sample of the posterior, shifted and scaled."""
        vae = self.pipeline.vae
        posterior = vae.encode(pictures.to(self.device, self.dtype)).latent_dist
        draw = torch.randn(posterior.mean.shape, generator=generator).to(self.device, self.dtype)
        return (posterior.mean + posterior.std * draw - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


def precompute(
    examples: Iterable[Example],
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
    control_of: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    """Writes the cache; shards that are there already are kept.

    Examples with a control picture, and those of which `control_of` makes one ([B, 3, H, W] → the same), have control latents too.
    """
    cache.mkdir(parents=True, exist_ok=True)
    info = {"model": str(Path(model).resolve()), "size": size, "count": count, "maxSequenceLength": max_sequence_length, **made_from}
    note = cache / "cache.json"
    if note.exists() and json.loads(note.read_text()) != info:
        raise ValueError(f"{cache} was made from something else ({note.read_text().strip()}): remove it, or name another --state")
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
    pending: list[Example] = []
    shard = 0

    def read(sources: list[Source]) -> torch.Tensor:
        pictures = []
        for source in sources:
            try:
                pictures.append(fit(Image.open(source) if isinstance(source, Path) else source, size))
            except OSError as error:
                raise ValueError(f"{source}: not a readable picture ({error})") from error
        return torch.stack(pictures)

    def flush() -> None:
        nonlocal shard, pending
        path = cache / f"shard-{shard:05d}.safetensors"
        if not path.exists():
            rows = []
            for start in range(0, len(pending), 8):
                sources, captions, *controls = zip(*pending[start : start + 8])
                pictures = read(sources)
                generator = torch.Generator().manual_seed(shard * SHARD + start)
                row = [parts.latents(pictures, generator), *parts.text(list(captions))]
                if controls or control_of:
                    row.append(parts.control(read(controls[0]) if controls else control_of(pictures)))
                rows.append(row)
            names = ("latents", "context", "pooled", "control")
            _write({n: torch.cat(column) for n, column in zip(names, zip(*rows))}, path)
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
    """Random rows of a cache as a `refiner.Batch`; captions are dropped with probability `dropout`. `null` is the empty one.

    With `control` a batch has control latents [B, C, h, w] as its fourth part.
    """

    def __init__(self, cache: Path, dropout: float = 0.1, control: bool = False):
        shards = sorted(Path(cache).glob("shard-*.safetensors"))
        if not shards or not (Path(cache) / "null.safetensors").exists():
            raise ValueError(f"{cache}: no cached latents (shard-*.safetensors and null.safetensors) there")
        self._files = [safe_open(s, "pt") for s in shards]
        self._names = ("latents", "context", "pooled", *(("control",) if control else ()))
        if control and "control" not in self._files[0].keys():
            raise ValueError(f"{cache}: its latents have no control pictures: they were cached for something else than a ControlNet")
        self._rows = [(k, i) for k, f in enumerate(self._files) for i in range(f.get_slice("latents").get_shape()[0])]
        with safe_open(Path(cache) / "null.safetensors", "pt") as null:
            self.null = (null.get_tensor("context").float(), null.get_tensor("pooled").float())
        self._dropout = dropout

    @property
    def pixels(self) -> int:
        """Of a latent: height times width."""
        return math.prod(self._files[0].get_slice("latents").get_shape()[2:])

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

    def __call__(self, rng: StepRandomness, rows: int) -> tuple[torch.Tensor, ...]:
        chosen = [self._rows[rng.python.randrange(len(self._rows))] for _ in range(rows)]
        parts = []
        for name in self._names:
            parts.append(torch.cat([self._files[k].get_slice(name)[i : i + 1] for k, i in chosen]).float())
        for row in range(rows):
            if rng.python.random() < self._dropout:
                parts[1][row], parts[2][row] = self.null[0][0], self.null[1][0]
        return tuple(parts)


class MixedBatches:
    """Batches of several caches, one of pictures of each size: each comes as often, larger pictures in fewer rows."""

    def __init__(self, caches: list[CachedBatches]):
        self._caches = caches
        self._smallest = min(c.pixels for c in caches)

    def check(self, predictor) -> None:
        for cache in self._caches:
            cache.check(predictor)

    def __call__(self, rng: StepRandomness, rows: int) -> tuple[torch.Tensor, ...]:
        cache = rng.python.choice(self._caches)
        return cache(rng, max(1, rows * self._smallest // cache.pixels))


def shuffled(examples: list, seed: int, limit: int | None) -> list:
    """A fixed random order, cut at `limit`."""
    order = list(examples)
    random.Random(seed).shuffle(order)
    return order[:limit]
