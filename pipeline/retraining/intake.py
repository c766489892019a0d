"""What a tick takes in: images that are new, and that nothing is measured on.

Of the images that arrive, some may be those of the evaluation, under the same address or as a copy. A model
that has seen them proves nothing, so they are never taken: by id, and by the SHA-256 of their bytes. Where a
share of the images is held out, that hash decides which: copies then fall on the same side, whenever they
arrive.
"""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged, WrongUse
from pipeline.corpus.manifest import ADDRESS, stable_id
from pipeline.datasets.base import Dataset
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.storage import Storage, canonical_uri
from pipeline.retraining.config import When
from pipeline.retraining.state import Tick, tick_folder
from pipeline.table.committed import part_files
from pipeline.table.labels import iter_batches

NEW_FILE = "new.parquet"
"""In a tick's folder: the images that it took in, and the share that is held out."""
HELD_FILE = "held.parquet"
CORPUS_FILE = "corpus.parquet"
"""In the output: all images that were taken in to be trained on. Made anew from the ticks."""
HELD_OUT_FILE = "heldout.parquet"
TABLE, HELD_TABLE = "table", "heldout"
"""In the output: the teacher's labels of the images to train on, and of those that are held out."""
EXCLUDED_FILE = "excluded.parquet"
"""In the output: copies of evaluation images that have been found among those that arrive."""
_READERS = 16

Ids = npt.NDArray[np.int64]
NO_IMAGES = pa.table({"id": pa.array([], pa.int64()), "uri": pa.array([], pa.string())})


@dataclass(frozen=True)
class Intake:
    """What a tick takes in.

    Attributes:
        new: manifest of the images to train on.
        held: manifest of the new images that are held out to be measured on.
        excluded: manifest of copies of evaluation images that were found this time.
        waiting: number of new images that the budget leaves for later.
        lines: what is worth telling.
    """

    new: pa.Table
    held: pa.Table
    excluded: pa.Table
    waiting: int = 0
    lines: tuple[str, ...] = ()


def read_images(storage: Storage, name: str) -> pa.Table:
    """A manifest that a retraining has written; no images if there is none.

    Raises:
        MaskMillError: ``file_damaged``.
    """
    try:
        data = storage.read_bytes(name)
    except FileNotFoundError:
        return NO_IMAGES
    try:
        table = pq.read_table(io.BytesIO(data))
        if table.schema.field("id").type != pa.int64() or table.schema.field("uri").type != pa.string():
            raise ValueError("columns id and uri are of other types")
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise Damaged(
            "file_damaged",
            f"{storage.uri_of(name)} is no manifest: {error}",
            "Restore the file from a copy, or delete the folder of the tick: its images are then new again.",
        ) from None
    return table


def write_images(storage: Storage, name: str, table: pa.Table) -> None:
    """Write a manifest in one piece."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(name, buffer.getvalue())


def taken_in(storage: Storage, ticks: Iterable[Tick], name: str = NEW_FILE) -> pa.Table:
    """The images of all ticks that were not given up, each once."""
    folders = [tick_folder(tick.run) for tick in ticks if tick.outcome != "abandoned"]
    with ThreadPoolExecutor(_READERS) as pool:
        parts = list(pool.map(lambda folder: read_images(storage, f"{folder}/{name}"), folders))
    return joined(parts)


def joined(parts: Sequence[pa.Table]) -> pa.Table:
    """Manifests as one, each image once; columns that only some have are empty for the others."""
    table = pa.concat_tables([NO_IMAGES, *parts], promote_options="default")
    _, first = np.unique(table["id"].to_numpy(), return_index=True)
    return table.take(pa.array(np.sort(first)))


def without(table: pa.Table, ids: Ids) -> pa.Table:
    """A manifest without some images."""
    return table.filter(pa.array(~np.isin(table["id"].to_numpy(), ids)))


def ids_of(table: pa.Table) -> Ids:
    """Ids of a manifest."""
    found: Ids = table["id"].to_numpy()
    return found


def evaluation_ids(dataset: Dataset | None) -> Ids:
    """Ids of the images with truth."""
    samples = () if dataset is None else dataset.samples
    return np.array([stable_id(canonical_uri(one.image)) for one in samples if one.image], np.int64)


def refuse_signed(manifest: pa.Table) -> None:
    """Refuse images that are reached by signed addresses: a schedule outlives signatures.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    if ADDRESS in manifest.column_names:
        raise WrongUse(
            "wrong_use",
            "The images are listed by signed addresses, which expire before they are labelled again.",
            "Give the store itself (s3://bucket/prefix) and credentials in the environment.",
        )


