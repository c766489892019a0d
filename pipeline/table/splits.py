"""``split.parquet`` beside a label table: which images are for training, validation and test.

One row an image, by ascending id: ``id``, ``part``, ``group`` and ``hash``. Images of one group, such as
near-duplicates, are always in one part. What was asked for stands in the file's metadata. It is made by
``pipeline.splitting``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from models.errors import Damaged, WrongUse
from pipeline.files.storage import Storage, open_storage

SPLIT_FILE: Final = "split.parquet"
SCHEMA_VERSION: Final = 2
"""2: CLIP may say what is alike, which the first version does not know."""
PARTS: Final = ("train", "val", "test")
APART: Final = "none"
"""Part of images that resemble images of several parts, and therefore belong to none."""
ALL: Final = "all"

_KEY: Final = b"maskmill.split"
_SCHEMA: Final = pa.schema(
    [
        ("id", pa.int64()),
        ("part", pa.dictionary(pa.int8(), pa.string())),
        ("group", pa.int64()),
        ("hash", pa.uint64()),
    ]
)
_NAMES: Final = (*PARTS, APART)


class _Version(BaseModel):
    schema_version: int = 1


class SplitRecord(BaseModel):
    """What a split is, as the metadata of its file says.

    Attributes:
        schema_version: of the file.
        created: UTC, ISO 8601; it stays when the split grows with its table.
        updated: the same, of the last change.
        shares: of the images, by part; their sum is 1.
        seed: of the order in which groups are dealt out.
        by: "none", "folder", or the name of a column of a file; images that agree in it are one group.
        near: "hash" if images whose perceptual hashes are near are one group; "clip" if those are, too, whose
            CLIP embeddings are; else "none".
        distance: largest number of different bits of such hashes.
        similarity: least cosine of such embeddings; 0 if they are not looked at.
        clip: the CLIP that made them: name, and the beginning of its weights' fingerprint.
        images: how many there are, by part.
        groups: how many there are.
        largest: number of images of the largest group.
        unread: images without a hash, or an embedding, since they could not be read.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    created: str
    updated: str = ""
    shares: dict[str, FiniteFloat]
    seed: int = 0
    by: str = "none"
    near: Literal["hash", "clip", "none"] = "hash"
    distance: int = Field(default=0, ge=0, le=64)
    similarity: float = Field(default=0, ge=0, le=1)
    clip: str = ""
    images: dict[str, int] = {}
    groups: int = 0
    largest: int = 0
    unread: int = 0

    @property
    def identity(self) -> str:
        """What tells it from another split of the table; it stays when the split grows."""
        shares = ", ".join(f"{part} {share:g}" for part, share in sorted(self.shares.items()))
        return f"of {self.created} ({shares}; seed {self.seed})"

    def differences(self, other: SplitRecord) -> list[str]:
        """The settings in which another one differs, in words."""
        return [
            f"{name} {getattr(other, name)}, not {getattr(self, name)}"
            for name in ("shares", "seed", "by", "near", "distance", "similarity", "clip")
            if getattr(self, name) != getattr(other, name)
        ]


@dataclass(frozen=True, eq=False)
class Split:
    """The part of each image.

    Attributes:
        record: what was asked for, and counts.
        ids: int64 (N,), ascending.
        part: int8 (N,): index in ``PARTS``, or one past them for ``APART``.
        group: int64 (N,): smallest id of the group.
        hashes: uint64 (N,).
        hashed: bool (N,): whether there is a hash.
    """

    record: SplitRecord
    ids: npt.NDArray[np.int64]
    part: npt.NDArray[np.int8]
    group: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    hashed: npt.NDArray[np.bool_]

    def part_of(self, row_id: int) -> str | None:
        """The part of an image; None if it is in none, or not in the split."""
        at = int(np.searchsorted(self.ids, row_id))
        if at == len(self.ids) or int(self.ids[at]) != row_id:
            return None
        name = _NAMES[self.part[at]]
        return None if name == APART else name

    def ids_of(self, part: str) -> npt.NDArray[np.int64]:
        """Ids of the images of a part, ascending.

        Raises:
            MaskMillError: ``too_few_images`` if it has none.
        """
        found = self.ids[self.part == _NAMES.index(part)]
        if not len(found):
            raise WrongUse(
                "too_few_images",
                f"The split of the table has no images in its part {part}.",
                "Name another --part, or split anew: maskmill split TABLE --overwrite.",
            )
        return found


