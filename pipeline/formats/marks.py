"""What a run keeps beside an export to go on where it stopped: a mark for each finished part, and lists."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, TypeVar
from zlib import crc32

from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from models.errors import Damaged
from pipeline.files.documents import first_problem
from pipeline.files.storage import Storage
from pipeline.formats.base import Loss
from pipeline.formats.samples import LeftOut

OWN_DIR: Final = ".maskmill"

_PARTS = f"{OWN_DIR}/parts"
_READERS = 16


def _inside(name: str) -> str:
    """A relative name within the export: files are deleted by such names."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError("a name that is not inside the export")
    return name


Inside = Annotated[str, AfterValidator(_inside)]


class Mark(BaseModel):
    """First line of a finished part's entries.

    Attributes:
        file: the first of the part's files in the table.
        version: what tells them from later files of their names.
        images: by split.
        left_out: rows without an image.
        lost: by the format.
        files: what was written, relative to the export.
        sums: CRC-32 of each of these files that the disk was not made sure of, None for the others.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    version: str
    images: dict[str, NonNegativeInt]
    left_out: tuple[LeftOut, ...]
    lost: Loss
    files: tuple[Inside, ...]
    sums: tuple[int | None, ...] = ()


_Read = TypeVar("_Read")
NAMES: Final[TypeAdapter[tuple[str, ...]]] = TypeAdapter(tuple[Inside, ...])
"""Files of an export."""


def read_kept(output: Storage, file: str, kind: TypeAdapter[_Read], default: _Read) -> _Read:
    """What a run kept, or the default if there is nothing.

    Raises:
        MaskMillError: ``file_damaged``.
    """
    try:
        return kind.validate_json(output.read_bytes(file))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise damaged(output, file, error) from None


def damaged(output: Storage, file: str, error: ValueError) -> Damaged:
    """``file_damaged`` for a file that a run kept."""
    why = first_problem(error) if isinstance(error, ValidationError) else str(error)
    return Damaged(
        "file_damaged",
        f"{output.uri_of(file)} is damaged: {why}.",
        "Delete it, and run the same command again; or name another --output.",
    )


def read_mark(output: Storage, name: str) -> tuple[Mark, list[bytes]]:
    """The mark of a finished part, and a line for each image."""
    file = _file_of(name)
    try:
        head, *lines = output.read_bytes(file).splitlines()
        return Mark.model_validate_json(head), lines
    except ValueError as error:
        raise damaged(output, file, error) from None


def write_mark(output: Storage, name: str, mark: Mark, lines: Sequence[bytes]) -> None:
    """Mark a part as finished, with the entries of its images, as JSON."""
    output.write_bytes(_file_of(name), b"\n".join([mark.model_dump_json().encode(), *lines, b""]))


def is_whole(output: Storage, mark: Mark) -> bool:
    """Whether all files of a part are there that the disk was not made sure of."""
    for name, wanted in zip(mark.files, mark.sums, strict=False):  # older versions have no sums
        if wanted is None:
            continue
        try:
            if crc32(output.read_bytes(name)) != wanted:
                return False
        except FileNotFoundError:
            return False
    return True


def delete_mark(output: Storage, name: str) -> None:
    """Take the mark of a part away."""
    output.delete(_file_of(name))


def marked_parts(output: Storage) -> list[str]:
    """Names of the parts that have a mark."""
    return [name.rpartition("/")[2].removesuffix(".jsonl") for name in output.list(_PARTS)]


def files_of(output: Storage, name: str) -> list[str]:
    """Files that an earlier run wrote for a part."""
    try:
        return list(read_mark(output, name)[0].files)
    except FileNotFoundError:
        return []


def _file_of(name: str) -> str:
    return f"{_PARTS}/{name}.jsonl"


def ahead(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Results in order, a few of them at once."""
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(items), _READERS):
            yield from pool.map(work, items[start : start + _READERS])
