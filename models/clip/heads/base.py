"""What a dense head is, and the parts of a last layer that heads share.

Shapes: B batch, D embedding channels, h w grid, L = h*w, N = 1 + L tokens, W_ tower width, A attention heads,
d their width.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor

from models.catalogue import HEADS

QUERY, KEY, VALUE = 0, 1, 2  # places in the packed q, k, v


class HeadOptions(NamedTuple):
    """Settings that only some heads read; see ``MaskClipSettings``."""

    sigma: float = 5.0
    alpha: float = 0.08


USUAL = HeadOptions()


class VitLayer(NamedTuple):
    """What a head reads of a ViT.

    Attributes:
        block: the last residual block.
        tokens: its input (B, N, W_), class token first.
        grid: (h, w).
        earlier: outputs (B, N, W_) of the blocks that ``Head.layers`` asks for, in its order.
        helper: features (B, K, h', w') of a helper tower, if ``Head.helper`` asks for them; their grid covers
            the same pixels.
    """

    block: Any
    tokens: Tensor
    grid: tuple[int, int]
    earlier: tuple[Tensor, ...] = ()
    options: HeadOptions = USUAL
    helper: Tensor | None = None


class ResNetLayer(NamedTuple):
    """What a head reads of a ModifiedResNet.

    Attributes:
        pool: its attention pool.
        tokens: output of layer4 (B, L, W_).
        grid: (h, w).
    """

    pool: AttentionPool2d
    tokens: Tensor
    grid: tuple[int, int]
    options: HeadOptions = USUAL


def no_layers(_depth: int) -> tuple[int, ...]:
    """A head that needs no earlier block."""
    return ()


Spread = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[tuple[int, int]], int], list[Tensor]]
"""See ``models.clip.heads.lposs.propagated``."""


@dataclass(frozen=True)
class Head:
    """One way to read the last layer.

    Attributes:
        vit: a ViT's last layer -> patches (B, L, W_), the input of the tower's final norm and projection;
            None if it reads none of open_clip's.
        resnet: a ResNet's -> embeddings (B, L, D); None if the head makes no sense there.
        layers: number of blocks -> 0-based blocks whose outputs ``vit`` needs besides its tokens; raises
            ``WrongUse`` for towers that have too few.
        helper: what ``vit`` needs of a helper tower (``models.helper``), if anything; its patches are then
            those of the helper's grid, unless it spreads.
        spread: how cosines of all windows of images are made to agree, if they are: from those, on the
            helper's grid, the helper's features, the windows' corners and the pixels per cell.
        timm: last block of a timm ViT, and its input (B, N, W_) -> its output, if it reads those
            (``models.clip.towers``).
        gather: what is done with the patches (B, W_, h, w) of a whole image before they are embedded, if
            anything.
    """

    vit: Callable[[VitLayer], Tensor] | None
    resnet: Callable[[ResNetLayer], Tensor] | None
    layers: Callable[[int], tuple[int, ...]] = no_layers
    helper: Literal["tokens", "values"] | None = None
    spread: Spread | None = None
    timm: Callable[[Any, Tensor], Tensor] | None = None
    gather: Callable[[Tensor], Tensor] | None = None


def load_head(name: str) -> Head:
    """The code of a name in ``models.catalogue.HEADS``."""
    head: Head = pkgutil.resolve_name(HEADS[name].code)
    return head


class Attention(NamedTuple):
    """Queries, keys and values (B, A, N, d) of the last attention, class (or mean) token first."""

    q: Tensor
    k: Tensor
    v: Tensor
    grid: tuple[int, int]
    options: HeadOptions = USUAL


Mix = Callable[[Attention], Tensor]
"""Another attention: its outputs (B, A, L, d) for the patches, without the class token."""


def mixing(mix: Mix, *, whole_block: bool = False) -> Head:
    """A head that replaces the attention of the last layer.

    Args:
        mix: the attention.
        whole_block: keep a ViT's residual and MLP; else the attention's output is all there is.
    """

    def vit(layer: VitLayer) -> Tensor:
        mixed = after_mixing(layer.block, merged(mix(block_attention(layer))))
        return with_residuals(layer, mixed) if whole_block else mixed

    def resnet(layer: ResNetLayer) -> Tensor:
        embeddings: Tensor = layer.pool.c_proj(merged(mix(pool_attention(layer))))
        return embeddings

    return Head(vit, resnet)


def block_attention(layer: VitLayer) -> Attention:
    """q, k, v of a block, as its own attention compares them."""
    return Attention(
        *split(layer.block, layer.block.ln_1(layer.tokens)), grid=layer.grid, options=layer.options
    )


def split(block: Any, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised tokens (B, N, W_) -> q, k, v (B, A, N, d) of a block."""
    attention = block.attn
    packed = F.linear(y, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = (part.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for part in packed.chunk(3, -1))
    if hasattr(attention, "ln_q"):
        q, k = attention.ln_q(q), attention.ln_k(k)
    return q, k, v


def pool_attention(layer: ResNetLayer) -> Attention:
    """q, k, v of an attention pool, of the mean token and the cells, without positions."""
    pool = layer.pool
    x = torch.cat([layer.tokens.mean(1, keepdim=True), layer.tokens], dim=1)
    q, k, v = (
        projection(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    return Attention(q, k, v, layer.grid, layer.options)


def on_grid(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, L, D) -> (B, D, h, w)."""
    return tokens.transpose(1, 2).unflatten(2, grid)


def merged(x: Tensor) -> Tensor:
    """(B, A, L, d) -> (B, L, A d)."""
    return x.transpose(1, 2).flatten(-2)


def in_projection(block: Any, y: Tensor, part: int) -> Tensor:
    """Queries, keys or values (B, L, W_) of a block; rows are packed in the order q, k, v."""
    attention = block.attn
    width = attention.in_proj_weight.shape[1]
    rows = slice(part * width, (part + 1) * width)
    bias = None if attention.in_proj_bias is None else attention.in_proj_bias[rows]
    return F.linear(y, attention.in_proj_weight[rows], bias)


def after_mixing(block: Any, x: Tensor) -> Tensor:
    """Map attention outputs (B, L, W_): output projection, plus the scaling and norms of custom blocks."""
    attention = block.attn
    head_scale = getattr(attention, "head_scale", None)
    if head_scale is not None:
        x = (x.unflatten(-1, (attention.num_heads, -1)) * head_scale.flatten()[:, None]).flatten(-2)
    if hasattr(attention, "ln_inner"):
        x = attention.ln_inner(x)
    x = attention.out_proj(x)
    return block.ln_attn(x) if hasattr(block, "ln_attn") else x


def with_residuals(layer: VitLayer, mixed: Tensor) -> Tensor:
    """The rest of a block behind its attention: residual and MLP, for the patches (B, L, W_)."""
    block = layer.block
    z = layer.tokens[:, 1:] + block.ls_1(mixed)
    return z + block.ls_2(block.mlp(block.ln_2(z)))
