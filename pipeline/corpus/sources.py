"""Image sources: a folder, a glob, a remote prefix, a list file, or an existing manifest.

To add a kind of source, add a function that returns an ``ImageList`` and call it from ``find_images``.
"""

from __future__ import annotations

import csv
import glob
import io
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import WrongUse
from pipeline.files.storage import Storage, canonical_uri, is_remote, open_storage

#: File name extensions of images, in lower case.
IMAGE_EXTENSIONS: Final = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif",
)  # fmt: skip
LIST_EXTENSIONS: Final = (".txt", ".csv", ".parquet")
#: Optional columns of a list: a byte range within the URI, and the size in pixels.
OPTIONAL_COLUMNS: Final = {
    "offset": pa.int64(),
    "length": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
}

_WILDCARDS = frozenset("*?[")


@dataclass
class ImageList:
    """The images of a source, in order, duplicates included.

    Attributes:
        uris: canonical; those of a manifest are unchecked.
        optional: values of those ``OPTIONAL_COLUMNS`` that the source has.
        ids: ids from a manifest, unchecked.
    """

    uris: list[str]
    optional: dict[str, list[int | None]] = field(default_factory=dict)
    ids: list[int] | None = None


def find_images(uri: str) -> ImageList:
    """List the images at a canonical URI, which may be any source of ``build_manifest``.

    Raises:
        WrongUse: ``source_missing``, ``source_invalid``.
    """
    return _remote(uri) if is_remote(uri) else _local(uri)


def _local(uri: str) -> ImageList:
    if os.path.isdir(uri):
        return _images_among(_files_below([uri]), uri)
    if os.path.exists(uri):
        return _file(uri)
    if _WILDCARDS.isdisjoint(uri):
        raise _missing(uri, "there is no")
    matches = sorted(glob.glob(uri, recursive=True))
    if not matches:
        raise _missing(uri, "nothing matches")
    files = [match for match in matches if not os.path.isdir(match)]
    if "**" not in uri:  # "**" has already matched the files in folders
        files += _files_below([match for match in matches if os.path.isdir(match)])
    return _images_among(files, uri)


def _files_below(folders: Sequence[str]) -> list[str]:
    """List files recursively, following symbolic links but entering each real folder only once."""
    files: list[str] = []
    visited: set[tuple[int, int]] = set()
    pending = list(reversed(folders))
    linked: list[str] = []
    while pending or linked:
        # Real folders first, so that a file reachable both ways keeps its real path.
        folder = pending.pop() if pending else linked.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        (linked if entry.is_symlink() else pending).append(entry.path)
                    elif entry.is_file():
                        files.append(entry.path)
        except PermissionError:
            raise WrongUse(
                "source_missing",
                f"no permission to read the folder {folder}",
                "Grant read access to it, or give a source without it.",
            ) from None
        linked.sort()
    return files


def _remote(uri: str) -> ImageList:
    # Web servers offer no listing, and "?" starts a query there.
    if uri.lower().endswith(LIST_EXTENSIONS) or uri.startswith(("http://", "https://")):
        return _file(uri)
    parts = uri.split("/")
    fixed = next((n for n, part in enumerate(parts) if not _WILDCARDS.isdisjoint(part)), len(parts))
    storage, pattern = open_storage("/".join(parts[:fixed])), "/".join(parts[fixed:])
    if pattern:
        names = storage.glob(pattern)
    else:
        names = [name for name in storage.list(recursive=True) if "/." not in f"/{name}"]
        if not names and storage.exists():
            return _file(uri)
    if not names:
        raise _missing(uri, "there is nothing at")
    return _images_among([storage.uri_of(name) for name in names], uri)


def _images_among(files: list[str], source: str) -> ImageList:
    images = {name for name in files if name.lower().endswith(IMAGE_EXTENSIONS)}
    if images:
        return ImageList(sorted(images))
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in files)
    seen = ", ".join(f"{count} × {ending}" for ending, count in endings.most_common(8)) or "no files at all"
    raise WrongUse(
        "source_missing",
        f"no images in {source}: looked for {' '.join(IMAGE_EXTENSIONS)}; found {seen}",
        "Give a folder, glob or list that holds images.",
    )


# --- single files: an image, a list, a manifest ---


