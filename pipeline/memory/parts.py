"""The parts of a memory: safetensors with a mark beside each, which says that it is finished.

Shapes: M regions of the memory, R of a part, K key channels, D embedding channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from models.errors import Damaged
from pipeline.files.storage import Storage
from pipeline.memory.record import PARTS_DIR, MemoryRecord, PartRecord

if TYPE_CHECKING:
    import torch

_MARK = ".json"


class Part(NamedTuple):
    """Regions of some images.

    Attributes:
        keys: fp16 (R, K).
        values: fp16 (R, D), of length 1.
        images: int64 (R,), ids.
    """

    keys: torch.Tensor
    values: torch.Tensor
    images: torch.Tensor


class Mark(BaseModel):
    """What lies beside a finished part.

    Attributes:
        part: its record.
        made_by: what its regions depend on, beside the files of the table.
    """

    model_config = ConfigDict(frozen=True)

    part: PartRecord
    made_by: str


def part_file(name: str) -> str:
    """Where a part lies in its memory."""
    return f"{PARTS_DIR}/{name}.safetensors"


def encoded(part: Part) -> tuple[bytes, str]:
    """A part as safetensors, the same bytes for the same regions, and their SHA-256 (hex)."""
    from safetensors.torch import save

    data = save({name: tensor.contiguous() for name, tensor in part._asdict().items()})
    return data, hashlib.sha256(data).hexdigest()


def write_part_file(storage: Storage, data: bytes, mark: Mark) -> None:
    """Put a part in place, and then its mark."""
    storage.write_bytes(part_file(mark.part.name), data)
    storage.write_bytes(f"{PARTS_DIR}/{mark.part.name}{_MARK}", mark.model_dump_json().encode())


def marked_parts(storage: Storage, made_by: str) -> Iterator[PartRecord]:
    """Finished parts that the same settings made, by name. What is no mark is made again."""
    for file in sorted(storage.list(PARTS_DIR)):
        if not file.endswith(_MARK):
            continue
        try:
            mark = Mark.model_validate_json(storage.read_bytes(file))
        except (FileNotFoundError, ValidationError):
            continue
        if mark.made_by == made_by and storage.exists(part_file(mark.part.name)):
            yield mark.part


def delete_other_parts(storage: Storage, kept: set[str]) -> None:
    """Delete what belongs to no part of these names."""
    for file in storage.list(PARTS_DIR):
        if file.rpartition("/")[2].rpartition(".")[0] not in kept:
            storage.delete(file)


def widths_of(storage: Storage, part: PartRecord) -> tuple[int, int]:
    """K and D of a part that has regions."""
    from safetensors.torch import load

    tensors = load(storage.read_bytes(part_file(part.name)))
    return tensors["keys"].shape[1], tensors["values"].shape[1]


def read_part(storage: Storage, part: PartRecord, record: MemoryRecord) -> Part:
    """Read a part and check that it is what the record says.

    Raises:
        MaskMillError: ``file_damaged``.
    """
    import torch
    from safetensors.torch import load

    file = part_file(part.name)
    try:
        data = storage.read_bytes(file)
        if hashlib.sha256(data).hexdigest() != part.sha256:
            raise ValueError("its content has changed since it was written")
        tensors = load(data)
        found = Part(*(tensors[name] for name in Part._fields))
    except (OSError, KeyError, ValueError) as error:
        raise damaged(storage, file, error) from error
    wanted = ((part.regions, record.key_width), (part.regions, record.value_width), (part.regions,))
    kinds = (torch.float16, torch.float16, torch.int64)
    for tensor, shape, kind in zip(found, wanted, kinds, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != kind:
            what = f"{tensor.dtype} {tuple(tensor.shape)}, not {kind} {shape}"
            raise damaged(storage, file, ValueError(f"it holds {what}"))
    lengths = torch.linalg.vector_norm(found.values.float(), dim=1)
    if not bool(torch.isfinite(found.keys).all()) or not bool(((lengths - 1).abs() < 1e-2).all()):
        raise damaged(storage, file, ValueError("its keys are not finite, or its values not of length 1"))
    return found


def damaged(storage: Storage, file: str, error: Exception) -> Damaged:
    """``file_damaged`` for a file of a memory."""
    return Damaged(
        "file_damaged",
        f"{storage.uri_of(file)} cannot be used: {error}.",
        "Delete it, and run maskmill memory build again: what is whole stays.",
    )
