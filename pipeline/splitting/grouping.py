"""A column of the user's by which images are grouped: a patient, a video, a place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from models.errors import WrongUse
from pipeline.files.documents import read_document
from pipeline.files.storage import canonical_uri, open_storage

CODE = "document_invalid"
KEYS: Mapping[str, Callable[[Any], str | int]] = {
    "id": int,
    "uri": lambda value: canonical_uri(str(value)),
    "name": str,
}
"""Columns that say which image a row is of, the surest first."""


@dataclass(frozen=True)
class Groups:
    """The value of each image, by id, address or name of its file; see ``read_groups``."""

    values: Mapping[str | int, str]

    def of(self, row_id: int, uri: str) -> str | None:
        """The value of an image; None if there is none."""
        for key in (row_id, uri, PurePosixPath(uri).name):
            if key in self.values:
                return self.values[key]
        return None


def read_groups(file: str, column: str) -> Groups:
    """Read a column of a CSV or Parquet file whose rows name images by ``id``, ``uri`` or ``name``.

    Raises:
        MaskMillError: ``document_invalid`` if the file cannot be read, lacks a column, or gives an image two
            values; as ``pipeline.files.documents.read_document``.
    """
    folder, _, name = canonical_uri(file).rpartition("/")
    storage = open_storage(folder or "/")
    if not storage.exists(name):
        raise _invalid(f"There is no file {file}.")
    data = read_document(storage, name, code=CODE)
    try:
        source = pa.BufferReader(data)
        rows = pq.read_table(source) if name.endswith(".parquet") else pyarrow.csv.read_csv(source)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _invalid(f"{file} cannot be read: {' '.join(str(error).split())[:200]}") from None
    keys = [key for key in KEYS if key in rows.column_names]
    lacking = [column] if column not in rows.column_names else [] if keys else [" or ".join(KEYS)]
    if lacking:
        raise _invalid(f"{file} has no column {lacking[0]}; it has {', '.join(rows.column_names)}.")
    values: dict[str | int, str] = {}
    for key, value in zip(rows[keys[0]].to_pylist(), rows[column].to_pylist(), strict=True):
        if key is None or value is None:
            continue
        try:
            place: int | str = (
                int(key) if keys[0] == "id" else canonical_uri(str(key)) if keys[0] == "uri" else str(key)
            )
        except ValueError:
            raise _invalid(f"{file}: {key!r} is no id.") from None
        if values.setdefault(place, str(value)) != str(value):
            raise _invalid(f"{file} gives {key} two values of {column}: {values[place]} and {value}.")
    return Groups(values)


def _invalid(why: str) -> WrongUse:
    return WrongUse(
        CODE, why, "Give a CSV or Parquet file with id, uri or name (of the image's file), and the column."
    )
