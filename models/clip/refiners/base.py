"""Refine class scores by the image, independently of the head that made them, in bounded memory.

A refiner is ``(images (B, 3, h, w), cosines (B, K, h, w), options) -> cosines (B, K, h, w)``, with RGB in
[0, 1] and cosines at one size. ``refine`` brings both to the size at which the refiner works and keeps the
classes that matter: with a bound on pixels and classes, memory does not grow with the image or the ontology.

Shapes: B batch, C classes, K of them, H W the image, Hn Wn the network's input, h w where the refiner works.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.catalogue import REFINERS


@dataclass(frozen=True)
class Refiner:
    """A way to refine.

    Attributes:
        refine: see the module.
        on_cells: it works on averages over cells of the image, not on pixels.
    """

    refine: Callable[[Tensor, Tensor, RefineOptions], Tensor]
    on_cells: bool = False


class RefineOptions(NamedTuple):
    """How to refine, and how much to take on; see ``MaskClipSettings``."""

    steps: int = 0
    classes: int = 32
    pixels: int = 1 << 19
    cells: int = 80
    dilations: tuple[int, ...] = (8, 16)


class Refined(NamedTuple):
    """Refined scores.

    Attributes:
        scores: (B, K, h, w), of the dtype of the scores that came in.
        classes: int64 (B, K), ascending ids; None if all C are there.
    """

    scores: Tensor
    classes: Tensor | None


def load_refiner(name: str) -> Refiner:
    """The code of a name in ``models.catalogue.REFINERS``."""
    refiner: Refiner = pkgutil.resolve_name(REFINERS[name].code)
    return refiner


def refine(
    name: str, images: Tensor, scores: Tensor, size: tuple[int, int], options: RefineOptions
) -> Refined:
    """Refine the scores of images that have one size.

    Args:
        name: in ``models.catalogue.REFINERS``.
        images: uint8 (B, 3, Hn, Wn) RGB.
        scores: cosines (B, C, any, any), fp32 or fp64.
        size: (H, W).
        options: steps 0 are the refiner's own.
    """
    refiner = load_refiner(name)
    options = options._replace(steps=options.steps or REFINERS[name].steps)
    pictures = images.to(scores.device, scores.dtype) / 255
    if refiner.on_cells:
        pictures, scores = (_cells(each, size, options.cells) for each in (pictures, scores))
        return Refined(refiner.refine(pictures, scores, options), None)
    classes = None
    if scores.shape[1] > options.classes:
        classes = likeliest(scores, options.classes)
        scores = scores.gather(1, classes[:, :, None, None].expand(-1, -1, *scores.shape[-2:]))
    shape = working_size(size, options.pixels)
    pictures, scores = (
        F.interpolate(each, shape, mode="bilinear", align_corners=False) for each in (pictures, scores)
    )
    return Refined(refiner.refine(pictures, scores, options), classes)


def working_size(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The image's own size, or one of the same shape with at most so many pixels."""
    height, width = size
    if height * width <= pixels:
        return size
    shrink = math.sqrt(pixels / (height * width))
    height = min(max(1, int(height * shrink)), pixels)
    return height, max(1, min(int(width * shrink), pixels // height))


def likeliest(scores: Tensor, count: int) -> Tensor:
    """Ids (B, K), ascending, of the classes that win the most positions, then of those that come nearest.

    Args:
        scores: (B, C, h, w).
    """
    margin = scores - scores.amax(1, keepdim=True)
    rank = (margin == 0).sum((2, 3)) + margin.amax((2, 3)).clamp(min=-1e6)
    return rank.topk(count, dim=1).indices.sort(dim=1).values


def _cells(x: Tensor, size: tuple[int, int], cells: int) -> Tensor:
    """(B, C, h, w) resized to the image's size and averaged over about ``cells`` cells a side, at once.

    Cells have whole pixels, so that a remainder at the end of an axis is left out. Both steps are linear and
    separable: one small matrix per axis, and the image's size is never held.
    """
    rows, columns = (_axis(x.shape[2 + i], size[i], cells, x) for i in range(2))
    return rows @ x @ columns.mT


def _axis(source: int, length: int, cells: int, like: Tensor) -> Tensor:
    """(cells, source): bilinear to ``length`` positions, then means of ``round(length / cells)`` of them."""
    one = torch.eye(source, dtype=like.dtype, device=like.device)[None]
    whole = F.interpolate(one, length, mode="linear", align_corners=False)
    return F.avg_pool1d(whole, max(1, round(length / cells)))[0].mT
