"""Compare the images of a large table with those that were labelled, in memory that does not grow with them.

Where an image lies in a tar archive, or how its address is signed, only the manifest knows. So rows and
manifest are read partition by partition, and a piece of both goes to whoever reads the images.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.corpus import Corpus
from pipeline.corpus.spill import Spill
from pipeline.files.storage import Storage
from pipeline.table.changed import COLUMNS, Images
from pipeline.table.labels import LABEL_SCHEMA, iter_batches
from pipeline.table.verify import Problem, image_problems

PIECE = 1024
"""Rows that are handed over together."""
_SCHEMA = pa.schema([*(LABEL_SCHEMA.field(name) for name in COLUMNS), ("part", pa.string())])


@dataclass(frozen=True)
class Piece:
    """Rows whose images are to be compared.

    Attributes:
        rows: ``COLUMNS`` and ``part``, the name of the file.
        manifest: the rows of the manifest with these ids.
    """

    rows: pa.Table
    manifest: pa.Table

    def __str__(self) -> str:
        return f"{self.rows['part'][0]} and others"


def pieces(storage: Storage, parts: Sequence[str], corpus: Corpus) -> Iterator[Piece]:
    """Yield all rows of some parts, by ranges of their ids.

    Args:
        storage: the table.
        parts: names of files that can be read.
        corpus: its images.
    """
    spill = Spill(_SCHEMA)
    for part in parts:
        with contextlib.suppress(FileNotFoundError):  # a run that is at work may take parts away
            for batch in iter_batches(storage, COLUMNS, batch_size=65_536, names=[part]):
                spill.add(pa.table(batch).append_column("part", pa.array([part] * batch.num_rows)))
    for span in corpus.partitions:
        rows, manifest = spill.read(span), corpus.read(span)
        for start in range(0, rows.num_rows, PIECE):
            some = rows.slice(start, PIECE)
            yield Piece(some, manifest.filter(pc.is_in(manifest["id"], some["id"])))


def compare(piece: Piece) -> list[Problem]:
    """Read the images of a piece again; what has become of them, but for those that are the same."""
    images = Images(piece.manifest)
    return [problem for row in piece.rows.to_pylist() for problem in image_problems(row["part"], row, images)]
