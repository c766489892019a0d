"""CLIP's text tower over the tree of prompts: what prompts begin with in common is computed once.

Under the causal mask a token's state depends on the tokens up to it and on nothing else. 85 templates times
52 names may be 4,420 prompts of 37,922 tokens, but only 14,789 distinct prefixes. Each is a node here.

Shapes: P prompts, G groups of prompts, T nodes of a group (at most), W_ width, D embedding channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.clip.blocks import residual_block
from models.clip.openclip import open_clip

# A group is run like one text whose tokens see only their own prefix. Larger groups repeat fewer first words,
# smaller ones have less attention that is computed and masked out.
_GROUP_NODES = 96
_BATCH_NODES = 1024  # larger is slower: the MLP's hidden layer falls out of the processor's cache


class Group(NamedTuple):
    """Prompts whose prefixes are computed together; every node comes after its prefix.

    Attributes:
        tokens: int64 (T,), the last token of each distinct prefix.
        depth: int64 (T,), its position in the prompt.
        mask: bool (T, T), which node (row) sees which (column): itself and its own prefix.
        ends: int64, the node at which each prompt of the group is pooled.
    """

    tokens: Tensor
    depth: Tensor
    mask: Tensor
    ends: Tensor


def shares_prefixes(model: nn.Module) -> TypeGuard[open_clip.CLIP]:
    """Whether ``encode_tokens`` takes this model: causal mask, one pooled token, torch's own attention."""
    return (
        isinstance(model, open_clip.CLIP)
        and isinstance(model.attn_mask, Tensor)
        and model.text_pool_type != "none"
        and all(isinstance(block.attn, nn.MultiheadAttention) for block in model.transformer.resblocks)
    )


def encode_tokens(
    model: open_clip.CLIP, tokens: Tensor, *, group_nodes: int = _GROUP_NODES, batch_nodes: int = _BATCH_NODES
) -> Tensor:
    """``model.encode_text`` with every distinct prefix of a group computed once.

    Args:
        model: one that ``shares_prefixes``.
        tokens: int64 (P, context), P > 0, on the CPU.
        group_nodes: distinct prefixes of a group; a longer prompt is a group of its own.
        batch_nodes: distinct prefixes computed at a time, in whole groups. This bounds the memory.

    Returns:
        (P, D), in the model's dtype on its device, not normalised.
    """
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    pooled = open_clip.transformer.text_global_pool(
        positions, tokens, model.text_pool_type, eos_token_id=model.text_eos_id
    )
    # What follows the pooled token cannot reach it. Sorted, prompts stand next to those they begin like.
    prompts, rows = tokens.where(positions <= pooled[:, None], -1).unique(dim=0, return_inverse=True)
    groups = _groups(prompts, group_nodes)
    ends = []
    while batch := list(islice(groups, max(1, batch_nodes // group_nodes))):
        ends.append(_run(model, batch))
    x = model.ln_final(torch.cat(ends))
    projection = model.text_projection
    if projection is not None:
        x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
    return x[rows]


def _groups(prompts: Tensor, size: int) -> Iterator[Group]:
    """Cut sorted, distinct prompts (ended by -1) into groups of at most ``size`` nodes."""
    # With the prompt before; sorted as they are, no earlier one shares more.
    shared = (prompts[1:] == prompts[:-1]).cumprod(1).sum(1)
    shared = torch.cat([shared.new_zeros(1), shared])
    lengths = (prompts >= 0).sum(1)
    total = (lengths - shared).cumsum(0)
    start = 0
    while start < len(prompts):
        # The first prompt of a group shares nothing, the next add what is theirs alone.
        room = total[start] + size - lengths[start]
        stop = max(start + 1, int(torch.searchsorted(total, room, right=True)))
        shared[start] = 0
        yield _group(prompts[start:stop], shared[start:stop], lengths[start:stop])
        start = stop


def _group(prompts: Tensor, shared: Tensor, lengths: Tensor) -> Group:
    """Number the prefixes of sorted prompts, each beginning with ``shared`` tokens of the one before."""
    position = torch.arange(prompts.shape[1])
    new = (position >= shared[:, None]) & (position < lengths[:, None])
    row, depth = new.nonzero(as_tuple=True)
    # The node of a prefix is where it was last new: that prompt or one before it.
    index = new.flatten().cumsum(0).view_as(new) - 1
    node = index.where(new, -1).cummax(0).values
    mask = (node[row][:, depth] == torch.arange(len(row))) & (depth <= depth[:, None])
    ends = node.gather(1, lengths[:, None] - 1)[:, 0]
    return Group(prompts[new], depth, mask, ends)


def _run(model: open_clip.CLIP, groups: list[Group]) -> Tensor:
    """States (prompts of all groups, W_) at the pooled tokens, after the last block."""
    device = model.positional_embedding.device
    tokens = pad_sequence([group.tokens for group in groups], batch_first=True)
    depth = pad_sequence([group.depth for group in groups], batch_first=True)
    # A padded node sees itself alone: a row of the mask without any gives NaN.
    mask = torch.eye(tokens.shape[1], dtype=torch.bool).repeat(len(groups), 1, 1)
    for whole, group in zip(mask, groups, strict=True):
        whole[: len(group.mask), : len(group.mask)] = group.mask
    x = model.token_embedding(tokens.to(device)) + model.positional_embedding[depth.to(device)]
    mask = mask[:, None].to(device)
    for block in model.transformer.resblocks:
        x = residual_block(block, x, mask=mask)
    return torch.cat([states[group.ends] for states, group in zip(x, groups, strict=True)])
