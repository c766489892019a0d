"""Image sources: a folder, a glob, a remote prefix, a list file, or an existing manifest.

To add a kind of source, add a function that returns an ``ImageList`` and call it from ``find_images``.
"""

from __future__ import annotations

import csv
import errno
import glob
import io
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import MaskMillError, WrongUse
from pipeline.files.faults import says_damage
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.redaction import without_signature
from pipeline.files.storage import canonical_uri, is_remote, open_storage, storage_errors

#: File name extensions of images, in lower case.
IMAGE_EXTENSIONS: Final = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjp", ".pjpeg", ".mpo", ".png", ".apng", ".webp",
    ".tif", ".tiff", ".bmp", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".ppm", ".pgm", ".pbm", ".pnm",
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
_SHOWN = 3  # examples of each kind of what was left out


PathsByReason = dict[str, list[str]]


@dataclass
class ImageList:
    """The images of a source, in order, duplicates included.

    Attributes:
        uris: canonical; those of a manifest are unchecked.
        optional: values of those ``OPTIONAL_COLUMNS`` that the source has.
        ids: ids from a manifest, unchecked.
        left_out: paths that were found and not taken, by reason.
    """

    uris: list[str]
    optional: dict[str, list[int | None]] = field(default_factory=dict)
    ids: list[int] | None = None
    left_out: PathsByReason = field(default_factory=dict)


