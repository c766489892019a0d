"""LPOSS+ (arXiv 2503.19777): label propagation on a graph of pixels.

Pixels up to 6 rows and columns apart are joined with weights W = exp(-|ΔLab| / 0.01), Lab divided by (100,
128, 128). With Wn = D^-½ W D^-½, ten conjugate gradient steps from 0 solve (I - 0.95 Wn) x = y for each
class; returned is 0.05 x, which has the scale of cosines and the same order of classes.

Shapes as in ``models.clip.refiners.base``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.clip.refiners.base import RefineOptions, Refiner
from models.conjugate import conjugate_gradient

REACH = 6
SHARE = 0.95
CONTRAST = 0.01
_PAIRS = [(y, x) for y in range(REACH + 1) for x in range(-REACH, REACH + 1) if y > 0 or x > 0]
"""Offsets to one half of the neighbours; the other half is the same edges from their other end."""


def lab(images: Tensor) -> Tensor:
    """SRGB (B, 3, h, w) in [0, 1] -> Lab (D65), divided by (100, 128, 128)."""
    linear = torch.where(images <= 0.04045, images / 12.92, ((images + 0.055) / 1.055) ** 2.4)
    red, green, blue = linear.unbind(1)
    x = (0.412453 * red + 0.357580 * green + 0.180423 * blue) / 0.950456
    y = 0.212671 * red + 0.715160 * green + 0.072169 * blue
    z = (0.019334 * red + 0.119193 * green + 0.950227 * blue) / 1.088754
    x, y, z = (
        torch.where(t > 0.008856, t.clamp(min=0.008856) ** (1 / 3), 7.787 * t + 16 / 116) for t in (x, y, z)
    )
    return torch.stack([(116 * y - 16) / 100, 500 * (x - y) / 128, 200 * (y - z) / 128], 1)


def _ends(x: Tensor, place: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Views of both ends of all edges of one offset (rows >= 0, columns)."""
    rows, columns = place
    height, width = x.shape[-2:]
    first = x[..., : height - rows, max(0, -columns) : width - max(0, columns)]
    second = x[..., rows:, max(0, columns) : width + min(0, columns)]
    return first, second


def lposs_plus(images: Tensor, cosines: Tensor, options: RefineOptions) -> Tensor:
    """See the module."""
    colours = lab(images)
    height, width = images.shape[-2:]
    places = [(y, x) for y, x in _PAIRS if y < height and abs(x) < width]
    weights = []
    degree = torch.zeros_like(images[:, :1])
    for place in places:
        one, other = _ends(colours, place)
        weight = (-torch.linalg.vector_norm(one - other, dim=1, keepdim=True) / CONTRAST).exp()
        weights.append(weight)
        for end in _ends(degree, place):
            end += weight
    scale = degree.clamp(min=torch.finfo(degree.dtype).tiny).rsqrt()

    def applied(x: Tensor) -> Tensor:
        scaled = scale * x
        spread = torch.zeros_like(x)
        for place, weight in zip(places, weights, strict=True):
            here, there = _ends(spread, place)
            one, other = _ends(scaled, place)
            here.addcmul_(weight, other)
            there.addcmul_(weight, one)
        return x - SHARE * scale * spread

    return (1 - SHARE) * conjugate_gradient(applied, cosines, steps=options.steps, dims=(2, 3))


LPOSS_PLUS = Refiner(lposs_plus)
