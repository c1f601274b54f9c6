"""The procedural world that the shapes model draws: scenes, their captions, and exact renders.

A scene is geometry plus a caption in a tiny grammar, so that a picture can be checked against its caption by rule
(detector.py) and training data never runs out. Coordinates are parts of the picture's side, y grows downwards; the
same scene renders at any size. Everything is a function of a `random.Random`, so a seed names a data set.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 50),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "white": (250, 250, 250),
    "black": (20, 20, 20),
}
COLOUR_NAMES = tuple(COLOURS)
GREY = (160, 160, 160)
GREY_INDEX = len(COLOUR_NAMES)
"""The palette's last index: the ground of a caption that names no background."""
SHAPES = ("circle", "square", "triangle")
RELATIONS = ("above", "below", "left of", "right of")
SIZES = ("small", "", "large")

RADIUS_ALONE = {"small": (0.15, 0.19), "": (0.22, 0.28), "large": (0.31, 0.37)}
RADIUS_IN_PAIR = {"small": (0.12, 0.14), "": (0.155, 0.185), "large": (0.20, 0.22)}
MARGIN = 0.02
"""No object comes nearer than this to the picture's edge, so the frame always shows the ground."""

CIRCLE_RADIUS = 0.95
SQUARE_HALF_SIDE = 0.85
TRIANGLE = ((0.0, -0.95), (0.95, 0.8), (-0.95, 0.8))


def palette() -> torch.Tensor:
    """The nine colours as [9, 3] in [-1, 1]: COLOUR_NAMES in order, then grey."""
    return torch.tensor([*COLOURS.values(), GREY], dtype=torch.float32) / 127.5 - 1


@dataclass(frozen=True)
class Thing:
    """One object: indices into SHAPES and COLOUR_NAMES, a name out of SIZES, centre and radius in parts of the side."""

    shape: int
    colour: int
    size: str
    x: float
    y: float
    radius: float

    @property
    def phrase(self) -> str:
        words = " ".join(w for w in (self.size, COLOUR_NAMES[self.colour], SHAPES[self.shape]) if w)
        return _with_article(words)


@dataclass(frozen=True)
class Scene:
    """One or two things on a ground. `relation` indexes RELATIONS and is None for one thing."""

    things: tuple[Thing, ...]
    ground: int
    relation: int | None

    @property
    def caption(self) -> str:
        text = self.things[0].phrase
        if self.relation is not None:
            text += f" {RELATIONS[self.relation]} {self.things[1].phrase}"
        if self.ground != GREY_INDEX:
            text += f" on {_with_article(COLOUR_NAMES[self.ground] + ' background')}"
        return text


def _with_article(words: str) -> str:
    return ("an " if words.startswith("orange") else "a ") + words


def draw_scene(rng: random.Random, pair_share: float = 0.4, background_share: float = 0.4) -> Scene:
    """A random scene; `pair_share` of them hold two things, `background_share` name a background."""
    pair = rng.random() < pair_share
    first, second, third = rng.sample(range(len(COLOUR_NAMES)), 3)
    ground = third if rng.random() < background_share else GREY_INDEX
    sizes = [rng.choice(SIZES) for _ in range(2)]
    shapes = [rng.randrange(len(SHAPES)) for _ in range(2)]
    if not pair:
        r = rng.uniform(*RADIUS_ALONE[sizes[0]])
        x, y = (rng.uniform(r + MARGIN, 1 - MARGIN - r) for _ in range(2))
        return Scene((Thing(shapes[0], first, sizes[0], x, y, r),), ground, None)

    relation = rng.randrange(len(RELATIONS))
    radii = [rng.uniform(*RADIUS_IN_PAIR[s]) for s in sizes]
    # Along the relation's axis one thing follows the other with a gap; across it they stay near a common line.
    gap = rng.uniform(0.03, 0.10)
    length = 2 * radii[0] + 2 * radii[1] + gap
    start = rng.uniform(MARGIN, max(MARGIN, 1 - MARGIN - length))
    order = (0, 1) if RELATIONS[relation] in ("above", "left of") else (1, 0)
    along = [0.0, 0.0]
    along[order[0]] = start + radii[order[0]]
    along[order[1]] = start + 2 * radii[order[0]] + gap + radii[order[1]]
    line = rng.uniform(0.35, 0.65)
    across = [
        min(max(line + rng.uniform(-0.08, 0.08), r + MARGIN), 1 - MARGIN - r) for r in radii
    ]
    vertical = RELATIONS[relation] in ("above", "below")
    things = tuple(
        Thing(shapes[k], (first, second)[k], sizes[k], *((across[k], along[k]) if vertical else (along[k], across[k])), radii[k])
        for k in range(2)
    )
    return Scene(things, ground, relation)


def draw_scenes(seed: int, count: int, **shares: float) -> list[Scene]:
    """`count` scenes from one seed."""
    rng = random.Random(seed)
    return [draw_scene(rng, **shares) for _ in range(count)]


def signed_distance(shape: int, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Distance to the outline of a shape of radius 1 at the origin, negative inside; any broadcast shape of x and y."""
    if shape == 0:
        return torch.sqrt(x * x + y * y) - CIRCLE_RADIUS
    if shape == 1:
        return torch.maximum(x.abs(), y.abs()) - SQUARE_HALF_SIDE
    # The triangle is mirror symmetric: one slanted edge and the base bound it. Beyond a corner this is the distance
    # to the edges' lines rather than to the corner, which no anti-aliased pixel can tell.
    (apex_x, apex_y), (right_x, right_y), _ = TRIANGLE
    dx, dy = right_x - apex_x, right_y - apex_y
    slanted = ((x.abs() - apex_x) * dy - (y - apex_y) * dx) / math.hypot(dx, dy)
    return torch.maximum(slanted, y - right_y)


def coverage(shape: int, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor, size: int) -> torch.Tensor:
    """Anti-aliased masks of one shape: x, y, radius [B] in parts of the side → [B, size, size] in [0, 1]."""
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    column, row = grid[None, None, :], grid[None, :, None]
    cx, cy, r = (v[:, None, None] for v in (x, y, radius))
    return (0.5 - signed_distance(shape, (column - cx) / r, (row - cy) / r) * r * size).clamp(0, 1)


def render(scenes: list[Scene], size: int) -> torch.Tensor:
    """Pictures [B, 3, size, size] in [-1, 1]."""
    colours = palette()
    pictures = colours[[s.ground for s in scenes]][:, :, None, None].expand(-1, -1, size, size).clone()
    for layer in range(2):
        for shape in range(len(SHAPES)):
            rows = [i for i, s in enumerate(scenes) if len(s.things) > layer and s.things[layer].shape == shape]
            if not rows:
                continue
            things = [scenes[i].things[layer] for i in rows]
            x, y, r = (torch.tensor([getattr(t, name) for t in things]) for name in ("x", "y", "radius"))
            mask = coverage(shape, x, y, r, size)[:, None]
            colour = colours[[t.colour for t in things]][:, :, None, None]
            pictures[rows] = pictures[rows] * (1 - mask) + colour * mask
    return pictures
