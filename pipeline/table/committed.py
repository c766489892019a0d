"""Parts of a label table: writing them, listing what is done, and cleaning up after a crash.

A part is a Parquet file in ``labels/``, named after its ids and written atomically. If Ray retries a task, it
writes the same file again. An image is done when a part has its id. Only temporary files can be incomplete.
Two parts share an id only if a run continued after losing its lease, if a retried task could read other
images than before and split its parts elsewhere, or if somebody copied a file; ``settle`` takes the second
row out.

A row is replaced by rewriting its part: the ids stay, so the name stays, and one atomic write puts the new
row in the place of the old one. No reader sees both, or neither. New rows wait in ``relabelled/`` until
``apply_relabelled`` has done that; after a kill the next run does it, or does it again.

Nothing that may be of use is deleted: files that cannot be trusted are moved to ``set_aside/``.

Tables from older versions have a folder ``checkpoint/``, in which ``X.pending.parquet`` marks parts
``labels/X-N.parquet`` that may be incomplete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged
from pipeline.files.status import STATUS_FILE
from pipeline.files.storage import Storage
from pipeline.table.index import Ids, PartIndex
from pipeline.table.labels import DATASET_FILE, OK, REQUIRED_COLUMNS, Counts, iter_batches, open_part
from pipeline.table.lease import LEASE_FILE

CHECKPOINT_DIR = "checkpoint"
LABELS_DIR = "labels"
RELABELLED_DIR = "relabelled"
SET_ASIDE_DIR = "set_aside"
_PENDING = ".pending.parquet"
_HALF_WRITTEN = tuple(f".{name}." for name in (DATASET_FILE, LEASE_FILE, STATUS_FILE))
_SUFFIX = ".parquet"
_OLDER_NAME = re.compile(r".+_\d+-\d+\.parquet")
_READERS = 32
"""There may be many small files, and each costs a round trip on an object store."""
_READ_AHEAD = 4096


# --- parts ---


def part_name(ids: Ids) -> str:
    """File name of the part with these ids, int64 (n,), in any order."""
    digest = hashlib.sha256(np.sort(ids).astype("<i8").tobytes()).hexdigest()
    return f"part-{digest[:32]}{_SUFFIX}"


def write_part(storage: Storage, rows: pa.Table, folder: str = LABELS_DIR) -> str:
    """Write rows of ``pipeline.table.labels.LABEL_SCHEMA`` as a part, atomically; returns its name."""
    name = f"{folder}/{part_name(rows['id'].to_numpy())}"
    _write(storage, name, rows)
    return name


def part_files(storage: Storage, folder: str = LABELS_DIR) -> list[str]:
    """Sorted names of all parts, relative to the output."""
    names = storage.list(folder)
    return [name for name in names if name.endswith(_SUFFIX) and name.rpartition("/")[2][0] not in "._"]


def trust(part: str, ids: Ids) -> int:
    """How much a file looks like a part of ours, the smallest number most.

    0 if its name is that of its ids, 1 if older versions may have named it, 2 for any other name, such as
    that of a copy.
    """
    name = PurePosixPath(part).name
    return 0 if name == part_name(ids) else 1 if _OLDER_NAME.fullmatch(name) else 2


def read_part(storage: Storage, part: str, columns: list[str] | None = None) -> pa.Table:
    """Rows of a part.

    Raises:
        MaskMillError: ``table_damaged`` if it is no readable Parquet file with these columns; ``storage_*``.
    """
    filesystem = storage.arrow_filesystem()
    try:
        return _rows(
            pq.read_table(
                storage.path(part), columns=columns, filesystem=filesystem, page_checksum_verification=True
            ),
            columns,
        )
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException):
        # Arrow raises the same errors for a damaged file as for a storage that does not answer. The storage
        # explains its own faults.
        data = storage.read_bytes(part)
    try:
        source = pa.BufferReader(data)
        return _rows(pq.read_table(source, columns=columns, page_checksum_verification=True), columns)
    except (OSError, ValueError, pa.ArrowException) as error:
        why = " ".join(str(error).split()) if data else "it is empty"
        raise Damaged(
            "table_damaged",
            f"{storage.uri_of(part)} cannot be read: {why}",
            "Run maskmill verify with --repair, which sets it aside; its images are then labelled again.",
        ) from error


def _rows(table: pa.Table, columns: list[str] | None) -> pa.Table:
    lacking = [name for name in columns or ["id"] if name not in table.column_names]
    if lacking:
        raise ValueError(f"it has no column {', '.join(lacking)}")
    if "id" in table.column_names and (table["id"].type != pa.int64() or table["id"].null_count):
        raise ValueError("its ids are not 64-bit numbers")
    return table


def _write(storage: Storage, name: str, rows: pa.Table) -> None:
    """Put rows in place, with as few copies of the maps as can be: those of one image may have 2 GiB."""
    # The least and the greatest PNG say nothing, and finding them takes several copies of each.
    told = [column for column in rows.column_names if column not in ("mask", "confidence")]
    # By its name, since Arrow copies what it writes to a file of Python.
    with storage.new_file(name) as file, pa.OSFile(file.name, "wb") as sink:
        pq.write_table(
            rows,
            sink,
            compression="none",  # nearly all is PNG, which is compressed
            use_dictionary=["status", "error"],
            write_page_checksum=True,
            write_statistics=told,
        )


# --- before a run trusts a table ---


def discard_leftovers(storage: Storage) -> int:
    """Delete what killed runs left incomplete. Call only while holding the lease.

    Returns:
        Number of discarded parts, whose images will be labelled again.
    """
    discarded = 0
    for name in temporary_files(storage):
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


def temporary_files(storage: Storage) -> list[str]:
    """Names of files that a killed run left half-written; see ``Storage.write_bytes``."""
    if not storage.is_local:  # objects appear whole
        return []
    names = [name for folder in (LABELS_DIR, RELABELLED_DIR) for name in storage.list(folder)]
    names += [name for name in storage.list() if name.startswith(_HALF_WRITTEN)]
    return [name for name in names if name.rpartition("/")[2].startswith(".") and name.endswith(".tmp")]


def settle(
    storage: Storage,
    parts: Sequence[str] | None = None,
    *,
    notice: Callable[[str], None] = lambda _text: None,
) -> dict[str, Ids]:
    """Read the ids of all parts, and make sure that each is there once. Call only while holding the lease.

    Files that cannot be read are set aside, as are copies. Of rows with one id, that in the part with the
    most trustworthy name stays.

    Args:
        storage: the output.
        parts: look only at these; default: all.
        notice: told what was done.

    Returns:
        Ids by part, int64 (n,), in the order of its rows.
    """
    names = part_files(storage) if parts is None else list(parts)
    found = dict(_readable(storage, names, notice))
    for part, kept in _take_out_doubles(storage, found, notice):
        del found[part]
        found.update(kept)
    return found


def settle_index(storage: Storage, *, notice: Callable[[str], None] = lambda _text: None) -> PartIndex:
    """Do what ``settle`` does to all parts of a table, in memory that does not grow with it."""
    index = PartIndex()
    for part, ids in _readable(storage, part_files(storage), notice):
        index.add(part, ids)
    # Only these concern each other.
    repeated = index.of(index.repeated())
    for part, kept in _take_out_doubles(storage, repeated, notice):
        index.remove(part, len(repeated[part]))
        for name, ids in kept.items():
            index.add(name, ids)
    return index


def _readable(
    storage: Storage, names: Sequence[str], notice: Callable[[str], None]
) -> Iterator[tuple[str, Ids]]:
    """Yield parts and their ids, and set aside what cannot be read."""
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(names), _READ_AHEAD):  # ``map`` begins with all that it is given
            some = names[start : start + _READ_AHEAD]
            reads = pool.map(lambda part: _ids_or_error(storage, part), some)
            for part, read in zip(some, reads, strict=True):
                if isinstance(read, Damaged):
                    aside = set_aside(storage, part)
                    notice(f"{read.message.rstrip('.')}. It is now {aside}; its images are labelled again.")
                else:
                    yield part, read


def _take_out_doubles(
    storage: Storage, found: Mapping[str, Ids], notice: Callable[[str], None]
) -> Iterator[tuple[str, dict[str, Ids]]]:
    """Yield parts that repeat rows of others, and what took their place: a part with the rest, if any."""
    for part, keep in doubled(found).items():
        kept = found[part][keep]
        replaced = keep_rows(storage, part, kept)
        notice(f"{part} repeated {np.count_nonzero(~keep):,} rows of other files: taken out.")
        yield part, {replaced: kept} if replaced else {}


def _ids_or_error(storage: Storage, part: str) -> Ids | Damaged:
    # Opened once, and read in this thread: Arrow has few for what it reads by itself.
    with (
        contextlib.suppress(Damaged, OSError, ValueError, pa.ArrowException),
        open_part(storage, part, REQUIRED_COLUMNS) as file,
    ):
        found: Ids = _rows(file.read(["id"], use_threads=False), ["id"])["id"].to_numpy()
        return found
    try:
        ids: Ids = read_part(storage, part, ["id"])["id"].to_numpy()
        with open_part(storage, part, REQUIRED_COLUMNS):
            return ids
    except Damaged as error:
        return error


def read_ids(storage: Storage, parts: Sequence[str]) -> Ids:
    """Ids of all rows of some parts, int64 (n,).

    Raises:
        MaskMillError: ``table_damaged``.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda part: read_part(storage, part, ["id"])["id"].to_numpy(), parts)
        return np.concatenate([np.empty(0, np.int64), *found])


