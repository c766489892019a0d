"""Which part of a label table has which image, in memory that does not grow with the table."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.spill import PARTITION, ROWS_AT_ONCE, Span, Spill, spans

Ids = npt.NDArray[np.int64]


_SCHEMA = pa.schema([("id", pa.int64()), ("part", pa.int32())])


class PartIndex:
    """The ids of parts. Those of a large table are in a temporary file, sorted.

    Args:
        rows_at_once: ids that are held in memory.
    """

    def __init__(self, rows_at_once: int = ROWS_AT_ONCE) -> None:
        self._spill = Spill(_SCHEMA, rows_at_once)
        self._numbers: dict[str, int] = {}
        self._names: list[str] = []
        self._gone: list[int] = []
        self.rows = 0

    def add(self, part: str, ids: Ids) -> None:
        """Add a part."""
        number = len(self._names)
        self._numbers[part] = number
        self._names.append(part)
        self.rows += len(ids)
        parts = np.full(len(ids), number, np.int32)
        self._spill.add(pa.table([pa.array(ids, pa.int64()), pa.array(parts)], schema=_SCHEMA))

    def remove(self, part: str, rows: int) -> None:
        """Forget a part that has this number of rows."""
        self._gone.append(self._numbers.pop(part))
        self.rows -= rows

    def __contains__(self, part: str) -> bool:
        return part in self._numbers

    def __bool__(self) -> bool:
        return bool(self._numbers)

    @property
    def parts(self) -> list[str]:
        """Names of the parts whose ids it has."""
        return list(self._numbers)

    @property
    def spans(self) -> list[Span]:
        """Spans in which all ids are read in bounded memory."""
        return spans(self._spill.rows, max(PARTITION, ROWS_AT_ONCE))

    def read(self, span: Span) -> tuple[Ids, npt.NDArray[np.int32]]:
        """Ids of a span by ascending unsigned id, int64 (n,), and the numbers of their parts, int32 (n,)."""
        rows = self._spill.read(span)
        ids, parts = rows["id"].to_numpy(), rows["part"].to_numpy()
        if not self._gone:
            return ids, parts
        stays = ~np.isin(parts, self._gone)
        return ids[stays], parts[stays]

    def ids(self, span: Span) -> Ids:
        """Ids of a span, int64 (n,)."""
        return self.read(span)[0]

    def has(self, ids: Ids, span: Span) -> npt.NDArray[np.bool_]:
        """Which of some ids of a span have a row, bool (n,)."""
        found = np.zeros(len(ids), np.bool_)
        for piece in self.spans:
            inside = Span(max(piece.first, span.first), min(piece.end, span.end))
            if inside.first < inside.end:
                found |= np.isin(ids, self.ids(inside))
        return found

    def names(self, numbers: npt.NDArray[np.int32]) -> list[str]:
        """Names of parts by their numbers."""
        return [self._names[number] for number in np.unique(numbers).tolist()]

    def of(self, parts: Iterable[str]) -> dict[str, Ids]:
        """All ids of some parts, int64 (n,), by ascending unsigned id."""
        wanted = sorted(parts)
        found: dict[str, list[Ids]] = {part: [np.empty(0, np.int64)] for part in wanted}
        for span in self.spans if wanted else ():
            ids, numbers = self.read(span)
            for part in wanted:
                found[part].append(ids[numbers == self._numbers[part]])
        return {part: np.concatenate(pieces) for part, pieces in found.items()}

    def repeated(self) -> list[str]:
        """Parts that share an id with another one, or have one twice."""
        found: set[str] = set()
        for span in self.spans:
            ids, parts = self.read(span)
            again = np.flatnonzero(ids[1:] == ids[:-1])
            found.update(self.names(np.concatenate([parts[again], parts[again + 1]])))
        return sorted(found)

    def where(self, wanted: Ids) -> dict[str, Ids]:
        """Which of some ids each part has; parts without any are left out."""
        if not len(wanted):
            return {}
        found: dict[str, list[Ids]] = {}
        for span in self.spans:
            ids, parts = self.read(span)
            hit = np.isin(ids, wanted)
            ids, parts = ids[hit], parts[hit]
            for number in np.unique(parts).tolist():
                found.setdefault(self._names[number], []).append(ids[parts == number])
        return {part: np.concatenate(pieces) for part, pieces in sorted(found.items())}
