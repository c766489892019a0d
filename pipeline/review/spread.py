"""Choose images that are doubtful and unlike each other.

Shapes: N images, D channels.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_FARTHEST = 2.0


def spread(
    vectors: npt.NDArray[np.floating], weights: npt.NDArray[np.floating], count: int
) -> npt.NDArray[np.int64]:
    """Weighted farthest points (greedy k-center): the next is that with the largest weight × distance.

    Distance is 1 - cosine to the nearest that is chosen already, so a copy of a chosen image comes last.
    The cost is ``count`` products of (N, D) with a vector.

    Args:
        vectors: (N, D) of length 1.
        weights: (N,), above 0.
        count: how many to choose; fewer if there are fewer.

    Returns:
        Positions in the order in which they were chosen, (n,).
    """
    count = min(count, len(vectors))
    nearest = np.full(len(vectors), _FARTHEST)
    free = np.ones(len(vectors), np.bool_)
    chosen = np.empty(count, np.int64)
    for number in range(count):
        gain = np.where(free, weights * nearest, -1.0)
        # Of equals, such as copies of what is chosen, the one with more weight.
        best = np.flatnonzero(gain >= gain.max() - 1e-12)
        chosen[number] = best[np.argmax(weights[best])]
        free[chosen[number]] = False
        distance = 1.0 - vectors @ vectors[chosen[number]]
        np.minimum(nearest, np.maximum(distance, 0.0), out=nearest)
    return chosen


def interleaved(*lists: int) -> npt.NDArray[np.int64]:
    """An order in which lists of these lengths are evenly mixed: positions in all of them joined, (n,)."""
    ranks = np.concatenate([np.empty(0), *((np.arange(length) + 0.5) / max(length, 1) for length in lists)])
    return np.argsort(ranks, kind="stable").astype(np.int64)
