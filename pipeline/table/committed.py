"""Parts of a label table: writing them, listing what is done, and cleaning up after a crash.

A part is a Parquet file in ``labels/``, named after its ids and written atomically. If Ray retries a task, it
writes the same file again. An image is done when a part has its id. Only temporary files can be incomplete.
Two parts share an id only if a run continued after losing its lease, or if a retried task could read other
images than before and split its parts elsewhere; ``done_ids`` removes the second row.

Tables from older versions have a folder ``checkpoint/``, in which ``X.pending.parquet`` marks parts
``labels/X-N.parquet`` that may be incomplete.
"""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged
from pipeline.files.faults import says_damage
from pipeline.files.storage import Storage

CHECKPOINT_DIR = "checkpoint"
LABELS_DIR = "labels"
_PENDING = ".pending.parquet"
_SUFFIX = ".parquet"


def part_name(ids: np.ndarray) -> str:
    """File name of the part with these ids, int64 (n,), in any order."""
    digest = hashlib.sha256(np.sort(ids).astype("<i8").tobytes()).hexdigest()
    return f"part-{digest[:32]}{_SUFFIX}"


def write_part(storage: Storage, rows: pa.Table) -> None:
    """Write rows of ``pipeline.table.labels.LABEL_SCHEMA`` as a part, atomically."""
    buffer = io.BytesIO()
    pq.write_table(rows, buffer)
    storage.write_bytes(f"{LABELS_DIR}/{part_name(rows['id'].to_numpy())}", buffer.getvalue())


def discard_leftovers(storage: Storage) -> int:
    """Delete what killed runs left incomplete. Call only while holding the lease.

    Returns:
        Number of discarded parts, whose images will be labelled again.
    """
    discarded = 0
    for name in storage.list(LABELS_DIR):
        # See ``Storage.write_bytes``.
        if name.rpartition("/")[2].startswith(".") and name.endswith(".tmp"):
            storage.delete(name)
            discarded += 1
    pending = [name for name in storage.list(CHECKPOINT_DIR) if name.endswith(_PENDING)]
    for mark in pending:
        stem = mark.rpartition("/")[2].removesuffix(_PENDING)
        for part in part_files(storage):
            if part.removesuffix(_SUFFIX).rpartition("-")[0] == f"{LABELS_DIR}/{stem}":
                storage.delete(part)
        # Delete the mark last, so that a crash before this point repeats the cleanup.
        storage.delete(mark)
    return discarded + len(pending)


def done_ids(storage: Storage) -> np.ndarray:
    """Sorted ids of all images with a row, int64 (n,). Call only while holding the lease.

    Duplicate rows are removed from the table.

    Raises:
        MaskMillError: ``table_damaged`` if a part cannot be read.
    """
    parts = part_files(storage)
    # There may be many small files, and each costs a round trip on an object store.
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda part: _read(storage, part, ["id"])["id"].to_numpy(), parts))
    ids, first = np.unique(np.concatenate([np.empty(0, np.int64), *found]), return_index=True)
    start = 0
    for part, each in zip(parts, found, strict=True):
        keep = np.isin(np.arange(start, start + len(each)), first)
        start += len(each)
        if not keep.all():
            # Write before deleting: a crash in between leaves duplicates again but loses nothing.
            if keep.any():
                write_part(storage, _read(storage, part).filter(pa.array(keep)))
            storage.delete(part)
    return ids


def part_files(storage: Storage) -> list[str]:
    """Sorted names of all parts, relative to the output."""
    names = storage.list(LABELS_DIR)
    return [name for name in names if name.endswith(_SUFFIX) and name.rpartition("/")[2][0] not in "._"]


def _read(storage: Storage, part: str, columns: list[str] | None = None) -> pa.Table:
    try:
        return pq.read_table(storage.path(part), columns=columns, filesystem=storage.arrow_filesystem())
    except (OSError, pa.ArrowException) as error:
        if not says_damage(error):
            raise
        raise Damaged(
            "table_damaged",
            f"{storage.uri_of(part)} cannot be read: {error}",
            "Move the file away; its images will then be labelled again.",
        ) from error