def _file(uri: str) -> ImageList:
    lower = uri.lower()
    if lower.endswith(".parquet"):
        return read_parquet(uri)
    if lower.endswith(".csv"):
        return _csv(uri)
    if lower.endswith(".txt"):
        lines = map(str.strip, io.StringIO(_read_text(uri)))
        uris = [_entry_uri(uri, line) for line in lines if line and not line.startswith("#")]
        if not uris:
            raise bad_list(uri, "lists no image")
        return ImageList(uris)
    if lower.endswith(IMAGE_EXTENSIONS):
        return ImageList([uri])
    raise WrongUse(
        "source_missing",
        f"{uri} is neither an image ({' '.join(IMAGE_EXTENSIONS)}) nor a list ({' '.join(LIST_EXTENSIONS)})",
        "Give a folder, a glob, a list file or a manifest.",
    )


def _csv(uri: str) -> ImageList:
    reader = csv.DictReader(io.StringIO(_read_text(uri), newline=""))
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
            images.uris.append(_entry_uri(uri, entry))
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


def read_parquet(uri: str) -> ImageList:
    """Read a Parquet list, or a manifest if there is a column ``id``."""
    folder, name = _folder_of(uri)
    try:
        file = folder.arrow_filesystem().open_input_file(folder.path(name))
    except FileNotFoundError:
        raise _missing(uri, "there is no") from None
    with file:
        try:
            parquet = pq.ParquetFile(file)
            present = parquet.schema_arrow.names
            if "uri" not in present:
                raise bad_manifest(uri, f"no column 'uri' (columns: {', '.join(present)})")
            kinds = {"uri": pa.string(), "id": pa.int64(), **OPTIONAL_COLUMNS}
            table = parquet.read(columns=[column for column in kinds if column in present])
        except pa.ArrowException as error:
            raise bad_manifest(uri, f"not a Parquet file ({error})") from None
    if not table.num_rows:
        raise bad_manifest(uri, "it has no rows")
    columns = {}
    for name in table.column_names:
        column = table.column(name)
        if column.null_count and name in ("uri", "id"):
            raise bad_manifest(uri, f"column '{name}' has {column.null_count} empty values")
        try:
            columns[name] = column.cast(kinds[name]).to_pylist()
        except pa.ArrowException:
            raise bad_manifest(uri, f"column '{name}' is {column.type}, not {kinds[name]}") from None
    uris, ids = columns.pop("uri"), columns.pop("id", None)
    return ImageList(uris if ids else [_entry_uri(uri, entry) for entry in uris], columns, ids)


def _read_text(uri: str) -> str:
    folder, name = _folder_of(uri)
    try:
        data = folder.read_bytes(name)
    except FileNotFoundError:
        raise _missing(uri, "there is no") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise bad_list(f"{uri}:{line}", "not UTF-8 text") from None


def _entry_uri(list_uri: str, entry: str) -> str:
    """Canonical URI of a list entry; relative entries are relative to the list's folder."""
    if "://" in entry or entry.startswith(("/", "file:")):
        return canonical_uri(entry)
    folder = list_uri.rpartition("/")[0]
    return canonical_uri(f"{folder}/{entry.removeprefix('./')}")


def _folder_of(uri: str) -> tuple[Storage, str]:
    return open_storage(uri.rpartition("/")[0] or "/"), PurePosixPath(uri).name


# --- errors ---


def _missing(uri: str, what: str) -> WrongUse:
    return WrongUse(
        "source_missing",
        f"{what} {uri}",
        "Give an existing folder, glob, list file (.txt, .csv, .parquet) or manifest.",
    )


def bad_list(place: str, text: str) -> WrongUse:
    """``source_invalid`` for a list; ``place`` is its URI, with the line if known."""
    return WrongUse(
        "source_invalid",
        f"{place}: {text}",
        "A list has a path or URI per line (.txt), or a column 'uri' and, where known, offset, length, width"
        " and height (.csv, .parquet).",
    )


def bad_manifest(uri: str, text: str) -> WrongUse:
    """``source_invalid`` for a manifest."""
    return WrongUse(
        "source_invalid",
        f"{uri}: {text}",
        "Build it again from its source; in a plain list of images leave out the column 'id'.",
    )