def count_parts(storage: Storage, parts: Sequence[str]) -> Counts:
    """Counts of all rows of some parts, which have no row in common.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    total = Counts()
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(parts), _READ_AHEAD):
            for counts in pool.map(functools.partial(_counts, storage), parts[start : start + _READ_AHEAD]):
                total.add(counts)
    return total


def _counts(storage: Storage, part: str) -> Counts:
    counts = Counts()
    for batch in iter_batches(storage, Counts.COLUMNS, batch_size=4096, names=[part]):
        counts.count(batch)
    return counts


def doubled(found: Mapping[str, Ids]) -> dict[str, npt.NDArray[np.bool_]]:
    """Which rows to keep, bool (n,), of the parts that repeat ids of others or of themselves."""
    order = sorted(found, key=lambda part: (trust(part, found[part]), part))
    ids = np.concatenate([np.empty(0, np.int64), *(found[part] for part in order)])
    first = np.zeros(len(ids), np.bool_)
    first[np.unique(ids, return_index=True)[1]] = True
    keep, start = {}, 0
    for part in order:
        here = first[start : start + len(found[part])]
        start += len(here)
        if not here.all():
            keep[part] = here
    return keep


def keep_rows(storage: Storage, part: str, kept: Ids) -> str | None:
    """Replace a part by one with some of its rows, and set the old one aside.

    Args:
        storage: the output.
        part: the old part.
        kept: ids to keep; the first row of each is kept.

    Returns:
        Name of the new part; None if no row is kept.
    """
    if not len(kept):
        set_aside(storage, part)
        return None
    storage.write_bytes(_place_aside(storage, part), storage.read_bytes(part))
    rows = read_part(storage, part)
    ids = rows["id"].to_numpy()
    first = np.zeros(len(ids), np.bool_)
    first[np.unique(ids, return_index=True)[1]] = True
    # Write before deleting: a crash in between doubles rows again, but loses none.
    new = write_part(storage, rows.filter(pa.array(first & np.isin(ids, kept))))
    if new != part:
        storage.delete(part)
    return new


def set_aside(storage: Storage, part: str) -> str:
    """Move a file out of the table, where it can be looked at; returns its new name."""
    place = _place_aside(storage, part)
    storage.move(part, place)
    return place


def _place_aside(storage: Storage, part: str) -> str:
    name = PurePosixPath(part)
    taken = set(storage.list(SET_ASIDE_DIR))
    places = (
        f"{SET_ASIDE_DIR}/{name.stem}{f'-{n}' if n else ''}{name.suffix}" for n in range(len(taken) + 1)
    )
    return next(place for place in places if place not in taken)


# --- replacing rows ---


class Replaced:
    """What ``apply_relabelled`` did.

    Attributes:
        removed, added: counts of the rows that went, and of those that came.
        kept: new rows that were not taken, by status: the old row has a label, and the image could not even
            be read this time.
        ids: of all of them, int64 (n,).
    """

    def __init__(self) -> None:
        self.removed, self.added = Counts(), Counts()
        self.kept: Counter[str] = Counter()
        self.ids: Ids = np.empty(0, np.int64)


def apply_relabelled(
    storage: Storage, index: PartIndex, *, fence: Callable[[], None] = lambda: None
) -> Replaced:
    """Put the rows of ``relabelled/`` in the place of the old rows of their images.

    Call only while holding the lease. It can be killed anywhere and called again.

    Args:
        storage: the output.
        index: of all parts; gets those that are added.
        fence: called before each write; raises if the lease was lost.
    """
    done = Replaced()
    staged: dict[str, Ids] = {}
    for name in part_files(storage, RELABELLED_DIR):
        ids = _ids_or_error(storage, name)
        if isinstance(ids, Damaged):
            set_aside(storage, name)
        else:
            staged[name] = ids
    record = storage.read_json(DATASET_FILE, {}) if staged else {}
    if record.get("counts"):
        # Their number stays, so nobody would see after a kill that they are those of the old rows.
        fence()
        storage.write_json(DATASET_FILE, record | {"counts": {}})
    names = list(staged)
    waiting = np.concatenate([np.empty(0, np.int64), *staged.values()])
    owner = np.repeat(np.arange(len(names)), [len(ids) for ids in staged.values()])
    done.ids, first = np.unique(waiting, return_index=True)
    work = []
    for part, hits in index.where(done.ids).items():
        at = np.searchsorted(done.ids, hits)
        work.append((np.unique(owner[first[at]]).tolist(), part, hits))
    read = functools.lru_cache(maxsize=8)(functools.partial(read_part, storage))
    # In the order of the new rows, as old rows of one time are mostly new rows of one time.
    for sources, part, hits in sorted(work, key=lambda one: one[:2]):
        new = pa.concat_tables(
            [
                rows.filter(pa.array(np.isin(rows["id"].to_numpy(), hits)))
                for rows in (read(names[number]) for number in sources)
            ],
            promote_options="default",
        )
        rows = _replaced(read_part(storage, part), new, done)
        fence()
        _write(storage, part, rows)
    placed = np.concatenate([np.empty(0, np.int64), *(hits for _, _, hits in work)])
    for name, ids in staged.items():
        fence()
        lost = ids[~np.isin(ids, placed)]  # somebody took their old rows away meanwhile
        if len(lost):
            rows = read_part(storage, name)
            rows = rows.filter(pa.array(np.isin(rows["id"].to_numpy(), lost)))
            done.added.count(rows)
            index.add(write_part(storage, rows), lost)
        storage.delete(name)
    return done


def _replaced(old: pa.Table, new: pa.Table, done: Replaced) -> pa.Table:
    """``old`` with the rows of ``new`` in their places."""
    place = {int(row_id): index for index, row_id in enumerate(old["id"].to_pylist())}
    order = np.arange(old.num_rows)
    was, read = old["status"].to_pylist(), new["sha256"].is_valid().to_pylist()
    for index, (row_id, status) in enumerate(
        zip(new["id"].to_pylist(), new["status"].to_pylist(), strict=True)
    ):
        if status != OK and not read[index] and was[place[row_id]] == OK:
            done.kept[status] += 1  # a storage that does not answer is no reason to lose a label
        else:
            order[place[row_id]] = old.num_rows + index
    taken = order >= old.num_rows
    done.removed.count(old.filter(pa.array(taken)))
    done.added.count(new.take(pa.array(order[taken] - old.num_rows)))
    return pa.concat_tables([old, new], promote_options="default").take(pa.array(order))
