"""PAMR (Araslanov & Roth, CVPR 2020), as NACLIP uses it: pixels take the mean of the like-coloured around.

The affinities of a pixel to its neighbours, 8 at each of the distances 8 and 16, are the softmax of the
mean over the channels of -|ΔI| / (1e-8 + 0.1 std), with std that of the channel over the 3x3 neighbourhoods
(18 values, the pixel twice). These distances are for photographs; textures of a few pixels need shorter
ones. Each step replaces scores by the means of the neighbours', so weighted. Beyond the border the border's
pixels repeat.

Shapes as in ``models.clip.refiners.base``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.refiners.base import RefineOptions, Refiner

_AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]


def _seen(x: Tensor, dilations: tuple[int, ...], *, itself: bool = False) -> Iterator[Tensor]:
    """What each position has at each of its neighbours, and for each distance ``itself``."""
    reach, (height, width) = max(dilations), x.shape[-2:]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    for dilation in dilations:
        for row, column in _AROUND:
            if itself or (row, column) != (0, 0):
                top, left = reach + dilation * row, reach + dilation * column
                yield padded[..., top : top + height, left : left + width]


def affinities(images: Tensor, dilations: tuple[int, ...]) -> Tensor:
    """(B, 3, h, w) -> (B, 8 per distance, h, w), summing to 1."""
    around = list(_seen(images, dilations, itself=True))  # views
    mean = sum(around, torch.zeros_like(images)) / len(around)
    square = torch.zeros_like(images)
    for seen in around:
        square += (seen - mean).square()
    scale = 1e-8 + 0.1 * (square / (len(around) - 1)).sqrt()
    logits = [-((seen - images).abs() / scale).mean(1) for seen in _seen(images, dilations)]
    return torch.stack(logits, 1).softmax(1)


def pamr(images: Tensor, cosines: Tensor, options: RefineOptions) -> Tensor:
    """See the module."""
    weights = affinities(images, options.dilations)
    for _ in range(options.steps):
        before, cosines = cosines, torch.zeros_like(cosines)
        for weight, seen in zip(weights.unbind(1), _seen(before, options.dilations), strict=True):
            cosines.addcmul_(weight[:, None], seen)
    return cosines


PAMR = Refiner(pamr)
