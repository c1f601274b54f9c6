"""Other looks of the procedural world, for training adapters of the shapes model: a style for LoRAs, outlines for ControlNets.

A style has to survive the autoencoder, which knows flat areas of the nine colours and nothing else: other colours come out as the
nearest of these, and lines thinner than a latent pixel as smears. Things drawn as thick outlines do.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from PIL import Image

from .data import Example
from .edges import as_picture, canny
from .world import Scene, Thing, draw_scene, palette, render, signed_distance

OUTLINE = 0.36
"""Thickness of an outlined thing's line, inside its outline, in parts of its radius."""


def distance_to(thing: Thing, size: int) -> torch.Tensor:
    """Signed distance [size, size] of each pixel's centre to a thing's outline, in pixels, negative inside."""
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    x, y = (grid[None, :] - thing.x) / thing.radius, (grid[:, None] - thing.y) / thing.radius
    return signed_distance(thing.shape, x, y) * thing.radius * size


def outlined(scenes: list[Scene], size: int) -> torch.Tensor:
    """Things as thick outlines of their colour, with the ground inside: [B, 3, size, size] in [-1, 1]."""
    colours = palette()
    pictures = render([Scene((), s.ground, None) for s in scenes], size)
    for picture, scene in zip(pictures, scenes):
        for thing in scene.things:
            distance, half = distance_to(thing, size), OUTLINE * thing.radius * size / 2
            mask = (0.5 - ((distance + half).abs() - half)).clamp(0, 1)
            picture.copy_(picture * (1 - mask) + colours[thing.colour][:, None, None] * mask)
    return pictures


STYLES: dict[str, Callable[[list[Scene], int], torch.Tensor]] = {"outlined": outlined}
"""Styles by name: (scenes, pixels of a side) → pictures."""


def outlines(scenes: list[Scene], size: int, widths: list[float]) -> torch.Tensor:
    """The control pictures of scenes: white lines on black along the things' outlines, `widths` [B] in pixels; [B, 3, size, size] in [-1, 1]."""
    pictures = torch.zeros(len(scenes), size, size)
    for picture, scene, width in zip(pictures, scenes, widths):
        for thing in scene.things:
            mask = (0.5 + width / 2 - distance_to(thing, size).abs()).clamp(0, 1)
            picture.copy_(torch.maximum(picture, mask))
    return (pictures * 2 - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def filled(picture: torch.Tensor, scene: Scene) -> tuple[torch.Tensor, float]:
    """A picture [3, S, S] whose things may be outlined, as one of full things; and the part of their area that was not theirs, the mean over things.

    What of a thing's colour, or what it encloses, cannot be reached from the frame without crossing that colour is painted in it.
    So the detector, which knows full things, can judge both. The part is 0 for full things, about 0.4 for outlined ones.
    """
    colours = palette()
    nearest = ((picture[None] - colours[:, :, None, None]) ** 2).sum(1).argmin(0)
    result, hollow = picture.clone(), []
    for thing in scene.things:
        own = nearest == thing.colour
        inside = ~_reached(~own)
        if inside.any():
            hollow.append(1 - float(own[inside].float().mean()))
            enclosed = inside & ~own
            # Blends beside what is enclosed belong to the inner edge of the line, those beside the frame's side to the outer one.
            near = F.max_pool2d(enclosed.float()[None], 3, 1, 1)[0] > 0
            result = torch.where((near & inside)[None], colours[thing.colour][:, None, None], result)
        else:
            hollow.append(0.0)
    return result, sum(hollow) / len(hollow)


def _reached(free: torch.Tensor) -> torch.Tensor:
    """Pixels [S, S] that are connected with the frame through free ones, over edges."""
    size = free.shape[0]
    cells = free.flatten().tolist()
    frame = [k for i in range(size) for k in (i, (size - 1) * size + i, i * size, i * size + size - 1)]
    todo = [k for k in dict.fromkeys(frame) if cells[k]]
    reached = [False] * (size * size)
    while todo:
        k = todo.pop()
        if reached[k] or not cells[k]:
            continue
        reached[k] = True
        x = k % size
        todo += [n for n, inside in ((k - 1, x > 0), (k + 1, x < size - 1), (k - size, k >= size), (k + size, k < size * (size - 1))) if inside]
    return torch.tensor(reached).view(size, size)


def world_examples(style: str | None, seed: int, count: int, size: int, control: bool = False) -> Iterator[Example]:
    """Pictures of the world with captions, flat or in a style; with `control` their outlines too, half of them drawn, one to two pixels wide, half found by Canny's detector."""
    rng = random.Random(seed)
    for start in range(0, count, 64):
        scenes = [draw_scene(rng, pair_share=0.5) for _ in range(min(64, count - start))]
        pictures = STYLES[style](scenes, size) if style else render(scenes, size)
        if not control:
            yield from zip(map(to_image, pictures), (s.caption for s in scenes))
            continue
        drawn = outlines(scenes, size, [rng.uniform(1, 2) for _ in scenes])
        found = as_picture(canny(pictures))
        for k, scene in enumerate(scenes):
            yield to_image(pictures[k]), scene.caption, to_image((drawn if k % 2 else found)[k])


def to_image(picture: torch.Tensor) -> Image.Image:
    """A picture [3, H, W] in [-1, 1] in 8 bits."""
    return Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).contiguous().numpy())
