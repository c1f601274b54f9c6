"""The cards of the shapes model and of adapters, written from what was measured."""

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


FIGURES = {"outlined": "outlined", "edges": "edges (F1)", "ground": "ground", "colours": "colours", "shapes": "shapes", "relation": "relations"}
"""Columns of an adapter's figures, those that were measured."""


def adapter_card(file: Path, name: str, kind: str, facts: dict[str, str], data: str, sizes: list[int], settings, losses: tuple[float, float],
                 report: dict[str, dict[str, float]], trigger: str | None = None) -> None:  # fmt: skip
    """Writes the card of a LoRA or a ControlNet: what it is for, the data, the training, what was measured, limits, licence."""
    facts = {
        **facts,
        "pixels": ", ".join(str(s) for s in sizes),
        "steps, batch": f"{settings.steps:,}, {settings.batch}",
        "learning rate": f"{settings.lr:g}",
        "loss": f"{losses[0]:.4f} without it, {losses[1]:.4f} with it",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    text = f"# {name}\n\nA {kind} for the model `{facts['model']}`, in the format of diffusers.\n"
    if trigger:
        text += f"\nCaptions that call it have the words `{trigger}`.\n"
    text += f"\n## Data\n\n{data[0].upper() + data[1:]}.\n"
    text += f"\n## Training\n\n`python -m flowturbo_training {kind.lower()}`, rectified flow loss.\n\n| | |\n|---|---|\n{rows}\n"
    if report:
        columns = [k for k in FIGURES if k in next(iter(report.values()))]
        count = next(iter(report.values()))["n"]
        head = "| | " + " | ".join(FIGURES[k] for k in columns) + " |\n|---|" + "---|" * len(columns)
        lines = "\n".join(f"| {key} | " + " | ".join(f"{result[k]:.3f}" for k in columns) + " |" for key, result in report.items())
        how = (
            "`outlined`: pictures whose things enclose the ground; the detector then judges them filled."
            if "outlined" in columns
            else "`edges`: agreement of Canny's edges of the picture with those asked for, within one pixel."
        )
        text += f"\n## Figures\n\nOn {count} captions that were not trained on, by the trainer's rule-based detector, from the same noise. {how}\n\n{head}\n{lines}\n"
    text += (
        "\n## Limits\n\nIt fits this model's transformer and no other, and was trained at the sizes above. "
        "What the model cannot draw it cannot draw with this either.\n"
        "\n## Licence\n\n"
    )
    text += "Apache-2.0, as the model.\n" if report else "A derivative of the model: its licence applies, and so do the terms of the pictures.\n"
    file.write_text(text)