def begins(new: int, last: str | None, when: When, *, at: datetime) -> tuple[bool, str]:
    """Whether a tick begins, and why not.

    Args:
        new: number of new images.
        last: when the last tick was finished, UTC in ISO 8601; None without one.
        when: the conditions.
        at: the time now.
    """
    if new == 0:
        return False, "no new images"
    if new >= when.min_new:
        return True, ""
    waits = f"{new:,} new image{'s' if new > 1 else ''}, and a tick waits for {when.min_new:,}"
    if when.max_age is None:
        return False, waits
    if last is None:
        return False, f"{waits} (max_age counts from the first tick)"
    days = (at - datetime.fromisoformat(last.replace("Z", "+00:00"))).total_seconds() / 86_400
    if days >= when.max_age:
        return True, ""
    return False, f"{waits}, or until {when.max_age:g} days have passed since the last one ({days:.1f} have)"


def clock() -> datetime:
    """The time now, UTC."""
    return datetime.now(timezone.utc)


def share_of(ids: Ids) -> npt.NDArray[np.float64]:
    """A number in [0, 1) for each id, spread evenly and always the same: ids are hashes."""
    return ids.astype(np.uint64) / np.float64(2**64)


def shares_of(ids: Ids, digests: Sequence[bytes | None]) -> npt.NDArray[np.float64]:
    """The same by what the images are; by id for those that could not be read."""
    found = [
        one if digest is None else np.int64(int.from_bytes(digest[:8], "big", signed=True))
        for one, digest in zip(ids, digests, strict=True)
    ]
    return share_of(np.array(found, np.int64))


@dataclass(frozen=True)
class Known:
    """What is known of images by what they are: SHA-256 of their bytes.

    Attributes:
        digests: reads the images of a manifest; None for one that cannot be read.
        measured: digests of the images that are measured on.
        trained: which of some digests are those of images that are trained on already.
    """

    digests: Callable[[pa.Table], Sequence[bytes | None]]
    measured: Callable[[], Collection[bytes]]
    trained: Callable[[Collection[bytes]], Collection[bytes]] = lambda _asked: ()


def choose(
    new: pa.Table, *, budget: int | None, hold_out: float | None, held_before: int, known: Known
) -> Intake:
    """Divide the new images.

    Args:
        new: manifest of the images that no tick has taken in.
        budget: how many to take at most.
        hold_out: share to measure on; None if truth is known.
        held_before: how many are held out already.
        known: finds copies; it is asked only if there are new images.
    """
    lines = []
    taken = new.slice(0, budget) if budget is not None else new
    waiting = new.num_rows - taken.num_rows
    if waiting:
        lines.append(f"{waiting:,} more wait for the next tick (when.budget.images: {budget:,})")
    if not taken.num_rows:
        return Intake(taken, taken, taken, waiting, tuple(lines))
    digests = known.digests(taken)
    measured = set(known.measured())
    is_copy = np.array([digest in measured for digest in digests], bool)
    held = np.zeros(taken.num_rows, bool)
    if hold_out is not None:
        held = _held_out(ids_of(taken), digests, is_copy, hold_out, known, first=not held_before)
        # Of an image and its copies, one is measured on, and none is trained on.
        kept = {digests[at]: at for at in np.flatnonzero(held)[::-1] if digests[at] is not None}
        is_copy |= np.array([kept.get(digest, at) != at for at, digest in enumerate(digests)])
        held &= ~is_copy
    excluded = taken.filter(pa.array(is_copy))
    if excluded.num_rows:
        first = excluded["uri"][0].as_py()
        lines.append(f"{excluded.num_rows:,} left out as copies of evaluation images, such as {first}")
    if hold_out is not None:
        lines.append(f"{int(held.sum()):,} held out to measure on")
    left = taken.filter(pa.array(~held & ~is_copy))
    return Intake(left, taken.filter(pa.array(held)), excluded, waiting, tuple(lines))


def _held_out(
    ids: Ids,
    digests: Sequence[bytes | None],
    is_copy: npt.NDArray[np.bool_],
    hold_out: float,
    known: Known,
    *,
    first: bool,
) -> npt.NDArray[np.bool_]:
    """Which images to measure on: a share of them, at least one if they are the first; copies included."""
    shares = shares_of(ids, digests)
    may = ~is_copy
    if may.any():
        trained = set(known.trained({digest for digest in digests if digest is not None}))
        may &= np.array([digest not in trained for digest in digests], bool)
    held = may & (shares < hold_out)
    if first and may.any() and not held.any():  # there must be something to measure on
        held[np.argmin(np.where(may, shares, np.inf))] = True
    return held


