"""Edges of pictures: control pictures for a ControlNet, and how well two of them agree.

Canny's detector in PyTorch (A Computational Approach to Edge Detection, 1986) in the form that OpenCV gives it, and control pictures are usually
made with: Sobel gradients of 8-bit values, of each pixel those of the channel where they are largest; magnitudes |gx| + |gy|; lines thinned to their
crests; weak pixels kept where they are connected with strong ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

LOW, HIGH = 100.0, 200.0
"""Magnitudes above which a pixel is a weak and a strong edge, the usual ones for control pictures."""


def canny(pictures: torch.Tensor, low: float = LOW, high: float = HIGH) -> torch.Tensor:
    """Pictures [B, 3, H, W] in [-1, 1] → edges [B, H, W], bool."""
    values = ((pictures.clamp(-1, 1) + 1) * 127.5).round()
    padded = F.pad(values, (1, 1, 1, 1), mode="replicate")
    smooth, slope = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([-1.0, 0.0, 1.0])
    kernels = torch.stack([smooth[:, None] * slope[None], slope[:, None] * smooth[None]])[:, None]
    batch, channels, height, width = values.shape
    gradient = F.conv2d(padded.flatten(0, 1)[:, None], kernels).view(batch, channels, 2, height, width)
    strongest = gradient.abs().sum(2).argmax(1)[:, None, None].expand(-1, 1, 2, -1, -1)
    gx, gy = gradient.gather(1, strongest)[:, 0].unbind(1)
    magnitude = gx.abs() + gy.abs()

    around = F.pad(magnitude, (1, 1, 1, 1))

    def neighbour(dy: int, dx: int) -> torch.Tensor:
        return around[:, 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    horizontal, vertical = gy.abs() <= 0.4142 * gx.abs(), gx.abs() <= 0.4142 * gy.abs()
    falling = gx * gy > 0
    crest = torch.where(
        horizontal, (magnitude > neighbour(0, -1)) & (magnitude >= neighbour(0, 1)),
        torch.where(
            vertical, (magnitude > neighbour(-1, 0)) & (magnitude >= neighbour(1, 0)),
            torch.where(falling, (magnitude > neighbour(-1, -1)) & (magnitude > neighbour(1, 1)), (magnitude > neighbour(-1, 1)) & (magnitude > neighbour(1, -1))),
        ),
    )  # fmt: skip
    weak, kept = crest & (magnitude > low), crest & (magnitude > high)
    while True:
        grown = weak & (F.max_pool2d(kept.float(), 3, 1, 1) > 0)
        if torch.equal(grown, kept):
            return kept
        kept = grown


def as_picture(edges: torch.Tensor) -> torch.Tensor:
    """Edges [B, H, W] → white on black, [B, 3, H, W] in [-1, 1]."""
    return (edges.float() * 2 - 1)[:, None].expand(-1, 3, -1, -1).contiguous()


def agreement(found: torch.Tensor, wanted: torch.Tensor, within: int = 1) -> float:
    """F1 of two edge maps [B, H, W], the mean over the batch: a pixel counts where the other map has an edge at most `within` pixels away."""
    near = [F.max_pool2d(e.float()[:, None], 2 * within + 1, 1, within)[:, 0] > 0 for e in (found, wanted)]
    precision = (found & near[1]).sum((1, 2)) / found.sum((1, 2)).clamp(min=1)
    recall = (wanted & near[0]).sum((1, 2)) / wanted.sum((1, 2)).clamp(min=1)
    return float((2 * precision * recall / (precision + recall).clamp(min=1e-9)).mean())
