"""A memory of regions: what else in a corpus looks like this, and what CLIP thinks of it.

Each region of the corpus has a key, by which it is found, and a value, CLIP's embedding of it. A region of
an image finds its nearest keys; the mean of their values is scored against the class names, and these scores
support the image's own: ``(1 - share) * own + share * support`` (after CorrCLIP v2, whose regions come from a
network that was trained with annotated masks; these come from none).

Keys are an early block's tokens, less their mean over the memory: texture and colour, of which the last
block, whose values are the embedding, keeps other things.

Shapes: M regions of the memory, R of an image, K key channels, D embedding channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.settings import RegionKind

_AT_ONCE = 1 << 26  # similarities held at once, 256 MB
Search = Callable[[Tensor, int], Tensor]
"""Queries (R, K) of length 1, and a number of neighbours -> rows of the memory (R, neighbours)."""


@dataclass(frozen=True, eq=False)
class Memory:
    """Regions of a corpus, in memory.

    Attributes:
        values: (M, D), of length 1.
        mean: (K,), subtracted from keys.
        search: finds the nearest keys.
        regions: how an image falls into regions.
        key_block: number of the block, from 0, whose tokens are the keys.
    """

    values: Tensor
    mean: Tensor
    search: Search
    regions: RegionKind
    key_block: int

    def support(self, keys: Tensor, neighbours: int) -> Tensor:
        """What CLIP thinks of the regions that are most like these.

        Args:
            keys: (R, K), of the image's regions, as they come.
            neighbours: how many.

        Returns:
            fp32 (R, D) of length 1, on the keys' device.
        """
        queries = centred(keys.float(), self.mean.to(keys.device))
        rows = self.search(queries, min(neighbours, len(self.values)))
        found = self.values[rows.to(self.values.device)].float().mean(1)
        return F.normalize(found, dim=1).to(keys.device)


def centred(keys: Tensor, mean: Tensor) -> Tensor:
    """Keys without what they have in common, of length 1."""
    return F.normalize(keys - mean, dim=-1)


def exact_search(keys: Tensor) -> Search:
    """Search by comparing with all keys (M, K), which have length 1."""

    def search(queries: Tensor, neighbours: int) -> Tensor:
        queries = queries.to(keys.device, keys.dtype)
        step = max(1, _AT_ONCE // max(1, len(keys)))
        parts = [(part @ keys.T).topk(neighbours, dim=1).indices for part in queries.split(step)]
        return torch.cat(parts) if parts else torch.zeros(0, neighbours, dtype=torch.int64)

    return search
