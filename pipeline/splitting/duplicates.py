"""Pairs of near hashes among millions, and the groups that they make.

A pair within ``d`` bits agrees, in at least one of four bands of 16 bits, in all but ``d // 4`` bits (the
pigeonhole principle; Norouzi, Punjani and Fleet, "Fast Search in Hamming Space with Multi-Index Hashing",
2012). So only images that nearly agree in a band are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

BANDS, BAND_BITS = 4, 16
MOST_DISTANCE = 15
"""Largest distance that is looked up. Images that have nothing in common differ in 32 on average."""
AT_ONCE = 4_000_000

Indices = npt.NDArray[np.int64]


def near_pairs(hashes: npt.NDArray[np.uint64], distance: int) -> Indices:
    """Pairs of hashes of which at most ``distance`` bits differ, enough of them to connect all that are near.

    Args:
        hashes: (N,).
        distance: from 0 to ``MOST_DISTANCE``.

    Returns:
        int64 (P, 2), indices of ``hashes``. Equal hashes are connected in a chain, not each with each.
    """
    assert 0 <= distance <= MOST_DISTANCE, distance
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    found = [np.stack([order[same], order[same + 1]], 1)]
    distinct, first = np.unique(ordered, return_index=True)
    for one, other in _candidates(distinct, distance // BANDS):
        near = np.bitwise_count(distinct[one] ^ distinct[other]) <= distance
        found.append(np.stack([order[first[one[near]]], order[first[other[near]]]], 1))
    return np.unique(np.sort(np.concatenate(found), axis=1), axis=0).astype(np.int64)


def _candidates(hashes: npt.NDArray[np.uint64], flips: int) -> Iterator[tuple[Indices, Indices]]:
    """Pairs of distinct hashes that differ in at most ``flips`` bits of a band."""
    masks = [
        sum(1 << bit for bit in bits)
        for number in range(flips + 1)
        for bits in itertools.combinations(range(BAND_BITS), number)
    ]
    for band in range(BANDS):
        keys = ((hashes >> np.uint64(band * BAND_BITS)) & np.uint64(0xFFFF)).astype(np.int64)
        order = np.argsort(keys, kind="stable")
        starts = np.searchsorted(keys[order], np.arange((1 << BAND_BITS) + 1))
        for mask in masks:
            other = keys ^ mask
            counts = starts[other + 1] - starts[other]
            ends = np.cumsum(counts)
            for begin, stop in _steps(ends):
                one = np.repeat(np.arange(begin, stop), counts[begin:stop])
                first = np.repeat(ends[begin:stop] - counts[begin:stop], counts[begin:stop])
                within = np.arange(len(one)) + int(first[0]) - first
                with_ = order[starts[other[one]] + within]
                once = one < with_  # each pair is found from both sides
                yield one[once], with_[once]


def _steps(ends: Indices) -> Iterator[tuple[int, int]]:
    """Cut items with so many candidates, as running sums, into steps of bounded memory: [begin, stop)."""
    begin, done = 0, 0
    while begin < len(ends) and int(ends[-1]) > done:
        stop = max(begin + 1, int(np.searchsorted(ends, done + AT_ONCE, side="right")))
        if int(ends[stop - 1]) > done:
            yield begin, stop
        begin, done = stop, int(ends[stop - 1])


def connected(pairs: Indices, count: int) -> Indices:
    """Number of the group of each of ``count`` images: those that pairs connect, directly or through others.

    Args:
        pairs: (P, 2).

    Returns:
        int64 (count,), from 0 on.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs), np.bool_)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)


def chains(values: npt.ArrayLike) -> Indices:
    """Pairs (n, 2) that connect the places of equal values, (N,), of any kind."""
    _, numbers = np.unique(np.array(values), return_inverse=True)
    order = np.argsort(numbers, kind="stable")
    same = np.flatnonzero(numbers[order][1:] == numbers[order][:-1])
    return np.stack([order[same], order[same + 1]], 1)