def hashes(uris: Sequence[str]) -> list[bytes | None]:
    """SHA-256 of the files; None for one that cannot be read."""
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_hash, uris))


def _hash(uri: str, start: int = 0, length: int | None = None) -> bytes | None:
    try:
        return hashlib.sha256(fetch(uri, start=start, length=length, attempts=2)).digest()
    except ImageError:
        return None  # labelling will tell


def read_digests(table: pa.Table) -> list[bytes | None]:
    """SHA-256 of the images of a manifest; None for one that cannot be read."""
    starts, lengths = (
        table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
        for name in ("offset", "length")
    )
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(_hash, table["uri"].to_pylist(), [start or 0 for start in starts], lengths))


def dataset_digests(dataset: Dataset | None) -> set[bytes]:
    """SHA-256 of the images of a dataset; reads them."""
    samples = () if dataset is None else dataset.samples
    return {digest for digest in hashes([one.image for one in samples if one.image]) if digest is not None}


def table_digests(storage: Storage, among: Collection[bytes] | None = None) -> set[bytes]:
    """SHA-256 of the images of a label table, if there is one.

    Args:
        storage: of the table.
        among: ask for these alone, so that a large table takes no memory.
    """
    found: set[bytes] = set()
    for batch in iter_batches(storage, ["sha256"], batch_size=65_536, names=part_files(storage)):
        digests = {digest for digest in batch.column("sha256").to_pylist() if digest is not None}
        found |= digests if among is None else digests & set(among)
    return found


def known_in(storage: Storage, dataset: Dataset | None) -> Known:
    """What is known in the output of a retraining.

    Args:
        storage: the output.
        dataset: the images with truth; None if images are held out instead.
    """
    return Known(
        digests=read_digests,
        measured=lambda: dataset_digests(dataset) | table_digests(storage.child(HELD_TABLE)),
        trained=functools.partial(table_digests, storage.child(TABLE)),
    )


def look_through(
    storage: Storage, new: Ids, held: Ids, dataset: Dataset | None, known: Collection[bytes] = ()
) -> tuple[list[str], int]:
    """Find the parts of a label table that hold new images, and refuse to measure on what is in it.

    Args:
        storage: of the table.
        new: ids of this tick's images.
        held: ids of the images that are held out.
        dataset: the images with truth.
        known: SHA-256 of the images that are held out.

    Returns:
        Names of the parts, and how many of the new images have no row.

    Raises:
        MaskMillError: ``dataset_invalid``.
    """
    measured = np.concatenate([held, evaluation_ids(dataset)])
    known = dataset_digests(dataset) | set(known)
    parts: list[str] = []
    found, shared, example = 0, 0, ""
    for part in part_files(storage):
        holds = False
        for batch in iter_batches(storage, ["id", "uri", "sha256"], batch_size=65_536, names=[part]):
            ids = batch.column("id").to_numpy()
            count = int(np.isin(ids, new).sum())
            found, holds = found + count, holds or count > 0
            digests = batch.column("sha256").to_pylist()
            same = np.isin(ids, measured) | np.array([digest in known for digest in digests], bool)
            if same.any():
                shared += int(same.sum())
                example = example or batch.column("uri")[int(np.flatnonzero(same)[0])].as_py()
        if holds:
            parts.append(part)
    if shared:
        raise WrongUse(
            "dataset_invalid",
            f"{shared:,} images that are measured on are trained on as well, in {storage.uri}, such as "
            f"{example}: figures on them prove nothing.",
            "Measure on other images, or begin with another output: copies are then left out from the start.",
        )
    return parts, len(new) - found


def picked(corpus: pa.Table, new: Ids, budget: int | None) -> pa.Table:
    """The images that a champion labels anew: the new ones, then as many others as the budget allows.

    Args:
        corpus: all images that were taken in.
        new: ids of this tick's.
        budget: how many at most; None is all.
    """
    if budget is None or corpus.num_rows <= budget:
        return corpus
    ids = ids_of(corpus)
    order = np.lexsort((share_of(ids), ~np.isin(ids, new)))
    return corpus.take(pa.array(np.sort(order[:budget])))
