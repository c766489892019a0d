"""Images of a table that CLIP takes for the same: crops, shifts and mirror images that change a hash.

Shapes: N images, D channels, P pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pipeline.files.storage import Storage
from pipeline.splitting.duplicates import chains, connected
from pipeline.table.changed import Images
from pipeline.table.embedding import embed_images
from pipeline.table.labels import OK, iter_batches

if TYPE_CHECKING:
    from models.clip.weights import WeightSource

TILE = 2048
PAIRS = 4_000_000
"""Pairs from which they are thinned out: a thousand copies of an image are half a million pairs."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Alike:
    """What CLIP says of the images of a table.

    Attributes:
        ids: int64 (N,), sorted, of the images that could be read as they were labelled.
        pairs: int64 (P, 2), ids that connect all that are alike.
    """

    ids: Ids
    pairs: Ids


def find_alike(
    table: Storage,
    source: WeightSource,
    similarity: float,
    *,
    images: Images,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Alike:
    """Embed the labelled images of a table, and find those that are alike.

    Args:
        table: the label table.
        source: the CLIP.
        similarity: see ``cosine_pairs``.
        images: where images are that are not whole files at their address.
        progress: called with the number of images done and in total.

    Raises:
        MaskMillError: ``table_damaged``; ``weights_…``.
    """
    rows = [
        row
        for batch in iter_batches(table, ["id", "uri", "sha256", "status"], batch_size=4096)
        for row in batch.to_pylist()
        if row["status"] == OK and images.located(row)
    ]
    # By id, so that nothing depends on files and their order.
    rows.sort(key=lambda row: row["id"])
    vectors, found = embed_images(source, rows, images=images, progress=progress)
    ids = np.array([row["id"] for row in rows], np.int64)[found]
    return Alike(ids, ids[cosine_pairs(vectors[found], similarity)])


def cosine_pairs(vectors: npt.NDArray[np.float32], similarity: float) -> Ids:
    """Pairs of vectors that are alike, enough of them to connect all that are.

    All pairs are looked at, in tiles, so the time grows with N squared.

    Args:
        vectors: float32 (N, D), of length 1.
        similarity: least cosine.

    Returns:
        int64 (P, 2), indices of ``vectors``.
    """
    import torch

    from models.device import best_device

    places = torch.from_numpy(vectors).to(best_device())
    count, held = len(vectors), 0
    found = [np.empty((0, 2), np.int64)]
    for top in range(0, count, TILE):
        for left in range(top, count, TILE):
            near = places[top : top + TILE] @ places[left : left + TILE].T >= similarity
            pairs = near.nonzero().cpu().numpy() + np.array([top, left])
            found.append(pairs[pairs[:, 0] < pairs[:, 1]])
            held += len(found[-1])
            if held > PAIRS:
                found = [chains(connected(np.concatenate(found), count))]
                held = len(found[0])
    return np.concatenate(found)
