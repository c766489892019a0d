"""Rows with ids, more of them than fit into memory: sorted runs on the local disk, read by ranges of ids.

Ids are hashes, so a range of them holds a share of the rows that is known beforehand. What is done one range
after the other (removing duplicates, comparing with a table) needs the memory of one range alone.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

ROWS_AT_ONCE: Final = 1 << 19
"""Rows that are held in memory before they are written to a run."""
PARTITION: Final = 100_000
"""Most ids of a partition, on average over the partitions of a corpus."""
_IDS: Final = 1 << 64


class Span(NamedTuple):
    """A range of ids as unsigned 64-bit numbers: ``first`` and the first one behind it."""

    first: int
    end: int


ALL: Final = Span(0, _IDS)


def spans(count: int, most: int = PARTITION) -> list[Span]:
    """Ranges of equal width that divide all ids: the smallest power of two with at most ``most`` ids each.

    Args:
        count: number of ids.
        most: ids of a range, on average.
    """
    bits = 0
    while count > most << bits:
        bits += 1
    width = _IDS >> bits
    return [Span(number * width, (number + 1) * width) for number in range(1 << bits)]


def keys(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Ids as the unsigned numbers by which spans are cut, without a copy."""
    return ids.view(np.uint64)


class Spill:
    """A table that grows by pieces and is read by spans.

    Its temporary files are in the folder for temporary files (``TMPDIR``) and go with it.

    Args:
        schema: of the rows; the column ``id`` is int64.
        rows_at_once: rows that are held in memory.
    """

    def __init__(self, schema: pa.Schema, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self.rows = 0
        self._schema = schema
        self._rows_at_once = rows_at_once
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._run: pa.Table | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._files: list[Path] = []

    def add(self, rows: pa.Table) -> None:
        """Add rows, in any order."""
        if self._run is not None:
            self._waiting, self._run = [self._run], None
        self._waiting.append(rows)
        self._waiting_rows += rows.num_rows
        self.rows += rows.num_rows
        if self._waiting_rows >= self._rows_at_once:
            self._write(self._sorted(self._waiting))
            self._waiting, self._waiting_rows = [], 0

    def read(self, span: Span = ALL) -> pa.Table:
        """The rows of a span, by ascending unsigned id; rows with one id are in the order of ``add``."""
        if self._run is None and self._waiting:
            self._run, self._waiting = self._sorted(self._waiting), []
        found = []
        for path in self._files:
            with pa.memory_map(str(path)) as source:
                rows = _within(pa.ipc.open_file(source).read_all(), span)
                # A copy: a slice would keep the pages of the file in memory.
                found.append(rows.take(pa.array(np.arange(rows.num_rows))))
        if self._run is not None:
            found.append(_within(self._run, span))
        return found[0] if len(found) == 1 else self._sorted(found)

    def _sorted(self, tables: list[pa.Table]) -> pa.Table:
        rows = pa.concat_tables([self._schema.empty_table(), *tables]).combine_chunks()
        order = np.argsort(keys(rows["id"].to_numpy()), kind="stable")
        return rows.take(pa.array(order)).combine_chunks()

    def _write(self, rows: pa.Table) -> None:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="maskmill-ids-")
        path = Path(self._folder.name) / f"{len(self._files)}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, self._schema) as writer:
            writer.write_table(rows)
        self._files.append(path)


def _within(rows: pa.Table, span: Span) -> pa.Table:
    if not rows.num_rows:
        return rows
    found = keys(rows["id"].to_numpy())
    first = int(np.searchsorted(found, np.uint64(span.first)))
    end = len(found) if span.end >= _IDS else int(np.searchsorted(found, np.uint64(span.end)))
    return rows.slice(first, end - first)
