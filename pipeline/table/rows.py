"""Single rows of a label table, found by id and read on demand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.files.storage import Storage
from pipeline.table.changed import Images
from pipeline.table.labels import iter_batches, open_part, table_files

MANIFESTS = "manifest"
"""Folder of a table in which labelling keeps its manifests."""


@dataclass(frozen=True)
class Place:
    """Where a row is: the file, relative to the folder of the table's files, and its number there."""

    file: str
    row: int


def find_rows(table: Storage | str, ids: Iterable[int]) -> dict[int, Place]:
    """Where the rows with these ids are; reads the ids of the whole table, a file at a time.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    storage, files = table_files(table)
    wanted = np.unique(np.fromiter(ids, np.int64))
    found: dict[int, Place] = {}
    for file in files:
        start = 0
        for batch in iter_batches(storage, ["id"], batch_size=65_536, names=[file]):
            there = batch["id"].to_numpy()
            for at in np.flatnonzero(np.isin(there, wanted)).tolist():
                found[int(there[at])] = Place(file, start + at)
            start += len(there)
    return found


def read_row(folder: Storage, place: Place, columns: Sequence[str]) -> dict[str, Any]:
    """Some columns of one row; reads only its row group, a few rows at a time.

    Args:
        folder: of the table's files, from ``pipeline.table.labels.table_files``.
        place: of the row.
        columns: those to read.

    Raises:
        MaskMillError: ``table_damaged``.
        IndexError: the file has become shorter.
    """
    with open_part(folder, place.file, columns) as file:
        present = [name for name in columns if name in file.schema_arrow.names]
        group, row = _group_of(file, place.row)
        for batch in file.iter_batches(16, row_groups=[group], columns=present, use_threads=False):
            if row < batch.num_rows:
                found: dict[str, Any] = batch.slice(row, 1).to_pylist()[0]
                return dict.fromkeys(columns) | found
            row -= batch.num_rows
    raise IndexError(place)


def _group_of(file: pq.ParquetFile, row: int) -> tuple[int, int]:
    """Row group, and row in it."""
    for group in range(file.num_row_groups):
        count = file.metadata.row_group(group).num_rows
        if row < count:
            return group, row
        row -= count
    raise IndexError(row)


def images_of(table: Storage, ids: Iterable[int]) -> Images:
    """Where the images of some rows lie, by the manifests that labelling keeps beside the table.

    Args:
        table: the output of a labelling run.
        ids: of the rows.
    """
    wanted = pa.array(sorted(set(ids)), pa.int64())
    found = []
    for name in table.list(MANIFESTS):
        if not name.endswith(".parquet"):
            continue
        with (
            table.arrow_filesystem().open_input_file(table.path(name)) as source,
            pq.ParquetFile(source) as file,
        ):
            if not {"id", "offset", "length"} <= set(file.schema_arrow.names):
                continue
            for batch in file.iter_batches(65_536, columns=["id", "offset", "length"]):
                found.append(pa.table(batch).filter(pc.is_in(batch["id"], wanted)))
    return Images(pa.concat_tables(found) if found else None)
