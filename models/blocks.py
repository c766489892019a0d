"""open_clip's residual attention block with a fused attention product.

Shapes: B batch, N tokens, W_ width.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def residual_block(block: Any, x: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """A residual block as open_clip computes it, (B, N, W_) -> (B, N, W_).

    In evaluation ``nn.MultiheadAttention`` writes out the N x N attention, and copies its weights where the
    batch comes first. The fused product over the same weights makes a visual block a tenth faster in bf16 and
    a quarter in fp32 on a CPU, and needs no memory for the attention.

    Args:
        block: open_clip's ``ResidualAttentionBlock`` or ``CustomResidualAttentionBlock``.
        x: its input.
        causal: whether a token sees only itself and what is before it, as in the text tower; for blocks with
            ``nn.MultiheadAttention``.
        mask: bool (B, 1, N, N), which token (row) may see which (column); likewise, and not with ``causal``.
    """
    attention = block.attn
    if not isinstance(attention, nn.MultiheadAttention):
        assert not causal and mask is None, "open_clip's own attention takes a mask"
        return block(x)  # open_clip's own attention is fused already
    packed = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    mixed = mixed.transpose(1, 2).flatten(2)
    x = x + block.ls_1(attention.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))
