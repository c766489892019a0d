"""Images inside other files: members of tar shards and cells of Parquet files.

Such an image has the address ``FILE#INSIDE``: ``shards/000.tar#cats/1.jpg`` is a member, by its name, and
``train.parquet#image=17`` the cell of column ``image`` in row 17, counted from 0. Addresses work wherever an
image is fetched. A manifest also has the byte range of each member, which saves reading the headers of its
shard once more.
"""

from __future__ import annotations

import functools
import os
import re
import tarfile
import threading
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.files.images import ImageError

LARGEST_GROUP = 2 << 30
"""Bytes of a row group's column: a cell is read with all others of its row group."""

_INSIDE = re.compile(
    r"(?P<file>[^#]*\.(?P<kind>tar|parquet)(?:\?[^#]*)?)#(?P<inside>.+)", re.IGNORECASE | re.DOTALL
)
_CELL = re.compile(r"(?P<column>.+)=(?P<row>\d{1,18})", re.DOTALL)
_reading = threading.Lock()


class Inside(NamedTuple):
    """The parts of an address ``FILE#INSIDE``."""

    file: str
    kind: str
    inside: str


class Member(NamedTuple):
    """A regular file in a tar archive: its name, and where its bytes are in the archive."""

    name: str
    offset: int
    length: int


class DamagedShard(Exception):
    """A tar archive that cannot be read to its end."""


def inside(uri: str) -> Inside | None:
    """Take an address apart; None if it is that of a file."""
    found = _INSIDE.fullmatch(uri)
    # A name with "#" is possible, and then it is the file that is meant.
    if found is None or ("://" not in uri and os.path.exists(uri)):
        return None
    return Inside(found["file"], found["kind"].lower(), found["inside"])


def tar_members(uri: str) -> Iterator[Member]:
    """The regular files of a tar archive, in its order, read from its headers.

    Raises:
        DamagedShard: at a place that cannot be read; the members before it have been given.
        FileNotFoundError: there is no such file.
        MaskMillError: ``storage_unreachable``.
    """
    from pipeline.files.storage import open_storage

    place = open_storage(uri)
    with place.open_file("") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                end = 0
                for entry in archive:
                    end = entry.offset_data
                    if not entry.isreg() or entry.issparse():
                        continue
                    end += -(-entry.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    if entry.offset_data + entry.size > size:
                        raise DamagedShard(f"it ends within {entry.name}")
                    yield Member(entry.name, entry.offset_data, entry.size)
                # Empty blocks end an archive. Without them it is not known what was cut off.
                if size < end + tarfile.BLOCKSIZE:
                    raise DamagedShard("it has no end")
        except (tarfile.TarError, EOFError, UnicodeError) as error:
            raise DamagedShard(str(error)) from error


@functools.lru_cache(maxsize=4)
def _ranges(uri: str) -> dict[str, tuple[int, int]]:
    # Of members with the same name the last counts, as for tar itself.
    return {member.name: (member.offset, member.length) for member in tar_members(uri)}


def member_range(file: str, name: str) -> tuple[int, int]:
    """Offset and length of a member's bytes.

    Raises:
        ImageError: ``not_found``, ``unreadable``.
    """
    with _reading:
        try:
            return _ranges(file)[name]
        except (KeyError, FileNotFoundError) as error:
            raise ImageError(
                "not_found", f"there is no such member in the archive, or no archive: {error}"
            ) from None
        except DamagedShard as error:
            raise ImageError("unreadable", f"the archive is damaged: {error}") from None


def read_cell(file: str, place: str) -> bytes:
    """The bytes of an image in a Parquet file.

    Args:
        file: its canonical URI.
        place: ``COLUMN=ROW``. The column is binary, or a struct with a binary field ``bytes``.

    Raises:
        ImageError: ``not_found``; ``empty`` for a null; ``too_many_bytes`` if the row group is too large;
            ``unreadable``.
    """
    cell = _CELL.fullmatch(place)
    if cell is None:
        raise ImageError("not_found", f"'{place}' names no cell: COLUMN=ROW")
    # One of several threads reads the row group, and the others wait for it.
    with _reading:
        try:
            first, values = _row_group(file, cell["column"], _group_of(file, int(cell["row"])))
        except FileNotFoundError:
            raise ImageError("not_found", "there is no such Parquet file") from None
        except pa.ArrowException as error:
            raise ImageError("unreadable", f"the Parquet file is damaged: {error}") from None
    value = values[int(cell["row"]) - first].as_py()
    if value is None:
        raise ImageError("empty", "the cell is null")
    return bytes(value)


@functools.lru_cache(maxsize=4)
def _starts(file: str) -> tuple[int, ...]:
    """The first row of each row group, and the number of rows."""
    with _opened(file) as parquet:
        starts = [0]
        for group in range(parquet.num_row_groups):
            starts.append(starts[-1] + parquet.metadata.row_group(group).num_rows)
    return tuple(starts)


def _group_of(file: str, row: int) -> int:
    starts = _starts(file)
    if row >= starts[-1]:
        raise ImageError("not_found", f"the Parquet file has {starts[-1]:,} rows")
    return next(group for group, end in enumerate(starts[1:]) if row < end)


@functools.lru_cache(maxsize=1)
def _row_group(file: str, column: str, group: int) -> tuple[int, pa.ChunkedArray]:
    """The first row of a row group, and the images in it."""
    with _opened(file) as parquet:
        index = parquet.schema_arrow.get_field_index(column)
        if index < 0:
            raise ImageError("not_found", f"the Parquet file has no column '{column}'")
        kind = parquet.schema_arrow.field(index).type
        leaf = f"{column}.bytes" if pa.types.is_struct(kind) else column
        metadata = parquet.metadata.row_group(group)
        size = sum(
            metadata.column(at).total_uncompressed_size
            for at in range(metadata.num_columns)
            if metadata.column(at).path_in_schema == leaf
        )
        if size > LARGEST_GROUP:
            raise ImageError(
                "too_many_bytes",
                f"the row group has {size:,} bytes; the limit is {LARGEST_GROUP:,}: write smaller row groups",
            )
        values = parquet.read_row_group(group, columns=[leaf]).column(0)
    if pa.types.is_struct(kind):
        values = pa.chunked_array(
            [chunk.field("bytes") for chunk in values.chunks], values.type.field("bytes").type
        )
    if not (pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type)):
        raise ImageError("not_an_image", f"column '{column}' holds {values.type}, not bytes")
    return _starts(file)[group], values


def _opened(file: str) -> pq.ParquetFile:
    from pipeline.files.storage import open_storage, storage_errors

    place = open_storage(file)
    with storage_errors(file):
        return pq.ParquetFile(place.arrow_filesystem().open_input_file(place.path()))