def find_split(table: Storage | str) -> Split | None:
    """The split of a table; None if it has none.

    Raises:
        MaskMillError: ``newer_version``; ``file_damaged``.
    """
    storage = table if isinstance(table, Storage) else open_storage(table)
    try:
        data = storage.read_bytes(SPLIT_FILE)
    except FileNotFoundError:
        return None
    where = storage.uri_of(SPLIT_FILE)
    try:
        rows = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
        said = (rows.schema.metadata or {}).get(_KEY)
        if said is None:
            raise ValueError("it does not say what it is")
        # Before its fields, which a newer version may have changed.
        if _Version.model_validate_json(said).schema_version > SCHEMA_VERSION:
            raise WrongUse("newer_version", f"{where} was written by a newer MaskMill.", "Update MaskMill.")
        return _checked(SplitRecord.model_validate_json(said), rows)
    except (OSError, ValueError, KeyError, pa.ArrowException, ValidationError) as error:
        why = " ".join(str(error).split())[:200]
        raise Damaged(
            "file_damaged",
            f"{where} is no split of a label table: {why}",
            "Restore it from a copy, or delete it and split anew; images may then change their parts.",
        ) from error


def _checked(record: SplitRecord, rows: pa.Table) -> Split:
    if [*rows.column_names] != _SCHEMA.names or rows.schema.types != _SCHEMA.types:
        raise ValueError(f"its columns are {', '.join(rows.column_names)}")
    if any(rows[name].null_count for name in ("id", "part", "group")):
        raise ValueError("a row has no id, part or group")
    ids = rows["id"].to_numpy()
    if not bool(np.all(ids[1:] > ids[:-1])):
        raise ValueError("its ids are not in ascending order, or there twice")
    names = rows["part"].cast(pa.string()).to_pylist()
    number = {name: index for index, name in enumerate(_NAMES)}
    unknown = sorted(set(names) - number.keys())
    if unknown:
        raise ValueError(f"there is no part {unknown[0]}")
    hashes = rows["hash"].combine_chunks()
    return Split(
        record,
        ids,
        np.fromiter((number[name] for name in names), np.int8, len(names)),
        rows["group"].to_numpy(),
        hashes.fill_null(0).to_numpy(),
        hashes.is_valid().to_numpy(zero_copy_only=False),
    )


def write_split(table: Storage, split: Split) -> None:
    """Write the split of a table, atomically, in the place of an earlier one."""
    rows: dict[str, Any] = {
        "id": split.ids,
        "part": pa.DictionaryArray.from_arrays(pa.array(split.part), pa.array(_NAMES)),
        "group": split.group,
        "hash": pa.array(split.hashes, pa.uint64(), mask=~split.hashed),
    }
    schema = _SCHEMA.with_metadata({_KEY: split.record.model_dump_json().encode()})
    file = io.BytesIO()
    pq.write_table(pa.table(rows, schema=schema), file, write_page_checksum=True)
    table.write_bytes(SPLIT_FILE, file.getvalue())


def require_split(table: str) -> Split:
    """The split of a table.

    Raises:
        MaskMillError: ``input_missing`` if it has none; as ``find_split``.
    """
    split = find_split(table)
    if split is None:
        raise WrongUse("input_missing", f"{table} has not been split.", f"Run: maskmill split {table}")
    return split


@dataclass(frozen=True, eq=False)
class Chosen:
    """The images of one part of a split.

    Attributes:
        part: its name.
        ids: int64 (n,), its images.
        others: int64 (m,), images of the split that are not in it.
        identity: of the split.
        strict: whether images of which the split says nothing are left out.
    """

    part: str
    ids: npt.NDArray[np.int64]
    others: npt.NDArray[np.int64]
    identity: str
    strict: bool = True

    def keep(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of some images, int64 (n,), are to be used: bool (n,)."""
        return np.isin(ids, self.ids) if self.strict else ~np.isin(ids, self.others)


def choose(table: str, part: str | None, *, default: str = ALL) -> Chosen | None:
    """The images that a command works on; None if on all.

    Args:
        table: the label table.
        part: one of ``PARTS``, or ``ALL``; None takes ``default`` if the table has a split, else ``ALL``.
        default: see ``part``.

    Raises:
        MaskMillError: ``wrong_use`` for another name; ``input_missing``; ``too_few_images``;
            as ``find_split``.
    """
    if part is not None and part not in (*PARTS, ALL):
        raise WrongUse("wrong_use", f"--part {part} is not known.", f"Give {', '.join(PARTS)} or {ALL}.")
    wanted = part or default
    if wanted == ALL:
        return None
    split = find_split(table) if part is None else require_split(table)
    if split is None:
        return None
    ids = split.ids_of(wanted)
    return Chosen(wanted, ids, np.setdiff1d(split.ids, ids), split.record.identity)
