"""A part of an export: its files, and its mark."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.files.faults import explain
from pipeline.files.images import use_one_thread
from pipeline.formats.base import Loss, Sample
from pipeline.formats.marks import Mark, files_of, write_mark
from pipeline.formats.outbox import Outbox, Writes
from pipeline.formats.plan import Plan
from pipeline.formats.record import Export
from pipeline.formats.samples import LeftOut, samples_of


@dataclass
class PartCounts:
    """What is in a part; adds up.

    Attributes:
        images: by split.
        left_out: by reason.
        lost: by the format.
    """

    images: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    lost: Loss = field(default_factory=Loss)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.images.total() + self.left_out.total()

    def add(self, other: PartCounts) -> None:
        """Add those of another part."""
        self.images.update(other.images)
        self.left_out.update(other.left_out)
        self.lost.add(other.lost)


def write_part(
    name: str,
    *,
    export: Export,
    plan: Plan,
    fence: Callable[[], None] = lambda: None,
    sync: bool = False,
) -> PartCounts:
    """Write a part and its mark.

    Args:
        name: of the part.
        export: what is asked for.
        plan: of the export.
        fence: called before the mark is put in place; raises if the lease was lost.
        sync: make sure of small files too. Without it, ``finish`` does, on the same machine.

    Raises:
        MaskMillError: ``table_damaged``; what the storage says.
    """
    use_one_thread()
    part, counts = plan.parts[name], PartCounts()
    left_out: list[LeftOut] = []
    splits: list[str] = []
    lines: list[bytes] = []
    source = replace(export.source, table=plan.table)

    def samples() -> Iterator[Sample]:
        first = part.first
        for file in part.files:
            for sample in samples_of(
                source, file.name, first, plan.namings[part.generation], left_out.append
            ):
                splits.append(sample.split)
                yield sample
            first += file.rows

    try:
        stale = files_of(export.output, name)
        with Writes(export.output, sync=sync) as writes:
            output = Outbox.of(export.output, writes)
            for written in export.format.write_part(name, samples(), export.ontology, output):
                lines.append(_line(written.entry))
                counts.lost.add(written.lost)
        assert len(lines) == len(splits), "a format yields one result a sample"
        counts.images.update(splits)
        counts.left_out.update(row.reason for row in left_out)
        head = Mark(
            file=part.files[0].name,
            version=part.version,
            images=dict(counts.images),
            left_out=tuple(left_out),
            lost=counts.lost,
            files=tuple(writes.names),
            sums=tuple(writes.sums),
        )
        fence()
        for file in set(stale) - set(writes.names):
            export.output.delete(file)
        write_mark(export.output, name, head, lines)
    except OSError as error:
        # Told here, while the error still knows its path.
        raise explain(error, export.output.uri) or error from error
    return counts


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
