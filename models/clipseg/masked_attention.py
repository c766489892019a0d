"""CLIP's image embedding with the patches outside a mask hidden (CLIPSeg, arXiv 2112.10003, §3.3).

This is the first of the paper's ways to tell CLIP which object is meant. A hidden patch is excluded from the
softmax, and every image of a batch has its own mask. (The paper's code multiplies scores by 0 before the
softmax, which leaves a weight of exp(0), and mixes up the masks within a batch.)

Shapes: B batch, D embedding channels, H W pixels, h w grid, N = 1 + h*w tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.clip.dense import VitDense, dense_encoder
from models.clip.loading import Clip
from models.errors import WrongUse


@dataclass(frozen=True)
class AttentionMask:
    """Which tokens do not see the patches outside the mask.

    Attributes:
        tokens: ``cls``, the class token alone; ``patches``, all patch tokens (the class token sees all).
        layers: ``last`` or ``all``.
    """

    tokens: Literal["cls", "patches"]
    layers: Literal["last", "all"]


def masked_embedding(clip: Clip, images: Tensor, masks: Tensor, how: AttentionMask) -> Tensor:
    """CLIP's image embeddings (B, D), not normalised.

    Args:
        clip: a ViT.
        images: normalised, float (B, 3, H, W).
        masks: (B, H, W), nonzero on the object; resized to the grid by nearest neighbour. If that leaves
            nothing of the object, the class token sees only itself, and patches only the class token.
        how: which tokens in which layers.

    Raises:
        MaskMillError: ``model_unsupported`` for a ResNet or a ViT with a custom attention.
    """
    tower = dense_encoder(clip.visual, head="plain")
    if not isinstance(tower, VitDense) or not all(
        isinstance(block.attn, nn.MultiheadAttention) for block in tower.visual.transformer.resblocks
    ):
        raise WrongUse(
            "model_unsupported",
            f"The attention of {clip.name} cannot be masked.",
            "Use a ViT with plain attention, such as ViT-B-16-quickgelu.",
        )
    whole = tower.whole_patches(images)
    grid = (whole.shape[-2] // tower.stride, whole.shape[-1] // tower.stride)
    x = tower.tokens(whole, tower.position_table(grid))
    blocks = list(tower.visual.transformer.resblocks)
    hidden = _hidden(masks, grid, how).to(x)
    mask = hidden.repeat_interleave(blocks[0].attn.num_heads, dim=0)
    for index, block in enumerate(blocks):
        masked = how.layers == "all" or index == len(blocks) - 1
        x = block(x, attn_mask=mask if masked else None)
    return tower.pooled(x)


def _hidden(masks: Tensor, grid: tuple[int, int], how: AttentionMask) -> Tensor:
    """Additive mask fp32 (B, N, N): -inf where a token (row) does not see another (column)."""
    inside = F.interpolate((masks != 0).float()[:, None], grid, mode="nearest").flatten(1) > 0
    seen = F.pad(inside, (1, 0), value=True)[:, None, :]  # (B, 1, N); all tokens see the class token
    rows = torch.arange(seen.shape[-1], device=seen.device) > 0
    if how.tokens == "cls":
        rows = ~rows
    nothing = torch.zeros(len(seen), len(rows), len(rows), device=seen.device)
    return nothing.masked_fill_(~seen & rows[:, None], -torch.inf)