def describe_left_out(left_out: PathsByReason) -> str:
    """How many paths were not taken, why, and some of them, in one line; "" if there is none.

    >>> describe_left_out({".heic": ["/a/x.heic", "/a/y.heic"]})
    '2 not taken: 2 × .heic (x.heic, y.heic)'
    """
    reasons = sorted(left_out.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = []
    for reason, paths in reasons:
        names = ", ".join(_name(path) for path in sorted(paths)[:_SHOWN])
        more = ", …" if len(paths) > _SHOWN else ""
        shown.append(f"{len(paths):,} × {reason} ({names}{more})")
    total = sum(len(paths) for paths in left_out.values())
    return f"{total:,} not taken: {'; '.join(shown)}" if total else ""


def _name(path: str) -> str:
    name = without_signature(path).rstrip("/").rpartition("/")[2]
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _leave_out(left_out: PathsByReason, reason: str, path: str) -> None:
    left_out.setdefault(reason, []).append(path)


def find_images(uri: str) -> ImageList:
    """List the images at a canonical URI, which may be any source of ``build_manifest``.

    Raises:
        WrongUse: ``source_missing``, ``source_invalid``.
    """
    return _remote(uri) if is_remote(uri) else _local(uri)


def _local(uri: str) -> ImageList:
    left_out: PathsByReason = {}
    if os.path.isdir(uri):
        return _images_among(_files_below([uri], left_out), uri, left_out)
    if os.path.exists(uri):
        return _file(uri)
    if _WILDCARDS.isdisjoint(uri):
        raise _missing(uri, "there is no")
    matches = sorted(glob.glob(uri, recursive=True))
    if not matches:
        raise _missing(uri, "nothing matches")
    files = [match for match in matches if not os.path.isdir(match) and _is_file(match, left_out)]
    if "**" not in uri:  # "**" has already matched the files in folders
        files += _files_below([match for match in matches if os.path.isdir(match)], left_out)
    return _images_among(files, uri, left_out)


def _is_file(path: str, left_out: PathsByReason) -> bool:
    """Whether a path is a regular file, or a link to one; else it is left out."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        _leave_out(left_out, _link_trouble(error), path)
        return False
    if not stat.S_ISREG(mode):
        _leave_out(left_out, "neither file nor folder", path)
    return stat.S_ISREG(mode)


def _link_trouble(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "broken link"
    return "link to itself" if error.errno == errno.ELOOP else f"unreadable ({error.strerror})"


def _files_below(folders: Sequence[str], left_out: PathsByReason) -> list[str]:
    """List files recursively, following symbolic links but entering each real folder only once.

    Hidden names are skipped, as a shell does; what is neither a file nor a folder is left out.
    """
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
                        if not entry.is_dir(follow_symlinks=False):
                            _leave_out(left_out, "hidden", entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        files.append(entry.path)
                    elif os.path.isdir(entry.path):
                        linked.append(entry.path)
                    elif _is_file(entry.path, left_out):
                        files.append(entry.path)
        except PermissionError:
            raise WrongUse(
                "source_missing",
                f"no permission to read the folder {folder}",
                "Grant read access to it, or give a source without it.",
            ) from None
        except OSError as error:
            if folder in folders:
                raise
            _leave_out(left_out, f"folder that cannot be read ({error.strerror})", folder)
        linked.sort()
    return files


def _remote(uri: str) -> ImageList:
    # Web servers offer no listing, and "?" starts a query there.
    if uri.lower().endswith(LIST_EXTENSIONS) or _on_the_web(uri):
        return _file(uri)
    parts = uri.split("/")
    fixed = next((n for n, part in enumerate(parts) if not _WILDCARDS.isdisjoint(part)), len(parts))
    storage, pattern = open_storage("/".join(parts[:fixed])), "/".join(parts[fixed:])
    left_out: PathsByReason = {}
    if pattern:
        names = storage.glob(pattern)
    else:
        names = []
        for name in storage.list(recursive=True):
            if "/." in f"/{name}":
                _leave_out(left_out, "hidden", name)
            else:
                names.append(name)
        if not names and not left_out and storage.exists():
            return _file(uri)
    if not names:
        raise _missing(uri, "there is nothing at")
    return _images_among([storage.uri_of(name) for name in names], uri, left_out)


def _on_the_web(uri: str) -> bool:
    return uri.startswith(("http://", "https://"))


def _images_among(files: Sequence[str], source: str, left_out: PathsByReason) -> ImageList:
    images = set()
    for name in files:
        if name.lower().endswith(IMAGE_EXTENSIONS):
            images.add(name)
        else:
            _leave_out(left_out, os.path.splitext(name)[1].lower() or "no ending", name)
    if images:
        return ImageList(sorted(images), left_out=left_out)
    raise WrongUse(
        "source_missing",
        f"no images in {source}: looked for {' '.join(IMAGE_EXTENSIONS)}; found "
        f"{describe_left_out(left_out) or 'no files at all'}",
        "Give a folder, glob or list that holds images.",
    )


# --- single files: an image, a list, a manifest ---


def _file(uri: str) -> ImageList:
    lower = (uri.partition("?")[0] if _on_the_web(uri) else uri).lower()
    if lower.endswith(".parquet"):
        return read_parquet(uri)
    if lower.endswith(".csv"):
        return _csv(uri)
    if lower.endswith(".txt"):
        uris = [
            _entry_uri(uri, entry, f"{uri}:{number}")
            for number, line in enumerate(io.StringIO(_read_text(uri)), start=1)
            if (entry := line.strip()) and not entry.startswith("#")
        ]
        if not uris:
            raise bad_list(uri, "lists no image")
        return ImageList(uris)
    if lower.endswith(IMAGE_EXTENSIONS):
        return ImageList([uri])
    raise WrongUse(
        "source_missing",
        f"{without_signature(uri)} is neither an image ({' '.join(IMAGE_EXTENSIONS)}) nor a list "
        f"({' '.join(LIST_EXTENSIONS)})",
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
            images.uris.append(_entry_uri(uri, entry, place))
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
    place = open_storage(uri)
    try:
        with storage_errors(without_signature(uri)):
            file = place.arrow_filesystem().open_input_file(place.path())
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
        except (pa.ArrowException, OSError) as error:
            if not says_damage(error):
                raise
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
    if ids is None:
        uris = [_entry_uri(uri, entry, f"{uri}: row {row}") for row, entry in enumerate(uris)]
    return ImageList(uris, columns, ids)


def _read_text(uri: str) -> str:
    try:
        data = open_storage(uri).read_bytes("") if is_remote(uri) else fetch(uri)
    except ImageError as error:
        if error.code != "not_found":
            raise bad_list(uri, error.message) from None
        raise _missing(uri, "there is no") from None
    except FileNotFoundError:
        raise _missing(uri, "there is no") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise bad_list(f"{uri}:{line}", "not UTF-8 text") from None


def _entry_uri(list_uri: str, entry: str, place: str) -> str:
    """Canonical URI of a list entry; relative entries are relative to the list's folder."""
    if not ("://" in entry or entry.startswith(("/", "file:"))):
        base = list_uri.partition("?")[0] if _on_the_web(list_uri) else list_uri
        entry = f"{base.rpartition('/')[0]}/{entry.removeprefix('./')}"
    try:
        return canonical_uri(entry)
    except MaskMillError as error:
        raise WrongUse(error.code, f"{without_signature(place)}: {error.message}", error.remedy) from None


# --- errors ---


def _missing(uri: str, what: str) -> WrongUse:
    return WrongUse(
        "source_missing",
        f"{what} {without_signature(uri)}",
        "Give an existing folder, glob, list file (.txt, .csv, .parquet) or manifest.",
    )


def bad_list(place: str, text: str) -> WrongUse:
    """``source_invalid`` for a list; ``place`` is its URI, with the line if known."""
    return WrongUse(
        "source_invalid",
        f"{without_signature(place)}: {text}",
        "A list has a path or URI per line (.txt), or a column 'uri' and, where known, offset, length, width"
        " and height (.csv, .parquet).",
    )


def bad_manifest(uri: str, text: str) -> WrongUse:
    """``source_invalid`` for a manifest."""
    return WrongUse(
        "source_invalid",
        f"{without_signature(uri)}: {text}",
        "Build it again from its source; in a plain list of images leave out the column 'id'.",
    )
