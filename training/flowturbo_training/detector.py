"""A rule-based judge of pictures: does a picture show what its caption says?

Used to follow training and to measure the finished model. It is strict on purpose: a colour counts only if no other
object's colour is there, and a shape only if it is the best fitting one and covers its ideal outline well. Its own
error on exact renders is a test (test_world.py: at least 0.995).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .world import CIRCLE_RADIUS, RELATIONS, SHAPES, SQUARE_HALF_SIDE, TRIANGLE, Scene, coverage, palette

MIN_OVERLAP = 0.75
"""Intersection over union with the ideal outline below which a blob is no shape at all."""
MIN_AREA = 0.004
"""Part of the picture that a colour must cover, after one pixel is taken off its edges, to count as an object."""
SIZE_LIMITS = {1: (0.205, 0.295), 2: (0.1475, 0.1925)}
"""Radii between small, plain and large, for pictures of one and of two things."""


@dataclass
class Verdict:
    """What was right about one picture; `relation` and `sizes` as the others, None where the caption says nothing."""

    ground: bool
    colours: bool
    shapes: bool
    sizes: bool
    relation: bool | None


def _areas() -> torch.Tensor:
    """Area of each shape of radius 1."""
    base, height = 2 * TRIANGLE[1][0], TRIANGLE[1][1] - TRIANGLE[0][1]
    return torch.tensor([torch.pi * CIRCLE_RADIUS**2, (2 * SQUARE_HALF_SIDE) ** 2, base * height / 2])


def _centroid_offsets() -> torch.Tensor:
    """How far below a shape's origin its centroid lies, for radius 1: zero but for the triangle."""
    return torch.tensor([0.0, 0.0, sum(y for _, y in TRIANGLE) / 3])


def fit_shape(mask: torch.Tensor) -> tuple[int, float, float]:
    """Best shape for a soft mask [S, S]: its index, its overlap (soft intersection over union), its radius."""
    size = mask.shape[-1]
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    total = mask.sum().clamp(min=1e-6)
    cx, cy = (mask.sum(0) * grid).sum() / total, (mask.sum(1) * grid).sum() / total
    best = (0, -1.0, 0.0)
    for shape in range(len(SHAPES)):
        radius = torch.sqrt(total / size**2 / _areas()[shape])
        # Moments give the fit; a small search around them forgives a stray pixel.
        scales = torch.tensor([0.94, 1.0, 1.06])
        steps = torch.tensor([-0.5, 0.0, 0.5]) / size
        k, dx, dy = (v.flatten() for v in torch.meshgrid(scales, steps, steps, indexing="ij"))
        r = radius * k
        ideal = coverage(shape, cx + dx, cy - _centroid_offsets()[shape] * r + dy, r, size)
        overlap = torch.minimum(ideal, mask).sum((1, 2)) / torch.maximum(ideal, mask).sum((1, 2))
        at = int(overlap.argmax())
        if overlap[at] > best[1]:
            best = (shape, float(overlap[at]), float(r[at]))
    return best


def judge(picture: torch.Tensor, scene: Scene) -> Verdict:
    """Judges one picture [3, S, S] in [-1, 1] against the scene whose caption it was made from."""
    colours = palette()
    size = picture.shape[-1]
    pixels = picture.float().clamp(-1, 1)
    distance = ((pixels[None] - colours[:, :, None, None]) ** 2).sum(1)
    nearest = distance.argmin(0)
    frame = torch.cat([nearest[:1].flatten(), nearest[-1:].flatten(), nearest[:, 0], nearest[:, -1]])
    ground = int(frame.bincount(minlength=len(colours)).argmax())

    # One pixel off every edge: blends of two colours along an outline may look like a third one.
    solid = -F.max_pool2d(-F.one_hot(nearest, len(colours)).permute(2, 0, 1).float()[None], 3, 1, 1)[0]
    area = solid.mean((1, 2))
    area[ground] = 0
    found = {int(c) for c in torch.nonzero(area >= MIN_AREA).flatten()}
    wanted = {t.colour for t in scene.things}

    centres, shapes_right, sizes_right = [], True, True
    present = sorted(wanted | {ground})
    for thing in scene.things:
        if thing.colour not in found or thing.colour == ground:
            shapes_right = sizes_right = False
            continue
        mask = _soft_mask(pixels, colours, thing.colour, present)
        shape, overlap, radius = fit_shape(mask)
        shapes_right &= shape == thing.shape and overlap >= MIN_OVERLAP
        low, high = SIZE_LIMITS[len(scene.things)]
        sizes_right &= ("small" if radius < low else "large" if radius > high else "") == thing.size
        grid = (torch.arange(size) + 0.5) / size
        total = mask.sum()
        centres.append((float((mask.sum(0) * grid).sum() / total), float((mask.sum(1) * grid).sum() / total)))

    relation = None
    if scene.relation is not None:
        relation = len(centres) == 2 and _relation(*centres) == RELATIONS[scene.relation]
    return Verdict(ground == scene.ground, found == wanted, shapes_right, sizes_right, relation)


def _soft_mask(pixels: torch.Tensor, colours: torch.Tensor, colour: int, present: list[int]) -> torch.Tensor:
    """Coverage [S, S] of one colour: where a pixel lies between it and the ground or the other thing's colour."""
    coverage_of = torch.ones(pixels.shape[1:])
    for other in present:
        if other == colour:
            continue
        line = (colours[colour] - colours[other])[:, None, None]
        part = ((pixels - colours[other][:, None, None]) * line).sum(0) / (line * line).sum()
        coverage_of = torch.minimum(coverage_of, part.clamp(0, 1))
    # Only near the thing's own solid pixels: where the other thing meets the ground their blend may look like this colour.
    distance = torch.stack([((pixels - colours[c][:, None, None]) ** 2).sum(0) for c in present])
    nearest = (distance.argmin(0) == present.index(colour)).float()[None]
    solid = -F.max_pool2d(-nearest, 3, 1, 1)
    return coverage_of * F.max_pool2d(solid, 5, 1, 2)[0]


def _relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    dx, dy = second[0] - first[0], second[1] - first[1]
    if abs(dy) >= abs(dx):
        return "above" if dy > 0 else "below"
    return "left of" if dx > 0 else "right of"


def score(pictures: torch.Tensor, scenes: list[Scene]) -> dict[str, float]:
    """Accuracies over pictures [B, 3, S, S]; a picture is right if all of its things are. Relations count pairs only."""
    verdicts = [judge(p, s) for p, s in zip(pictures, scenes)]
    result: dict[str, float] = {"n": len(verdicts)}
    for field in fields(Verdict):
        known = [v for v in (getattr(v, field.name) for v in verdicts) if v is not None]
        result[field.name] = sum(known) / len(known) if known else float("nan")
    alone = [v.shapes for v in verdicts if v.relation is None]
    pairs = [v.shapes for v in verdicts if v.relation is not None]
    result["shapes_alone"] = sum(alone) / len(alone) if alone else float("nan")
    result["shapes_in_pairs"] = sum(pairs) / len(pairs) if pairs else float("nan")
    return result
