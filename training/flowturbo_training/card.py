"""The model card of the shapes model, written from what was measured."""

from __future__ import annotations

from pathlib import Path


def write_card(folder: Path, report: dict, facts: dict, shape, settings, guidance) -> None:
    size = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6
    rows = "\n".join(
        f"| {name} | {r['n']} | {r['ground']:.3f} | {r['colours']:.3f} | {r['shapes']:.3f} | {r['relation']:.3f} |" for name, r in report.items()
    )
    parts = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    first, second = settings
    text = f"""# The shapes model

A small SD3-class text-to-image model in the diffusers layout, float16 files, {size:.0f} MB. It draws captions of this form, at 64 × 64 and
128 × 128 pixels; prompts have at most 16 tokens:

- `a [small|large] COLOUR SHAPE`, or two of them joined by `above`, `below`, `left of`, `right of`
- then optionally `on a COLOUR background` (without it the ground is grey)
- colours: red, orange, yellow, green, blue, purple, white, black; shapes: circle, square, triangle

It is for tests and for a first picture. It knows no other words, and was trained on nothing but flat
shapes drawn by a program.

## Data

A procedural world (`training/flowturbo_training/world.py`): scenes drawn at random during training, none twice. No picture
of anyone or by anyone is in it.

## Training

`python -m flowturbo_training shapes --out models/shapes`: seeds fixed, no other input.

| part | |
|---|---|
{parts}

Transformer: {shape.layers} layers × {shape.heads * shape.head_width}; batches of {first.batch} pictures at 64 px and {first.batch_large} at 128 px ({first.large_share:.0%} of the steps
after the first {first.large_from:.0%}, and {second.large_share:.0%} in the second stage); captions dropped for {first.caption_dropout:.0%}.

## Figures

Measured by the trainer's rule-based detector (ground; colours: exactly those of the caption; shapes: every one; relations of
pairs), guidance {guidance:g}, on captions that were not trained on. `reuse` is R with no refiner: the velocity is kept.

| size and blocks | captions | ground | colours | shapes | relations |
|---|---|---|---|---|---|
{rows}

## Schedules

`schedules.json` holds schedules of few steps that `flowturbo calibrate` found for these weights at 64 and 128 px, with the captions in `prompts.txt`, which are none of the
benchmarks'. How near each comes (`psnr.held`, `psnr.uncalibrated`) was measured on other captions still, 96 at 64 px and 32 at 128 px (`bench/measure-schedules.ts`); those that are no
nearer than the rule without calibration are not drawn with. Other weights need others: run both again after a training.

## Licence

Apache-2.0, weights and code.
"""
    (Path(folder) / "README.md").write_text(text)


