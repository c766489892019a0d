"""A part of a manifest for a try before the big run, and manifests without copies of the same image."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.corpus import ADDRESS, Corpus
from pipeline.corpus.spill import keys
from pipeline.files.fetch import digest
from pipeline.files.images import ImageError

_READ_AT_ONCE = 16
_BITS = 16
_SHIFT = np.uint64(64 - _BITS)


def some_of(corpus: Corpus, sample: int | None, seed: int = 0) -> Corpus:
    """Some images of a corpus at random, in its order.

    Ids are hashes, so an image's place in the random order depends on its id and the seed alone: a larger
    sample holds a smaller one, and that of a corpus that has grown holds many of the same images.

    Args:
        corpus: the images.
        sample: number of images; None leaves all.
        seed: of the random order.
    """
    if sample is None or sample >= corpus.num_rows:
        return corpus
    # Multiplication by an odd number is a one-to-one map of the 64-bit integers.
    factor = np.uint64(random.Random(seed).getrandbits(64) | 1)

    def places(rows: pa.Table) -> npt.NDArray[np.uint64]:
        with np.errstate(over="ignore"):
            return keys(rows["id"].to_numpy()) * factor

    # The last place that is taken, in two passes: its first 16 bits, then the rest.
    bins = np.zeros(1 << _BITS, np.int64)
    for rows in corpus:
        bins += np.bincount((places(rows) >> _SHIFT).astype(np.int64), minlength=len(bins))
    above = np.cumsum(bins)
    last = int(np.searchsorted(above, sample))
    inside = np.concatenate([found[(found >> _SHIFT) == last] for found in (places(rows) for rows in corpus)])
    end = np.sort(inside)[sample - (int(above[last]) - int(bins[last])) - 1]
    return corpus.some(lambda rows: rows.filter(pa.array(places(rows) <= end)))


class Distinct(NamedTuple):
    """A manifest that has each content once.

    Attributes:
        manifest: what is left: of equal images the first, and all that cannot be read.
        copies: pairs of URIs: what was left out, and what it is equal to.
        unreadable: number of images that could not be read.
    """

    manifest: pa.Table
    copies: list[tuple[str, str]]
    unreadable: int


def distinct(manifest: pa.Table, progress: Callable[[int], object] = lambda _done: None) -> Distinct:
    """Read all images, and leave out those whose bytes are equal to those of an earlier one.

    Args:
        manifest: as ``build_manifest`` returns it.
        progress: called with the number of images read so far.
    """
    first: dict[bytes, int] = {}
    kept: list[int] = []
    copies: list[tuple[str, str]] = []
    unreadable = 0
    uris = manifest["uri"].to_pylist()
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        for start in range(0, manifest.num_rows, 1000):
            rows = manifest.slice(start, 1000).to_pylist()
            for at, digest in enumerate(pool.map(_digest, rows), start=start):
                earlier = at if digest is None else first.setdefault(digest, at)
                unreadable += digest is None
                if earlier == at:
                    kept.append(at)
                else:
                    copies.append((uris[at], uris[earlier]))
            progress(start + len(rows))
    return Distinct(manifest.take(pa.array(kept, pa.int64())), copies, unreadable)


def _digest(row: dict[str, object]) -> bytes | None:
    start, length = row.get("offset"), row.get("length")
    assert start is None or isinstance(start, int)
    assert length is None or isinstance(length, int)
    try:
        return digest(str(row.get(ADDRESS) or row["uri"]), start=start or 0, length=length)
    except ImageError:
        return None
