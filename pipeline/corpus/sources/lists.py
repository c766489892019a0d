"""Lists of images: a path a line, a table, or an object a line."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import IO

from pipeline.corpus.sources.found import (
    BATCH,
    OPTIONAL_COLUMNS,
    ImageList,
    bad_list,
    entry_uri,
    missing,
    on_the_web,
)
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.redaction import without_signature
from pipeline.files.storage import is_remote, open_storage, storage_errors

NAMES = ("uri", "file_name", "image", "path", "url")
"""Keys of a JSON object that may hold the address of its image; the first that is there counts."""


class _Rows:
    """Gathers the rows of a list, and gives them in batches."""

    def __init__(self, uri: str, columns: Iterable[str] = ()) -> None:
        self._uri = uri
        self._columns = list(columns)
        self._any = False
        self._new()

    def _new(self) -> None:
        self._uris: list[str] = []
        self._optional: dict[str, list[int | None]] = {name: [] for name in self._columns}

    def add(self, uri: str, numbers: Mapping[str, int | None]) -> Iterator[ImageList]:
        self._any = True
        self._uris.append(uri)
        for name, values in self._optional.items():
            values.append(numbers[name])
        if len(self._uris) >= BATCH:
            yield self._batch()

    def end(self) -> Iterator[ImageList]:
        if not self._any:
            raise bad_list(self._uri, "lists no image")
        if self._uris:
            yield self._batch()

    def _batch(self) -> ImageList:
        known = {
            name: values
            for name, values in self._optional.items()
            if any(value is not None for value in values)
        }
        images = ImageList(self._uris, known)
        self._new()
        return images


def read_lines(uri: str) -> Iterator[ImageList]:
    """Read a list with a path or URI per line."""
    rows = _Rows(uri)
    for number, line in _lines(uri):
        if (entry := line.strip()) and not entry.startswith("#"):
            yield from rows.add(entry_uri(uri, entry, f"{uri}:{number}"), {})
    yield from rows.end()


def read_csv(uri: str) -> Iterator[ImageList]:
    """Read a table with a column ``uri``."""
    reader = csv.DictReader(line for _, line in _lines(uri))
    try:
        columns = [name.strip() for name in reader.fieldnames or ()]
        if "uri" not in columns:
            raise bad_list(f"{uri}:1", f"no column 'uri' (columns: {', '.join(columns) or 'none'})")
        reader.fieldnames = columns
        rows = _Rows(uri, [name for name in OPTIONAL_COLUMNS if name in columns])
        for row in reader:
            place = f"{uri}:{reader.line_num}"
            entry = (row["uri"] or "").strip()
            if not entry:
                raise bad_list(place, "the uri is empty")
            numbers: dict[str, int | None] = {}
            for name in OPTIONAL_COLUMNS:
                text = (row.get(name) or "").strip()
                try:
                    numbers[name] = int(text) if text else None
                except ValueError:
                    raise bad_list(place, f"{name} '{text}' is not a whole number") from None
            yield from rows.add(entry_uri(uri, entry, place), numbers)
    except csv.Error as error:
        raise bad_list(f"{uri}:{reader.line_num}", str(error)) from None
    yield from rows.end()


def read_json_lines(uri: str) -> Iterator[ImageList]:
    """Read a list with a JSON object per line, such as the ``metadata.jsonl`` of an image folder."""
    rows = _Rows(uri, OPTIONAL_COLUMNS)
    for number, line in _lines(uri):
        if not line.strip():
            continue
        place = f"{uri}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise bad_list(place, f"not JSON: {error}") from None
        if not isinstance(row, dict):
            raise bad_list(place, "not an object")
        name = next((name for name in NAMES if name in row), None)
        entry = row.get(name) if name else None
        if not isinstance(entry, str) or not entry:
            raise bad_list(
                place, f"no address under {', '.join(NAMES)} (keys: {', '.join(map(str, row)) or 'none'})"
            )
        numbers = {column: row.get(column) for column in OPTIONAL_COLUMNS}
        for column, value in numbers.items():
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise bad_list(place, f"{column} {value!r} is not a whole number")
        yield from rows.add(entry_uri(uri, entry, place), numbers)
    yield from rows.end()


def _lines(uri: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file and their numbers; a list on the web is read as a whole."""
    with contextlib.ExitStack() as stack:
        file: IO[bytes]
        if on_the_web(uri) or not (is_remote(uri) or os.path.isfile(uri)):
            file = io.BytesIO(_content(uri))  # also tells what is wrong with what is no file
        else:
            try:
                file = stack.enter_context(open_storage(uri).open_file(""))
            except FileNotFoundError:
                raise missing(uri, "there is no") from None
            stack.enter_context(storage_errors(without_signature(uri)))
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise bad_list(f"{uri}:{number}", "not UTF-8 text") from None


def read_text(uri: str) -> str:
    """The content of a text file.

    Raises:
        WrongUse: ``input_missing``, ``dataset_invalid``.
    """
    data = _content(uri)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise bad_list(f"{uri}:{line}", "not UTF-8 text") from None


def _content(uri: str) -> bytes:
    try:
        return open_storage(uri).read_bytes("") if is_remote(uri) else fetch(uri)
    except ImageError as error:
        if error.code != "not_found":
            raise bad_list(uri, error.message) from None
        raise missing(uri, "there is no") from None
    except FileNotFoundError:
        raise missing(uri, "there is no") from None
