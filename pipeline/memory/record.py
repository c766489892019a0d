"""``memory.json``: what a memory of regions is, and of what.

A memory is a folder:

    memory.json            how it was made, and its finished parts
    parts/*.safetensors    regions of some files of the label table: ``keys`` fp16 (R, K), ``values`` fp16
                           (R, D), ``images`` int64 (R,), ids of the images
    index.faiss            an index of the keys, if it was asked for
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, NonNegativeInt

from models.errors import WrongUse
from models.settings import RegionKind
from pipeline.files.records import find_record
from pipeline.files.storage import Storage

MEMORY_FILE: Final = "memory.json"
PARTS_DIR: Final = "parts"
INDEX_FILE: Final = "index.faiss"
SCHEMA_VERSION: Final = 1
IndexKind = Literal["exact", "faiss"]


class PartRecord(BaseModel):
    """A finished part.

    Attributes:
        name: of its file, in ``parts``.
        sha256: of its content, hex.
        files: of the label table, with what tells them from later files of their names.
        images: with regions in it.
        left_out: images that have none, by reason.
        regions: how many.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    sha256: str
    files: dict[str, str]
    images: NonNegativeInt
    left_out: dict[str, NonNegativeInt] = {}
    regions: NonNegativeInt


class MemoryRecord(BaseModel):
    """What ``memory.json`` says.

    Attributes:
        schema_version: of the file.
        created: UTC, ISO 8601.
        table: URI of the label table.
        recipe: of the table, by which its images are read.
        weights: of the table: ``model``, ``pretrained`` and ``fingerprint``.
        regions: how images fall into regions.
        key_block: number of the block, from 0, whose tokens are the keys.
        key_width, value_width: K and D; 0 before the first part.
        index: how keys are searched.
        index_sha256: of ``index.faiss``, hex; "" without one.
        complete: whether the last run came to its end; only then may it be used.
        parts: finished ones, by name.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    created: str = ""
    table: str
    recipe: dict[str, Any]
    weights: dict[str, Any]
    regions: RegionKind
    key_block: NonNegativeInt
    key_width: NonNegativeInt = 0
    value_width: NonNegativeInt = 0
    index: IndexKind = "exact"
    index_sha256: str = ""
    complete: bool = False
    parts: tuple[PartRecord, ...] = ()

    @property
    def fingerprint(self) -> str:
        """Sha256 (hex) of what it holds and how it is searched: labels depend on both."""
        content = [self.regions, self.key_block, self.index, self.index_sha256]
        content += [part.sha256 for part in self.parts]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def count(self) -> int:
        """M, the number of regions."""
        return sum(part.regions for part in self.parts)

    @property
    def images(self) -> int:
        """Images with regions in it."""
        return sum(part.images for part in self.parts)


def find_memory_record(storage: Storage) -> MemoryRecord | None:
    """The record of a memory; None if there is no ``memory.json``.

    Raises:
        MaskMillError: ``newer_version``; ``file_damaged`` if it is no record of a memory.
    """
    remedy = "Build the memory again with --overwrite."
    return find_record(MemoryRecord, storage, MEMORY_FILE, SCHEMA_VERSION, remedy=remedy)


def read_memory_record(storage: Storage) -> MemoryRecord:
    """The record of a memory that may be used.

    Raises:
        MaskMillError: ``input_missing`` without one, or if it is not finished; as ``find_memory_record``.
    """
    record = find_memory_record(storage)
    if record is None or not record.complete:
        state = "There is no memory" if record is None else "The memory is not finished"
        raise WrongUse(
            "input_missing",
            f"{state} in {storage.uri}.",
            f"Run: maskmill memory build TABLE --output {storage.uri}",
        )
    if not record.count:
        raise WrongUse(
            "input_missing",
            f"The memory in {storage.uri} holds no region: no image of its table could be read.",
            "Build one from a table whose images are there.",
        )
    return record


def write_memory_record(storage: Storage, record: MemoryRecord) -> None:
    """Write ``memory.json``."""
    storage.write_json(MEMORY_FILE, record.model_dump(mode="json"))
