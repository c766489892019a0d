"""What is done, and what a crash left half-done, beside a label table.

Ray Data writes each part of the table in two phases: ``checkpoint/X.pending.parquet`` with the ids, then
``labels/X-0.parquet`` with the rows, then it renames the first to ``checkpoint/X.parquet``. Everything here
works on those names, without Ray, so that a run with nothing to do need not start a cluster.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged
from pipeline.files.storage import Storage

CHECKPOINT_DIR = "checkpoint"
LABELS_DIR = "labels"
_PENDING = ".pending.parquet"
_SUFFIX = ".parquet"


@dataclass(frozen=True)
class Recovery:
    """What ``recover`` put right.

    Attributes:
        parts_discarded: half-written parts that were removed; their images will be labelled again.
        parts_forgotten: checkpoints whose part of the table is missing; likewise.
        parts_adopted: parts of the table that had lost their checkpoint and got it back.
    """

    parts_discarded: int = 0
    parts_forgotten: int = 0
    parts_adopted: int = 0


def recover(storage: Storage) -> Recovery:
    """Bring table and checkpoint to agree after a crash. Call only while holding the lease.

    Three states can be left behind: a part still pending (the crash hit between the phases, or during the
    retry of a task that had already committed: then both names exist, and the part may be torn), a
    checkpoint without its part (somebody deleted a file), a part without checkpoint (somebody deleted that).

    Raises:
        MaskMillError: ``table_damaged`` if a part without checkpoint cannot be read.
    """
    checkpoints = _names(storage, CHECKPOINT_DIR)
    parts = _names(storage, LABELS_DIR)
    pending = {name.removesuffix(_PENDING) for name in checkpoints if name.endswith(_PENDING)}
    committed = {name.removesuffix(_SUFFIX) for name in checkpoints if not name.endswith(_PENDING)}

    for part in parts:
        if _stem(part) in pending:
            storage.delete(f"{LABELS_DIR}/{part}")
    # The part goes first, then the commit, the pending mark last: a crash in here repeats from the start.
    for stem in pending & committed:
        storage.delete(f"{CHECKPOINT_DIR}/{stem}{_SUFFIX}")
    for stem in pending:
        storage.delete(f"{CHECKPOINT_DIR}/{stem}{_PENDING}")

    stems = {_stem(part) for part in parts} - pending
    forgotten = committed - pending - stems
    for stem in forgotten:
        storage.delete(f"{CHECKPOINT_DIR}/{stem}{_SUFFIX}")
    adopted = stems - committed
    for stem in adopted:
        _adopt(storage, stem, [part for part in parts if _stem(part) == stem])
    return Recovery(len(pending), len(forgotten), len(adopted))


def done_ids(storage: Storage) -> np.ndarray:
    """Ids of all committed rows, sorted: int64 (n,)."""
    names = [name for name in _names(storage, CHECKPOINT_DIR) if not name.endswith(_PENDING)]
    if not names:
        return np.empty(0, np.int64)
    filesystem = storage.arrow_filesystem()

    def read(name: str) -> np.ndarray:
        path = storage.path(f"{CHECKPOINT_DIR}/{name}")
        return pq.read_table(path, columns=["id"], filesystem=filesystem)["id"].to_numpy()

    # Many small files; on an object store each costs a round trip.
    with ThreadPoolExecutor(16) as pool:
        return np.sort(np.concatenate(list(pool.map(read, names))))


def _adopt(storage: Storage, stem: str, parts: list[str]) -> None:
    filesystem = storage.arrow_filesystem()
    try:
        tables = [
            pq.read_table(storage.path(f"{LABELS_DIR}/{part}"), columns=["id"], filesystem=filesystem)
            for part in parts
        ]
    except (OSError, pa.ArrowException) as error:
        raise Damaged(
            "table_damaged",
            f"{storage.uri}/{LABELS_DIR}: {', '.join(parts)} cannot be read and has no checkpoint: {error}",
            "Move the file away; its images will then be labelled again.",
        ) from error
    filesystem.create_dir(storage.path(CHECKPOINT_DIR), recursive=True)
    pq.write_table(
        pa.concat_tables(tables),
        storage.path(f"{CHECKPOINT_DIR}/{stem}{_SUFFIX}"),
        filesystem=filesystem,
    )


def _names(storage: Storage, folder: str) -> list[str]:
    return [name.rpartition("/")[2] for name in storage.list(folder) if name.endswith(_SUFFIX)]


def _stem(part: str) -> str:
    """``X-0.parquet`` belongs to checkpoint ``X``."""
    return part.removesuffix(_SUFFIX).rsplit("-", 1)[0]
