"""ProxyCLIP's head (arXiv 2408.04883), for ViTs: patches mix as another tower finds them alike.

S are the cosines between the last tokens of a helper, a self-supervised tower such as DINO. Each patch
attends with A = softmax(3 (S - 1.2 mean S)), negatives left out, shared by all heads, to the values of CLIP's
last block, which are resized to the helper's grid: out_proj(A v), no residual, no MLP. The mean is over all
entries of an image. A patch always attends to itself: on an image without any structure nothing else is left.

Shapes as in ``models.clip.heads.base``; M = cells of the helper's grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.heads.base import VALUE, Head, VitLayer, after_mixing, in_projection, on_grid

CENTRE = 1.2
SHARPNESS = 3.0
ENTRIES = 1 << 24
"""Rows of A are made in groups of about so many entries, which bounds memory."""


def affinity_mix(
    features: Tensor, values: Tensor, *, centre: float = CENTRE, sharpness: float = SHARPNESS
) -> Tensor:
    """A v, with A = softmax(sharpness (S - centre mean S)), negatives left out.

    Args:
        features: of the helper (B, M, K), fp32 or fp64.
        values: (B, M, W_).
    """
    unit = F.normalize(features, dim=-1)
    middle = unit.mean(1, keepdim=True)
    mean = (middle * middle).sum(-1, keepdim=True)  # of all entries of S
    count = unit.shape[1]
    place = torch.arange(count, device=unit.device)
    mixed = []
    rows = max(1, ENTRIES // count)
    for first in range(0, count, rows):
        some = unit[:, first : first + rows]
        centred = some @ unit.mT - centre * mean
        own = place[first : first + rows, None] == place
        weights = (sharpness * centred).masked_fill((centred < 0) & ~own, -torch.inf).softmax(-1)
        mixed.append(weights.to(values.dtype) @ values)
    return torch.cat(mixed, 1)


def _vit(layer: VitLayer) -> Tensor:
    assert layer.helper is not None, "asked for by Head.helper"
    dtype = layer.tokens.dtype
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    values = in_projection(layer.block, layer.block.ln_1(layer.tokens[:, 1:]), VALUE)
    grid = layer.helper.shape[-2:]
    if grid != layer.grid:
        cells = F.interpolate(on_grid(values, layer.grid), grid, mode="bilinear", align_corners=False)
        values = cells.flatten(2).mT
    return after_mixing(layer.block, affinity_mix(layer.helper.flatten(2).mT.to(exact), values))


PROXY = Head(_vit, None, helper="tokens")
