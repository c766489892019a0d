"""The last stage: maps become rows of the label table, in files that are put in place whole."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.files.faults import explain
from pipeline.files.logs import run_log
from pipeline.files.storage import Storage
from pipeline.labelling.labeller import label_dtype
from pipeline.labelling.stages.columns import SPENT, WRITTEN
from pipeline.table import labels
from pipeline.table.committed import LABELS_DIR, RELABELLED_DIR, write_part
from pipeline.table.lease import refuse_other_holder
from pipeline.table.statistics import QualityScore, quality_of

FILE_BYTES = 16 << 20
"""A file of the table need not be larger."""


class Write:
    """Raw maps → a committed part of the label table, and one row of statistics.

    Args:
        storage: the output.
        run_id: this run, which must still hold the lease of the output.
        ignore_index: id of uncertain pixels.
        num_classes: C, including background.
        score: what the column ``quality`` of the table holds.
        replacing: ids of rows that are in the table, int64 (n,). Their new rows wait in ``relabelled/``.
    """

    def __init__(
        self,
        storage: Storage,
        run_id: str,
        *,
        ignore_index: int,
        num_classes: int,
        score: QualityScore = "classes",
        replacing: npt.NDArray[np.int64] | None = None,
    ) -> None:
        self.storage = storage
        self.run_id = run_id
        self.ignore_index = ignore_index
        self._score = score
        self._replacing = np.empty(0, np.int64) if replacing is None else replacing
        self._dtype = label_dtype(num_classes)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode and commit; see ``commit``."""
        return self.commit(self.encode(table))

    def encode(self, table: pa.Table) -> pa.Table:
        """Rows of the label table, and in columns of their own what they took."""
        start = time.perf_counter()
        rows = pa.Table.from_pylist([self._row(row) for row in table.to_pylist()], schema=labels.LABEL_SCHEMA)
        each = (time.perf_counter() - start) / max(1, rows.num_rows)
        for name in SPENT[:-1]:
            rows = rows.append_column(name, table[name].combine_chunks())
        return rows.append_column(SPENT[-1], pa.array([each] * rows.num_rows, pa.float32()))

    def commit(self, table: pa.Table) -> pa.Table:
        """Write rows from ``encode`` to as many files as ``FILE_BYTES`` asks for.

        Returns:
            One row of statistics.

        Raises:
            MaskMillError: ``output_in_use`` if another run has taken over the lease; what the storage says.
        """
        start = time.perf_counter()
        rows = table.select(labels.LABEL_SCHEMA.names)
        old = np.isin(rows["id"].to_numpy(), self._replacing)
        try:
            refuse_other_holder(self.storage, self.run_id)
            for folder, chosen in ((LABELS_DIR, ~old), (RELABELLED_DIR, old)):
                if chosen.any():
                    # ``filter`` copies the maps.
                    part = rows if chosen.all() else rows.filter(pa.array(chosen))
                    for piece in _files(part):
                        write_part(self.storage, piece, folder)
        except OSError as error:
            # Told here, while the error still knows its path.
            raise explain(error, self.storage.uri) or error from error
        write_s = time.perf_counter() - start
        spent = {name: sum(table[name].to_pylist()) for name in SPENT}
        report: dict[str, Any] = {
            **spent,
            "done": rows.num_rows,
            "failures": [status for status in rows["status"].to_pylist() if status != labels.OK],
            "encode_s": spent["encode_s"] + write_s,
            "write_s": write_s,
            "written": rows.nbytes,
        }
        run_log(self.run_id).info("write: %d rows, %d failed", rows.num_rows, len(report["failures"]))
        return pa.Table.from_pylist([report], schema=WRITTEN)

    def _row(self, row: dict[str, Any]) -> dict[str, Any]:
        known = {name: row[name] for name in ("id", "uri", "sha256", "height", "width", "version")}
        if row["status"] != labels.OK:
            return labels.failed_row(**known, status=row["status"], error=row["error"])
        if row.get("maps") is not None:
            found = quality_of(row["segments"]) if self._score == "classes" else row["softmin"]
            return labels.encoded_row(**known, **row["maps"], segments=row["segments"], quality=found)
        shape = row["height"], row["width"]
        return labels.ok_row(
            **known,
            labels=np.frombuffer(row["labels"], self._dtype).reshape(shape),
            confidence=np.frombuffer(row["confidence"], np.uint8).reshape(shape),
            ignore_index=self.ignore_index,
            agreement=row["segment_agreement"],
            score=self._score,
        )


def _files(rows: pa.Table) -> Iterator[pa.Table]:
    """Cut rows into pieces of at least ``FILE_BYTES``, or all of them."""
    size = rows.nbytes / rows.num_rows
    count = max(1, int(rows.nbytes // FILE_BYTES))
    if count == 1:
        yield rows
        return
    step = math.ceil(max(FILE_BYTES / size, rows.num_rows / count))
    for start in range(0, rows.num_rows, step):
        yield rows.slice(start, step)
