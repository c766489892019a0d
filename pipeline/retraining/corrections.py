"""What people say of the labels of a retraining, as a tick believes it.

Corrections lie beside the table that people reviewed, and a champion labels into tables of its own. So a tick
gathers those of all tables of the retraining, the latest of each image, into its own folder, where they stay
as they were: people may go on while it trains, and what a model was made from can be looked up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from pipeline.files.storage import Storage
from pipeline.review.saving import SCHEMA
from pipeline.table.committed import write_part
from pipeline.table.corrections import CORRECTIONS_DIR
from pipeline.table.labels import iter_batches
from pipeline.table.record import find_table_record, write_table_record

FROZEN: Final = "corrections"
"""In the folder of a tick."""
_ROWS = 256


def freeze(tables: Sequence[Storage], place: Storage) -> int:
    """Copy what people say of tables to one place, in which nothing else may be.

    Args:
        tables: label tables of the same classes; of equally old corrections of an image, that of the later
            table counts. Corrections with other classes than those of the last are left out.
        place: where to.

    Returns:
        The number of corrections.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    place.delete()
    found = [table.child(CORRECTIONS_DIR) for table in tables]
    records = [(storage, find_table_record(storage)) for storage in found]
    there = [(storage, record) for storage, record in records if record and record.source == "human"]
    if not there:
        return 0
    last = there[-1][1]
    sources = [
        storage
        for storage, record in there
        if (record.ontology.names, record.ontology.ignore_index)
        == (last.ontology.names, last.ontology.ignore_index)
    ]
    latest: dict[int, tuple[str, int]] = {}
    for number, storage in enumerate(sources):
        for batch in iter_batches(storage, ["id", "reviewed"], batch_size=65_536):
            for row in batch.to_pylist():
                said = (row["reviewed"] or "", number)
                latest[row["id"]] = max(latest.get(row["id"], said), said)
    for number, storage in enumerate(sources):
        wanted = np.array(sorted(row_id for row_id, (_, of) in latest.items() if of == number), np.int64)
        waiting: list[pa.RecordBatch] = []
        for batch in iter_batches(storage, SCHEMA.names, batch_size=_ROWS):
            waiting.append(batch.filter(pa.array(np.isin(batch["id"].to_numpy(), wanted))))
            if sum(map(len, waiting)) >= _ROWS:
                _write(place, waiting)
        _write(place, waiting)
    write_table_record(place, last)
    return len(latest)


def _write(place: Storage, waiting: list[pa.RecordBatch]) -> None:
    rows = pa.Table.from_batches(waiting, SCHEMA)
    waiting.clear()
    if len(rows):
        write_part(place, rows)
