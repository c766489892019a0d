"""A part of a manifest for a try before the big run, and manifests without copies of the same image."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.corpus import ADDRESS, Corpus
from pipeline.corpus.spill import Span, Spill, keys, spans
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


@dataclass(frozen=True)
class Distinct:
    """A corpus that has each content once.

    Attributes:
        corpus: what is left: of equal images the first, and all that cannot be read.
        count: number of images that were left out.
        copies: yields pairs of URIs: what was left out, and what it is equal to.
        unreadable: number of images that could not be read.
    """

    corpus: Corpus
    count: int
    copies: Callable[[], Iterator[tuple[str, str]]]
    unreadable: int


_CONTENTS = pa.schema(
    [("id", pa.int64()), ("digest", pa.binary(32)), ("image", pa.int64()), ("uri", pa.string())]
)
"""By the first 8 bytes of the digest, so that equal contents meet in one span."""
_COPIES = pa.schema([("id", pa.int64()), ("uri", pa.string()), ("equal_to", pa.string())])


def distinct(corpus: Corpus, progress: Callable[[int], object] = lambda _done: None) -> Distinct:
    """Read all images, and leave out those whose bytes are equal to those of an earlier one.

    Args:
        corpus: the images.
        progress: called with the number of images read so far.
    """
    contents = Spill(_CONTENTS)
    done = unreadable = 0
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        for manifest in corpus:
            for start in range(0, manifest.num_rows, 1000):
                rows = manifest.slice(start, 1000).to_pylist()
                found = [
                    {
                        "id": int.from_bytes(digest[:8], "big", signed=True),
                        "digest": digest,
                        "image": row["id"],
                        "uri": row["uri"],
                    }
                    for row, digest in zip(rows, pool.map(_digest, rows), strict=True)
                    if digest is not None
                ]
                contents.add(pa.Table.from_pylist(found, schema=_CONTENTS))
                done += len(rows)
                unreadable += len(rows) - len(found)
                progress(done)
    copies = Spill(_COPIES)
    for span in spans(contents.rows):
        copies.add(_copies(contents.read(span)))

    def left(rows: pa.Table) -> pa.Table:
        # A span that holds these rows; of few rows there are few copies.
        ids = rows["id"].to_numpy()
        if not copies.rows or not len(ids):
            return rows
        span = Span(int(keys(ids).min()), int(keys(ids).max()) + 1)
        return rows.filter(pa.array(~np.isin(ids, copies.read(span)["id"].to_numpy())))

    def pairs() -> Iterator[tuple[str, str]]:
        for span in spans(copies.rows):
            rows = copies.read(span)
            yield from zip(rows["uri"].to_pylist(), rows["equal_to"].to_pylist(), strict=True)

    return Distinct(corpus.some(left) if copies.rows else corpus, copies.rows, pairs, unreadable)


def _copies(contents: pa.Table) -> pa.Table:
    """The images of a span of contents that are equal to one before them."""
    first: dict[bytes, str] = {}
    found = []
    for row in contents.to_pylist():
        original = first.setdefault(row["digest"], row["uri"])
        if original is not row["uri"]:
            found.append({"id": row["image"], "uri": row["uri"], "equal_to": original})
    return pa.Table.from_pylist(found, schema=_COPIES)


def _digest(row: dict[str, object]) -> bytes | None:
    start, length = row.get("offset"), row.get("length")
    assert start is None or isinstance(start, int)
    assert length is None or isinstance(length, int)
    try:
        return digest(str(row.get(ADDRESS) or row["uri"]), start=start or 0, length=length)
    except ImageError:
        return None
