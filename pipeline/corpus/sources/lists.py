"""Lists of images: a path a line, a table, or an object a line."""

from __future__ import annotations

import csv
import io
import json

from pipeline.corpus.sources.found import OPTIONAL_COLUMNS, ImageList, bad_list, entry_uri, missing
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.storage import is_remote, open_storage

NAMES = ("uri", "file_name", "image", "path", "url")
"""Keys of a JSON object that may hold the address of its image; the first that is there counts."""


def read_lines(uri: str) -> ImageList:
    """Read a list with a path or URI per line."""
    uris = [
        entry_uri(uri, entry, f"{uri}:{number}")
        for number, line in enumerate(io.StringIO(read_text(uri)), start=1)
        if (entry := line.strip()) and not entry.startswith("#")
    ]
    if not uris:
        raise bad_list(uri, "lists no image")
    return ImageList(uris)


def read_csv(uri: str) -> ImageList:
    """Read a table with a column ``uri``."""
    reader = csv.DictReader(io.StringIO(read_text(uri), newline=""))
    columns = [name.strip() for name in reader.fieldnames or ()]
    if "uri" not in columns:
        raise bad_list(f"{uri}:1", f"no column 'uri' (columns: {', '.join(columns) or 'none'})")
    reader.fieldnames = columns
    images = ImageList([], {name: [] for name in OPTIONAL_COLUMNS if name in columns})
    try:
        for row in reader:
            place = f"{uri}:{reader.line_num}"
            entry = (row["uri"] or "").strip()
            if not entry:
                raise bad_list(place, "the uri is empty")
            images.uris.append(entry_uri(uri, entry, place))
            for name, values in images.optional.items():
                text = (row[name] or "").strip()
                try:
                    values.append(int(text) if text else None)
                except ValueError:
                    raise bad_list(place, f"{name} '{text}' is not a whole number") from None
    except csv.Error as error:
        raise bad_list(f"{uri}:{reader.line_num}", str(error)) from None
    if not images.uris:
        raise bad_list(uri, "lists no image")
    return images


def read_json_lines(uri: str) -> ImageList:
    """Read a list with a JSON object per line, such as the ``metadata.jsonl`` of an image folder."""
    rows: list[tuple[str, dict[str, int | None]]] = []
    for number, line in enumerate(io.StringIO(read_text(uri)), start=1):
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
        rows.append((entry_uri(uri, entry, place), numbers))
    if not rows:
        raise bad_list(uri, "lists no image")
    optional = {column: [numbers[column] for _, numbers in rows] for column in OPTIONAL_COLUMNS}
    known = {
        column: values for column, values in optional.items() if any(value is not None for value in values)
    }
    return ImageList([address for address, _ in rows], known)


def read_text(uri: str) -> str:
    """The content of a text file.

    Raises:
        WrongUse: ``source_missing``, ``source_invalid``.
    """
    try:
        data = open_storage(uri).read_bytes("") if is_remote(uri) else fetch(uri)
    except ImageError as error:
        if error.code != "not_found":
            raise bad_list(uri, error.message) from None
        raise missing(uri, "there is no") from None
    except FileNotFoundError:
        raise missing(uri, "there is no") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise bad_list(f"{uri}:{line}", "not UTF-8 text") from None
