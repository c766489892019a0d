"""Make the split of a label table, or let it grow with its table."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.files.fetch import fetch, max_bytes
from pipeline.files.images import MAX_PIXELS, ImageError, decode
from pipeline.files.records import now
from pipeline.files.storage import Storage
from pipeline.splitting.alike import Alike
from pipeline.splitting.dealing import deal
from pipeline.splitting.duplicates import chains, connected, near_pairs
from pipeline.splitting.grouping import Groups
from pipeline.splitting.hashing import perceptual_hash
from pipeline.table.changed import Images
from pipeline.table.labels import OK, iter_batches, refuse_doubled
from pipeline.table.splits import APART, PARTS, Split, SplitRecord

FOLDER: Final = "folder"
NONE: Final = "none"
_READERS = 8
_BATCH = 64

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PartIndex:
    """What a split reads of a part of a table: its labelled images.

    Attributes:
        ids: int64 (n,).
        names: what an image is grouped by: its folder, or its address; empty if neither is wanted.
        image, present: (p,), classes of the images by index.
        hashes: uint64 (n,), and ``hashed``, whether there is one.
    """

    ids: Ids
    names: tuple[str, ...]
    image: Ids
    present: Ids
    hashes: npt.NDArray[np.uint64]
    hashed: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Known:
    """Hashes of an earlier split: ids, ascending, and their hashes."""

    ids: Ids = field(default_factory=lambda: np.empty(0, np.int64))
    hashes: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))

    @classmethod
    def of(cls, split: Split | None) -> Known:
        """Those of a split."""
        return cls() if split is None else cls(split.ids[split.hashed], split.hashes[split.hashed])


def index_part(
    name: str, *, storage: Storage, images: Images, by: str, near: bool, known: Known
) -> PartIndex:
    """Read a part of a table, and hash its images if near-duplicates are to be found.

    Args:
        name: of the part, relative to ``storage``.
        storage: the table's folder.
        images: where images are that are not whole files at their address.
        by: see ``SplitRecord.by``.
        near: whether to hash; images that cannot be read get no hash.
        known: hashes that need not be computed again.

    Raises:
        MaskMillError: ``table_damaged``; ``storage_…``.
    """
    ids: list[int] = []
    names: list[str] = []
    pairs: list[tuple[int, int]] = []
    hashes: list[int | None] = []
    with ThreadPoolExecutor(_READERS) as pool:
        columns = ["id", "uri", "status", "segments"]
        for batch in iter_batches(storage, columns, batch_size=_BATCH, names=[name]):
            rows = [row for row in batch.to_pylist() if row["status"] == OK]
            if near:
                hashes += pool.map(functools.partial(_hash, images=images, known=known), rows)
            for row in rows:
                pairs += [(len(ids), segment["class_id"]) for segment in row["segments"]]
                ids.append(row["id"])
                if by != NONE:
                    uri = row["uri"]
                    names.append(str(PurePosixPath(uri).parent) if by == FOLDER else uri)
    hashes = hashes or [None] * len(ids)
    found = np.array(pairs, np.int64).reshape(-1, 2)
    return PartIndex(
        np.array(ids, np.int64),
        tuple(names),
        found[:, 0],
        found[:, 1],
        np.array([value or 0 for value in hashes], np.uint64),
        np.array([value is not None for value in hashes], np.bool_),
    )


def _hash(row: Mapping[str, object], *, images: Images, known: Known) -> int | None:
    number = row["id"]
    assert isinstance(number, int)
    at = int(np.searchsorted(known.ids, number))
    if at < len(known.ids) and int(known.ids[at]) == number:
        return int(known.hashes[at])
    if not images.located(row):
        return None
    start, length = images.byte_range(number)
    try:
        data = fetch(images.address(row), start=start, length=length, max_bytes=max_bytes(MAX_PIXELS))
        return perceptual_hash(decode(data))
    except ImageError:
        return None


@dataclass(frozen=True)
class Made:
    """A split, and what to tell of it.

    Attributes:
        split: the split.
        added: number of images that an earlier split did not have.
        gone: number of images of the earlier split that the table no longer has; they keep their place.
        apart: number of images that are in no part, since they resemble images of several.
        ungrouped: images of which the user's file says nothing.
        classes: (C, parts): images of each class by part.
    """

    split: Split
    added: int
    gone: int
    apart: int
    ungrouped: int
    classes: npt.NDArray[np.int64]


def make_split(
    parts: Iterable[PartIndex],
    record: SplitRecord,
    *,
    table: Storage,
    before: Split | None = None,
    groups: Groups | None = None,
    alike: Alike | None = None,
) -> Made:
    """Group the images of a table, and deal the groups out.

    Images of an earlier split stay where they are. New ones go where images of their group are. If those are
    in several parts, because the new one links what was not alike before, it is in no part.

    Args:
        parts: of the table, in any order.
        record: what is asked for.
        table: its folder, for errors.
        before: an earlier split of the same settings.
        groups: the column of ``record.by``, if that is one.
        alike: what CLIP takes for the same, if ``record.near`` is "clip".

    Raises:
        MaskMillError: ``table_damaged`` for an image with two rows; ``setting_invalid`` if there are too few
            groups for the parts; ``too_few_images`` without labelled images.
    """
    found = list(parts)
    ids = np.concatenate([np.empty(0, np.int64), *(one.ids for one in found)])
    if not len(ids):
        raise WrongUse("too_few_images", f"{table.uri} has no labelled images.", "Label images first.")
    refuse_doubled(ids, table)
    # By id, so that nothing depends on files and their order.
    order = np.argsort(ids)
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    offsets = np.cumsum([0, *(len(one.ids) for one in found)])
    image = rank[
        np.concatenate([one.image + offset for one, offset in zip(found, offsets[:-1], strict=True)])
    ]
    present = np.concatenate([one.present for one in found])
    hashes = np.concatenate([one.hashes for one in found])[order]
    hashed = np.concatenate([one.hashed for one in found])[order]
    ids = ids[order]
    names = [name for one in found for name in one.names]
    pairs = [np.empty((0, 2), np.int64)]
    ungrouped = 0
    if names:
        values = [names[at] for at in order.tolist()]
        if groups is not None:
            given = [groups.of(int(number), uri) for number, uri in zip(ids, values, strict=True)]
            ungrouped = sum(value is None for value in given)
            values = [f"={value}" if value is not None else f"#{at}" for at, value in enumerate(given)]
        pairs.append(chains(values))
    read = hashed
    if record.near != "none":
        where = np.flatnonzero(hashed)
        pairs.append(where[near_pairs(hashes[hashed], record.distance)])
    if alike is not None:
        read = hashed & np.isin(ids, alike.ids)
        # The table may have changed meanwhile.
        pairs.append(np.searchsorted(ids, alike.pairs[np.isin(alike.pairs, ids).all(1)]))
    kept, gone = _kept(ids, before)
    if before is not None:  # what was one group stays one, though images of it may be gone
        there = kept >= 0
        held = before.group[np.searchsorted(before.ids, ids[there])]
        pairs.append(np.flatnonzero(there)[chains(held.tolist())])
    group = connected(np.concatenate(pairs), len(ids))
    part = _dealt(group, image, present, kept, record)
    smallest = np.full(int(group.max()) + 1, np.iinfo(np.int64).max)
    np.minimum.at(smallest, group, ids)
    split = Split(record, ids, part, smallest[group], hashes, hashed)
    if gone is not None:
        split = _with_gone(split, gone)
    _refuse_empty(split, record, int(group.max()) + 1)
    counts = {name: int(np.count_nonzero(split.part == at)) for at, name in enumerate((*PARTS, APART))}
    whole = record.model_copy(
        update={
            "updated": now(),
            "images": {name: count for name, count in counts.items() if count},
            "groups": int(group.max()) + 1,
            "largest": int(np.bincount(group).max()),
            "unread": int(np.count_nonzero(~read)) if record.near != "none" else 0,
        }
    )
    classes = np.zeros((int(present.max(initial=-1)) + 1, len(PARTS) + 1), np.int64)
    np.add.at(classes, (present, part[image]), 1)
    return Made(
        Split(whole, split.ids, split.part, split.group, split.hashes, split.hashed),
        added=int(np.count_nonzero(kept < 0)),
        gone=0 if gone is None else len(gone.ids),
        apart=int(np.count_nonzero(part == len(PARTS))),
        ungrouped=ungrouped,
        classes=classes,
    )


def _kept(ids: Ids, before: Split | None) -> tuple[npt.NDArray[np.int8], Split | None]:
    """The part that each image had, -1 for new ones; and earlier rows whose images are gone."""
    kept = np.full(len(ids), -1, np.int8)
    if before is None:
        return kept, None
    there = np.isin(ids, before.ids)
    kept[there] = before.part[np.searchsorted(before.ids, ids[there])]
    lost = ~np.isin(before.ids, ids)
    if not lost.any():
        return kept, None
    return kept, Split(
        before.record,
        before.ids[lost],
        before.part[lost],
        before.group[lost],
        before.hashes[lost],
        before.hashed[lost],
    )


def _dealt(
    group: Ids, image: Ids, present: Ids, kept: npt.NDArray[np.int8], record: SplitRecord
) -> npt.NDArray[np.int8]:
    """The part of each image."""
    apart = len(PARTS)
    old = kept >= 0
    fixed = np.full(int(group.max()) + 1, -1, np.int8)
    low = np.full(len(fixed), apart + 1)
    high = np.full(len(fixed), -1)
    placed = old & (kept < apart)
    np.minimum.at(low, group[placed], kept[placed])
    np.maximum.at(high, group[placed], kept[placed])
    fixed[high >= 0] = high[high >= 0]
    torn = (high >= 0) & (low < high)
    shares = np.array([record.shares.get(name, 0.0) for name in PARTS])
    chosen = deal(group, image, present, shares, seed=record.seed, fixed=fixed)
    part = np.where(old, kept, chosen[group])
    part[~old & torn[group]] = apart
    return np.asarray(part, np.int8)


def _with_gone(split: Split, gone: Split) -> Split:
    """A split that also remembers images which the table has no longer: they may come back."""
    order = np.argsort(np.concatenate([split.ids, gone.ids]))
    return Split(
        split.record,
        np.concatenate([split.ids, gone.ids])[order],
        np.concatenate([split.part, gone.part])[order],
        np.concatenate([split.group, gone.group])[order],
        np.concatenate([split.hashes, gone.hashes])[order],
        np.concatenate([split.hashed, gone.hashed])[order],
    )


def _refuse_empty(split: Split, record: SplitRecord, groups: int) -> None:
    empty = [
        name
        for at, name in enumerate(PARTS)
        if record.shares.get(name, 0) > 0 and not np.any(split.part == at)
    ]
    if empty:
        raise WrongUse(
            "setting_invalid",
            f"{len(split.ids):,} images in {groups:,} groups leave nothing for {' and '.join(empty)}.",
            "Take smaller groups (--by none, a smaller --distance), fewer parts, or more images.",
        )


def check_shares(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of the parts, as they are recorded.

    Raises:
        MaskMillError: ``wrong_use`` if they are negative, or do not sum to 1.
    """
    total = sum(shares.values())
    if any(not 0 <= share <= 1 for share in shares.values()) or abs(total - 1) > 1e-6:
        said = ", ".join(f"--{name} {share:g}" for name, share in shares.items())
        raise WrongUse(
            "wrong_use",
            f"The shares {said} do not sum to 1.",
            "Write --train 0.8 --val 0.1 --test 0.1.",
        )
    return {name: float(share) for name, share in shares.items()}


def check_by(by: str, file: str | None) -> str:
    """What to group by, as it is recorded.

    Raises:
        MaskMillError: ``wrong_use`` for a column without its file, or a file without its column.
    """
    if (by in (NONE, FOLDER)) != (file is None):
        raise WrongUse(
            "wrong_use",
            f"--by {by} and --groups do not fit."
            if file
            else f"--by {by} needs the file that has this column.",
            "Give --groups FILE.csv --by COLUMN, or --by folder without a file.",
        )
    return by
