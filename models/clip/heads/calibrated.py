"""SC-CLIP's head (arXiv 2411.15869), for ViTs: outliers are replaced, and tokens averaged with like ones.

With F_i the patches after block i of 12, and C_i their class token:

1. Outliers of F_11 by a local outlier factor, score_i = mean over the 30 nearest j of kd_i / kd_j, with kd
   the squared distance to the 30th neighbour; outlier above the 95 % quantile. (That is what the released
   code computes: its reachability takes the row's own distance.) Each becomes the mean of its neighbours
   among the 8 around that are none, if there are any. The same positions of F_9 too.
2. S = cosines of the repaired F_9. Smoothing by a similarity: entries below 0.4 are 0, rows divided by their
   sum + 1e-6. x = smoothing by S of the repaired F_11.
3. Attention without class token: A = (softmax of 3 (S - mean S), negatives left out, shared by all heads, +
   softmax(k kᵀ/√d)) / 2; y = out_proj(A v) + 0.3 C_11. No residual, no MLP.
4. A second pass on z = F_4 + … + F_10 with the same S, + 0.3 (C_4 + … + C_10).
5. The sum of both, smoothed by the cosines of F_4.

For towers of another depth the block numbers are scaled, and kept before the last block: that is ours, as the
paper gives them for 12. Grids of up to 30 patches have fewer neighbours.

Shapes as in ``models.clip.heads.base``; P the (B, L, L) similarities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.heads.base import Head, VitLayer, after_mixing, merged, split
from models.errors import WrongUse

_BLOCKS = 12
_LOW, _MIDDLE, _SPAN = 3, 8, range(3, 10)  # 0-based, of 12
NEIGHBOURS = 30
QUANTILE = 0.95
FLOOR = 0.4
SHARPNESS = 3.0
CLASS_SHARE = 0.3


def layers(depth: int) -> tuple[int, ...]:
    """0-based blocks to read, of ``depth``: low, middle, then the span.

    Raises:
        MaskMillError: ``setting_invalid`` for a tower of one block.
    """
    if depth < 2:
        raise WrongUse(
            "setting_invalid",
            "The head sc reads earlier blocks, and the tower has one block only.",
            "Use the head nn.",
        )

    def scaled(index: int) -> int:
        return min(round(index * depth / _BLOCKS), depth - 2)

    return (scaled(_LOW), scaled(_MIDDLE), *dict.fromkeys(scaled(index) for index in _SPAN))


def outliers(x: Tensor) -> Tensor:
    """Bool (B, L): patches whose neighbourhood is much wider than those of their neighbours.

    Args:
        x: (B, L, W_), fp32 or fp64.
    """
    count = min(NEIGHBOURS, x.shape[1] - 1)
    if count < 1:
        return torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    x = x - x.mean(1, keepdim=True)  # a large common part would cost digits
    square = x.square().sum(-1)
    distance = square[:, :, None] + square[:, None] - 2 * (x @ x.mT)
    own = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    distance = distance.clamp(min=torch.finfo(x.dtype).tiny).masked_fill(own, torch.inf)
    near = distance.topk(count, dim=-1, largest=False)
    reach = near.values[..., -1]
    neighbours = reach.gather(1, near.indices.flatten(1)).unflatten(1, (-1, count))
    score = (reach[..., None] / neighbours).mean(-1)
    return score > score.quantile(QUANTILE, dim=1, keepdim=True)


def repaired(x: Tensor, bad: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches (B, L, W_) with the outliers among them replaced by the mean of their good neighbours.

    Args:
        bad: bool (B, L).
    """
    good = (~bad).to(x.dtype)[..., None]

    def around(values: Tensor) -> Tensor:
        cells = values.mT.unflatten(2, grid)
        return F.avg_pool2d(cells, 3, stride=1, padding=1).flatten(2).mT

    share = around(good)
    mean = around(x * good) / share.clamp(min=1 / 18)
    return torch.where((bad[..., None]) & (share > 0), mean, x)


def similarity(x: Tensor) -> Tensor:
    """Cosines P between patches (B, L, W_)."""
    x = F.normalize(x, dim=-1)
    return x @ x.mT


def smoothed(x: Tensor, similar: Tensor) -> Tensor:
    """Each patch (B, L, W_) as the mean of those it resembles, by P."""
    weights = similar.masked_fill(similar < FLOOR, 0)
    return (weights @ x) / (weights.sum(-1, keepdim=True) + 1e-6)


def _vit(layer: VitLayer) -> Tensor:
    dtype, block = layer.tokens.dtype, layer.block
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    low, middle = (tokens[:, 1:].to(exact) for tokens in layer.earlier[:2])
    late = layer.tokens.to(exact)
    classes, patches = late[:, :1], late[:, 1:]
    bad = outliers(patches)
    alike = similarity(repaired(middle, bad, layer.grid))
    patches = smoothed(repaired(patches, bad, layer.grid), alike)
    span = sum(tokens.to(exact) for tokens in layer.earlier[3:]) + layer.earlier[2].to(exact)

    # Both passes at once: 2 B images.
    q_k_v = split(block, block.ln_1(torch.cat([patches, span[:, 1:]]).to(dtype)))
    centred = alike - alike.mean((1, 2), keepdim=True)
    own = torch.eye(alike.shape[1], dtype=torch.bool, device=alike.device)  # stays, also where all are alike
    left_out = (centred < 0) & ~own
    shared = (SHARPNESS * centred).masked_fill(left_out, -torch.inf).softmax(-1).to(dtype)
    by_keys = merged(F.scaled_dot_product_attention(q_k_v[1], q_k_v[1], q_k_v[2]))
    by_middle = shared.repeat(2, 1, 1) @ merged(q_k_v[2])
    mixed = after_mixing(block, (by_keys + by_middle) / 2).to(exact)
    mixed = mixed + CLASS_SHARE * torch.cat([classes, span[:, :1]])
    first, second = mixed.chunk(2)
    return smoothed(first + second, similarity(low)).to(dtype)


SC = Head(_vit, None, layers)
