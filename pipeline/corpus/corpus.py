"""A manifest of any size: its images in partitions, by ranges of their ids.

A corpus of up to ``PARTITION`` images has one partition, in the order of its source. A larger one has as many
as it takes; each holds the images of a range of ids, by ascending unsigned id. Every step over a corpus reads
one partition at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.spill import ALL, PARTITION, Span, keys, spans

ADDRESS: Final = "address"
"""Column of a manifest in memory, if any address is signed: where to fetch from."""

Read = Callable[[Span], pa.Table]


class Corpus:
    """Images with ids, read by spans.

    Args:
        read: gives the rows of any span, as the module says.
        partitions: spans in which it is read; they divide all ids.
        num_rows: number of images; counted if it is not given.
        signed: whether any address is signed.
    """

    def __init__(
        self, read: Read, partitions: Sequence[Span], num_rows: int | None = None, *, signed: bool = False
    ) -> None:
        self.read = read
        self.partitions = list(partitions)
        self.signed = signed
        self.num_rows = sum(len(rows) for rows in self) if num_rows is None else num_rows

    def __iter__(self) -> Iterator[pa.Table]:
        return (self.read(span) for span in self.partitions)

    @classmethod
    def of(cls, rows: pa.Table) -> Corpus:
        """A corpus of a manifest in memory, which has one partition."""
        return cls(lambda span: within(rows, span), [ALL], rows.num_rows, signed=ADDRESS in rows.column_names)

    def table(self) -> pa.Table:
        """All images: for those who need them at once."""
        return (
            self.read(ALL) if len(self.partitions) == 1 else pa.concat_tables(self, promote_options="default")
        )

    def digest(self) -> str:
        """SHA-256 of all ids in ascending order, as little-endian int64."""
        digest = hashlib.sha256()
        half = len(self.partitions) // 2
        for span in [*self.partitions[half:], *self.partitions[:half]]:  # ids are signed
            digest.update(np.sort(self.read(span)["id"].to_numpy()).astype("<i8").tobytes())
        return digest.hexdigest()

    def some(self, choose: Callable[[pa.Table], pa.Table]) -> Corpus:
        """Those images that a function leaves of each span, which must not depend on where spans are cut."""
        kept = Corpus(lambda span: choose(self.read(span)), self.partitions, signed=self.signed)
        if len(self.partitions) > 1 and kept.num_rows <= PARTITION:
            return Corpus.of(kept.table())
        return kept

    def extended(self, found: Corpus) -> Corpus:
        """This corpus, and behind it what another has besides."""

        def read(span: Span) -> pa.Table:
            before, more = self.read(span), found.read(span)
            new = more.filter(pa.array(~np.isin(more["id"].to_numpy(), before["id"].to_numpy())))
            return pa.concat_tables([before, new], promote_options="default")

        return Corpus(read, spans(self.num_rows + found.num_rows), signed=self.signed or found.signed)


def within(rows: pa.Table, span: Span) -> pa.Table:
    """The rows of a span, in their order."""
    if span == ALL:
        return rows
    ids: npt.NDArray[np.uint64] = keys(rows["id"].to_numpy())
    inside = ids >= np.uint64(span.first)
    if span.end < ALL.end:
        inside &= ids < np.uint64(span.end)
    return rows.filter(pa.array(inside))
