"""open_clip's residual attention block with a faster attention product.

Shapes: B batch, N tokens, W_ width, A attention heads, D channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SCORES_AT_ONCE = 1 << 21
"""Attention scores that are worked on together: 4 MB of bf16, which caches hold."""

_KEYS_PER_SAMPLE = 4
"""Of so many keys one is looked at for the level of a row's scores: exact enough, and faster than all."""

_CAPABILITIES = torch.cpu.get_capabilities()
_BF16_WITHOUT_AMX = bool(_CAPABILITIES.get("avx512_bf16")) and not _CAPABILITIES.get("amx_bf16")


def residual_block(block: Any, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """A residual block as open_clip computes it, (B, N, W_) -> (B, N, W_).

    In evaluation ``nn.MultiheadAttention`` writes out the N x N attention, and copies its weights where the
    batch comes first. The fused product over the same weights makes a visual block a quarter faster in fp32
    on a CPU, and needs no memory for the attention; in bf16 see ``_slow_fused_product``.

    Args:
        block: open_clip's ``ResidualAttentionBlock`` or ``CustomResidualAttentionBlock``.
        x: its input.
        mask: bool (B, 1, N, N), which token (row) may see which (column); for blocks with
            ``nn.MultiheadAttention``.
    """
    attention = block.attn
    if not isinstance(attention, nn.MultiheadAttention):
        assert mask is None, "open_clip's own attention takes a mask of another kind"
        return block(x)  # open_clip's own attention is fused already
    packed = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
    if mask is None and _slow_fused_product(q):
        mixed = _attention_by_heads(q, k, v)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    mixed = mixed.transpose(1, 2).flatten(2)
    x = x + block.ls_1(attention.out_proj(mixed))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _slow_fused_product(q: Tensor) -> bool:
    """Whether torch's fused product is slower than matrix products: bf16 on a processor without AMX.

    There it computes in fp32 inside, at a fifth of what bf16 matrix products reach. In training it stays, as
    the products would keep all scores for the way back; so it does where loops over heads are compiled, which
    would be anew for every size.
    """
    return (
        _BF16_WITHOUT_AMX
        and q.dtype == torch.bfloat16
        and q.device.type == "cpu"
        and not q.requires_grad
        and not torch.compiler.is_compiling()
    )


def _attention_by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, (B, A, N, D) each, some heads or a part of a head's queries at a time.

    The scores are rounded to bf16 before their softmax. They are therefore computed less the best of a part
    of their row, so that those that count are near zero and lose little: as good as fp32 scores.
    """
    images, heads, tokens, width = q.shape
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    scale = width**-0.5
    heads_at_once = max(1, _SCORES_AT_ONCE // tokens**2)
    queries_at_once = min(tokens, max(1, _SCORES_AT_ONCE // tokens))
    mixed = v.new_empty(images, tokens, heads, width).transpose(1, 2)
    for image in range(images):
        for head in range(0, heads, heads_at_once):
            some = slice(head, head + heads_at_once)
            keys, values = k[image, some].transpose(1, 2), v[image, some]
            for first in range(0, tokens, queries_at_once):
                rows = slice(first, first + queries_at_once)
                queries = q[image, some, rows]
                best = scale * torch.bmm(queries, keys[..., ::_KEYS_PER_SAMPLE]).amax(2, keepdim=True)
                scores = torch.baddbmm(best, queries, keys, beta=-1, alpha=scale)
                mixed[image, some, rows] = torch.bmm(scores.softmax(2), values)
    return mixed
