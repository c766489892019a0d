"""LPOSS (arXiv 2503.19777), for ViTs: MaskCLIP's cosines spread over one graph of all patches of an image.

Nodes are the patches of all windows together; windows that overlap have nodes at the same place. Each is
joined with the 400 nodes whose values in the last attention of a helper, a self-supervised tower such as
DINO, have the highest cosines with its own: w = max(cosine, 0)³ exp(-0.01 distance), the distance in pixels.
With W = w + wᵀ, a diagonal of 0, and Wn = D^-½ W D^-½, ten conjugate gradient steps from 0 solve
(I - 0.95 Wn) x = y for each class; returned is 0.05 x, which has the scale of cosines and the same order of
classes.

If the helper has other patches than CLIP, CLIP's features are resized to the helper's grid.

Shapes as in ``models.clip.heads.base``; P classes, M = nodes, G neighbours of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.heads.base import Head
from models.clip.heads.value import MASKCLIP
from models.conjugate import conjugate_gradient

NEIGHBOURS = 400
POWER = 3
FADING = 0.01
SHARE = 0.95
STEPS = 10
ENTRIES = 1 << 24
"""Nodes are compared in groups of about so many pairs, which bounds memory."""


class Graph(NamedTuple):
    """Wn without its diagonal, as lists: the neighbours of node i are ``others[starts[i]:starts[i + 1]]``.

    Attributes:
        starts: int64 (M,).
        others: int64 (2 M G,).
        weights: (2 M G,); a pair that is listed twice counts with the sum.
    """

    starts: Tensor
    others: Tensor
    weights: Tensor

    def spread(self, x: Tensor) -> Tensor:
        """Wn x, of x (M, P)."""
        return F.embedding_bag(
            self.others, x, self.starts, mode="sum", per_sample_weights=self.weights.to(x.dtype)
        )


def graph_of(features: Tensor, places: Tensor) -> Graph:
    """The graph of an image's nodes.

    Args:
        features: of the helper (M, K), fp32 or fp64.
        places: (M, 2) in pixels, of the same dtype.
    """
    unit = F.normalize(features, dim=-1)
    count = len(unit)
    group = max(1, ENTRIES // count)
    found = [(rows @ unit.mT).topk(min(NEIGHBOURS, count), dim=1) for rows in unit.split(group)]
    alike, others = (torch.cat(parts) for parts in zip(*found, strict=True))
    here = torch.arange(count, device=unit.device)[:, None].expand_as(others)
    distance = torch.linalg.vector_norm(places[:, None] - places[others], dim=-1)
    weights = alike.clamp(min=0) ** POWER * (-FADING * distance).exp()
    weights = weights.masked_fill(here == others, 0)
    # Each edge from both of its ends, sorted by the end that it is listed at.
    ends = torch.cat([here.flatten(), others.flatten()])
    order = ends.argsort(stable=True)
    far = torch.cat([others.flatten(), here.flatten()])[order]
    weights = weights.flatten().repeat(2)[order]
    starts = torch.searchsorted(ends[order], here[:, 0].contiguous())
    degree = Graph(starts, far, weights).spread(torch.ones_like(unit[:, :1]))[:, 0]
    scale = degree.clamp(min=torch.finfo(degree.dtype).tiny).rsqrt()
    return Graph(starts, far, weights * scale[ends[order]] * scale[far])


def _solved(graph: Graph, y: Tensor) -> Tensor:
    """0.05 x, of y (M, P)."""
    return (1 - SHARE) * conjugate_gradient(lambda x: x - SHARE * graph.spread(x), y, steps=STEPS, dims=(0,))


def propagated(
    cosines: Sequence[Tensor],
    features: Sequence[Tensor],
    corners: Sequence[tuple[int, int]],
    stride: int,
) -> list[Tensor]:
    """Spread the cosines of all windows of images.

    Args:
        cosines: (B, P, h, w) of each window, fp32 or fp64.
        features: of the helper (B, K, h, w), of each window.
        corners: row and column of each window's first pixel.
        stride: pixels per cell.

    Returns:
        As ``cosines``.
    """
    like = cosines[0]
    places = torch.cat([_places(part, corner, stride) for part, corner in zip(cosines, corners, strict=True)])
    right = torch.cat([part.flatten(2) for part in cosines], 2).mT
    nodes = torch.cat([part.flatten(2) for part in features], 2).mT.to(like.dtype)
    solved = [_solved(graph_of(own, places), y) for own, y in zip(nodes, right, strict=True)]
    sizes = [part.shape[-2] * part.shape[-1] for part in cosines]
    parts = torch.stack(solved).mT.split(sizes, 2)
    return [part.unflatten(2, whole.shape[-2:]) for part, whole in zip(parts, cosines, strict=True)]


def _places(part: Tensor, corner: tuple[int, int], stride: int) -> Tensor:
    """Pixels (L, 2) of the cells of a window; only their differences count."""
    rows, columns = (
        start + stride * torch.arange(length, device=part.device, dtype=part.dtype)
        for start, length in zip(corner, part.shape[-2:], strict=True)
    )
    return torch.cartesian_prod(rows, columns)


LPOSS = Head(MASKCLIP.vit, None, helper="values", spread=propagated)
