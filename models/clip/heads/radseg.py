"""RADSeg's reading of a C-RADIO (arXiv 2511.19704): attention corrected by its own output, then one map.

* Self-correlating recursive attention, in the last block, per head: o = out_proj(softmax(q kᵀ/√d) v); with C
  the cosines between the rows of o, softmax(10 C), negatives left out, times v, through out_proj again. Class
  tokens and registers take part; residual and MLP stay.
* Self-correlating global aggregation, over the patches F of all windows of an image, averaged where they
  overlap: softmax(10 (S - mean S)) F, negatives left out, S the cosines of F.

Shapes as in ``models.clip.heads.base``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.heads.base import Head, merged, on_grid
from models.clip.heads.proxy import affinity_mix

SHARPNESS = 10.0


def recursive(block: Any, tokens: Tensor) -> Tensor:
    """The output (B, N, W_) of a block of timm's, with the attention above.

    Args:
        block: the last one.
        tokens: its input (B, N, W_).
    """
    attention = block.attn
    q, k, v = (
        part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2)
        for part in attention.qkv(block.norm1(tokens)).chunk(3, -1)
    )
    first = attention.proj(merged(F.scaled_dot_product_attention(q, k, v)))
    exact = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    unit = F.normalize(first.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2).to(exact), dim=-1)
    cosines = unit @ unit.mT
    weights = (SHARPNESS * cosines).masked_fill(cosines < 0, -torch.inf).softmax(-1).to(v.dtype)
    x = tokens + block.ls1(attention.proj(merged(weights @ v)))
    kept: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return kept


def gathered(features: Tensor) -> Tensor:
    """The global aggregation of patches (B, W_, h, w)."""
    exact = torch.float64 if features.dtype == torch.float64 else torch.float32
    patches = features.flatten(2).mT.to(exact)
    mixed = affinity_mix(patches, patches, centre=1.0, sharpness=SHARPNESS)
    return on_grid(mixed, (features.shape[-2], features.shape[-1])).to(features.dtype)


RADSEG = Head(None, None, timm=recursive, gather=gathered)
