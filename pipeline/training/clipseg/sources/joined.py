"""Triplets from two sources: truth for annotated classes, a model's labels for the others.

This is MaskCLIP+'s zero-shot setting: the unseen classes are known by name, and a teacher guesses where they
are.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.training.clipseg.sources.base import Example, Pairs, TripletSource, fingerprint


@dataclass(frozen=True, eq=False)
class JoinedSource(TripletSource):
    """See ``join_sources``."""

    _first: TripletSource
    _second: TripletSource

    def read(self, pair: int) -> Example:
        """See ``TripletSource.read``."""
        count = len(self._first.pairs)
        return self._first.read(pair) if pair < count else self._second.read(pair - count)

    def order(self, epoch: int, seed: int, *, grouped: bool = False) -> npt.NDArray[np.int64]:
        """See ``TripletSource.order``: each source keeps its order, and the two are evenly interleaved."""
        orders, places, offset = [], [], 0
        for source in (self._first, self._second):
            order = source.order(epoch, seed, grouped=grouped)
            rank = np.arange(len(order))
            if grouped:  # an image's pairs stay together
                image = source.pairs.image[order]
                rank = np.concatenate([[0], np.cumsum(image[1:] != image[:-1])])
            orders.append(order + offset)
            places.append((rank + 0.5) / (rank[-1] + 1))
            offset += len(order)
        mixed: npt.NDArray[np.int64] = np.concatenate(orders)
        return mixed[np.argsort(np.concatenate(places), kind="stable")]


def join_sources(first: TripletSource, second: TripletSource) -> JoinedSource:
    """Join two sources, the pairs of ``first`` before those of ``second``.

    One source says nothing about the other's images, so its phrases are no negatives there. Hence a source
    with a single phrase has no negatives at all.

    Args:
        first: not a joined source.
        second: not a joined source; images that it shares with ``first`` count as different ones.
    """
    a, b = first.pairs, second.pairs
    assert a.seam is None and b.seam is None, "only two sources can be joined"
    images = 1 + int(max(a.image.max(), a.unsure[:, 0].max(initial=0)))
    shift = np.array([images, len(a.phrases)], np.int64)
    pairs = Pairs(
        phrases=(*a.phrases, *b.phrases),
        image=np.concatenate([a.image, b.image + shift[0]]),
        phrase=np.concatenate([a.phrase, b.phrase + shift[1]]),
        block=np.concatenate([a.block, b.block + 1 + a.block.max()]),
        unsure=np.concatenate([a.unsure, b.unsure + shift]),
        seam=(images, len(a.phrases)),
    )
    return JoinedSource(
        name=f"{first.name} and {second.name}",
        fingerprint=fingerprint(first.fingerprint, [second.fingerprint]),
        pairs=pairs,
        left_out=Counter(first.left_out) + Counter(second.left_out),
        _first=first,
        _second=second,
    )
