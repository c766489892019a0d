"""MaskCLIP's heads, in which no token mixes with others, and the unmodified CLIP.

Shapes as in ``models.clip.heads.base``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor

from models.clip.heads.base import VALUE as _VALUE
from models.clip.heads.base import Head, ResNetLayer, VitLayer, after_mixing, in_projection, with_residuals


def attention_pool(pool: AttentionPool2d, x: Tensor, positions: Tensor | None) -> Tensor:
    """All outputs (B, 1 + L, D) of the attention pool on (B, L, W_), the mean token's first."""
    x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
    if positions is not None:
        x = x + positions.to(x.dtype)
    split = [
        proj(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for proj in (pool.q_proj, pool.k_proj, pool.v_proj)
    ]
    mixed = F.scaled_dot_product_attention(split[0], split[1], split[2])
    outputs: Tensor = pool.c_proj(mixed.transpose(1, 2).flatten(-2))
    return outputs


def _value_vit(layer: VitLayer) -> Tensor:
    # Tokens do not interact, so the class token can be dropped.
    patches = layer.block.ln_1(layer.tokens[:, 1:])
    return after_mixing(layer.block, in_projection(layer.block, patches, _VALUE))


def _value_resnet(layer: ResNetLayer) -> Tensor:
    embeddings: Tensor = layer.pool.c_proj(layer.pool.v_proj(layer.tokens))
    return embeddings


def _maskclip_vit(layer: VitLayer) -> Tensor:
    return with_residuals(layer, _value_vit(layer))


def _maskclip_timm(block: Any, tokens: Tensor) -> Tensor:
    attention = block.attn
    width = attention.qkv.weight.shape[0] // 3
    bias = None if attention.qkv.bias is None else attention.qkv.bias[2 * width :]
    values = F.linear(block.norm1(tokens), attention.qkv.weight[2 * width :], bias)
    x = tokens + block.ls1(attention.proj(values))
    kept: Tensor = x + block.ls2(block.mlp(block.norm2(x)))
    return kept


def _plain_vit(layer: VitLayer) -> Tensor:
    patches: Tensor = layer.block(layer.tokens)[:, 1:]
    return patches


def _plain_resnet(layer: ResNetLayer) -> Tensor:
    # The reference's baseline keeps the mean token in the attention and omits the positions.
    return attention_pool(layer.pool, layer.tokens, None)[:, 1:]


MASKCLIP = Head(_maskclip_vit, _value_resnet, timm=_maskclip_timm)
VALUE = Head(_value_vit, _value_resnet)
PLAIN = Head(_plain_vit, _plain_resnet)
