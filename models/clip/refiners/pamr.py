"""PAMR (Araslanov & Roth, CVPR 2020), as NACLIP uses it: pixels take the mean of the like-coloured around.

The affinities of a pixel to 16 neighbours, 8 each at distances 8 and 16, are the softmax of the mean over the
channels of -|ΔI| / (1e-8 + 0.1 std), with std that of the channel over both 3x3 neighbourhoods (18 values,
the pixel twice). Each step replaces scores by the means of the neighbours', so weighted. Beyond the border
the border's pixels repeat.

Shapes as in ``models.clip.refiners.base``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.refiners.base import Refiner

DILATIONS = (8, 16)
_AROUND = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)]
_PLACES = [(d * y, d * x) for d in DILATIONS for y, x in _AROUND]
_NEIGHBOURS = [place for place in _PLACES if place != (0, 0)]
_REACH = max(DILATIONS)


def _seen_from(padded: Tensor, place: tuple[int, int]) -> Tensor:
    """What each position has at (rows, columns) from it; a view."""
    height, width = padded.shape[-2] - 2 * _REACH, padded.shape[-1] - 2 * _REACH
    top, left = _REACH + place[0], _REACH + place[1]
    return padded[..., top : top + height, left : left + width]


def _padded(x: Tensor) -> Tensor:
    return F.pad(x, (_REACH,) * 4, mode="replicate")


def affinities(images: Tensor) -> Tensor:
    """(B, 3, h, w) -> (B, 16, h, w), summing to 1."""
    padded, count = _padded(images), len(_PLACES)
    mean = torch.stack([_seen_from(padded, place) for place in _PLACES]).mean(0)
    square = torch.zeros_like(images)
    for place in _PLACES:
        square += (_seen_from(padded, place) - mean).square()
    scale = 1e-8 + 0.1 * (square / (count - 1)).sqrt()
    logits = [-((_seen_from(padded, place) - images).abs() / scale).mean(1) for place in _NEIGHBOURS]
    return torch.stack(logits, 1).softmax(1)


def pamr(images: Tensor, cosines: Tensor, steps: int) -> Tensor:
    """See the module."""
    weights = affinities(images)
    for _ in range(steps):
        padded, cosines = _padded(cosines), torch.zeros_like(cosines)
        for index, place in enumerate(_NEIGHBOURS):
            cosines.addcmul_(weights[:, index, None], _seen_from(padded, place))
    return cosines


PAMR = Refiner(pamr)
