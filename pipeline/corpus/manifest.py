"""The manifest: which images there are, each under a stable 64-bit id.

``id`` is the first 8 bytes of BLAKE2b over the canonical URI (and the byte range, if there is one), so an
image has the same id in every manifest that names it. Optional columns are there only if something is known:
``offset``/``length`` (bytes within the URI), ``width``/``height`` (pixels).
"""

from __future__ import annotations

import csv
import glob
import io
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import MaskMillError, WrongUse
from pipeline.files.storage import Storage, canonical_uri, is_remote, open_storage

#: File name endings taken for images, whatever their case.
IMAGE_EXTENSIONS: Final = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif",
)  # fmt: skip

_LIST_EXTENSIONS = (".txt", ".csv", ".parquet")
_OPTIONAL = {"offset": pa.int64(), "length": pa.int64(), "width": pa.int32(), "height": pa.int32()}
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True)
class Manifest:
    """What ``collect`` found.

    Attributes:
        table: columns id int64, uri string, and as far as known offset, length int64, width, height int32.
        duplicates: rows left out because an earlier row names the same image.
    """

    table: pa.Table
    duplicates: int = 0


@dataclass
class _Rows:
    uris: list[str]
    extras: dict[str, list[int | None]]


def build_manifest(
    source: str | os.PathLike[str], *, recursive: bool = True, extensions: Iterable[str] = IMAGE_EXTENSIONS
) -> pa.Table:
    """The table of ``collect``, for those who do not care how many duplicates there were."""
    return collect(source, recursive=recursive, extensions=extensions).table


def collect(
    source: str | os.PathLike[str], *, recursive: bool = True, extensions: Iterable[str] = IMAGE_EXTENSIONS
) -> Manifest:
    """Find images and give them ids.

    Args:
        source: one of
            - a folder, here or remote (``s3://bucket/prefix``): its images, sorted; names that begin with a
              dot are left out; symbolic links are followed, but no folder is entered twice;
            - a glob (``photos/**/*.jpg``); local folders that it matches are searched like the above;
            - a list: ``.txt`` with a path or URI per line (# begins a comment line), or ``.csv``/``.parquet``
              with a column ``uri`` and optionally offset, length, width, height; relative paths start at the
              list's folder;
            - a manifest made before (Parquet with ``id``), which is checked;
            - a single image.
        recursive: whether to enter folders within the folder.
        extensions: file name endings to take, in any case; not applied to lists.

    Raises:
        MaskMillError: ``source_missing``, ``source_missing``, ``source_invalid``, ``source_invalid``,
            ``source_invalid``, ``source_invalid``, ``source_missing``, ``storage_*``.
    """
    wanted = _endings(extensions)
    uri = canonical_uri(source)
    rows = _remote_rows(uri, recursive, wanted) if is_remote(uri) else _local_rows(uri, recursive, wanted)
    return _assemble(rows, origin=uri)


def stable_id(uri: str, *, offset: int | None = None, length: int | None = None) -> int:
    """Signed 64-bit id of a canonical URI, or of a byte range within it."""
    key = uri.encode()
    if offset is not None:
        key += b"\0%d:%d" % (offset, -1 if length is None else length)
    return int.from_bytes(blake2b(key).digest()[:8], "big", signed=True)


def read_manifest(path: str | os.PathLike[str]) -> pa.Table:
    """Read and check a manifest.

    Raises:
        MaskMillError: ``source_missing``; ``source_invalid`` if columns, ids or URIs are wrong.
    """
    uri = canonical_uri(path)
    table = _read_parquet(uri)
    if "id" not in table.column_names:
        raise _bad_manifest(uri, f"no column 'id' (columns: {', '.join(table.column_names)})")
    return _assemble(_parquet_rows(table, uri), origin=uri).table


def write_manifest(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write a manifest to one Parquet file, whole or not at all."""
    uri = canonical_uri(path)
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    _folder_of(uri).write_bytes(PurePosixPath(uri).name, buffer.getvalue())


# --- finding files ---


def _local_rows(uri: str, recursive: bool, wanted: tuple[str, ...]) -> _Rows:
    if os.path.isdir(uri):
        return _found(*_scan_all([uri], recursive, wanted), source=uri, wanted=wanted)
    if os.path.exists(uri):
        return _file_rows(uri, wanted)
    if not _WILDCARDS.isdisjoint(uri):
        matches = sorted(glob.glob(uri, recursive=True))
        if not matches:
            raise _missing(uri, "nothing matches")
        folders = [match for match in matches if os.path.isdir(match)]
        files = [match for match in matches if not os.path.isdir(match)]
        # "**" has already matched what is inside the folders it matched.
        found, others = _scan_all(folders if "**" not in uri else [], recursive, wanted)
        for file in files:
            (found if file.lower().endswith(wanted) else others).append(file)
        return _found(sorted(set(found)), others, source=uri, wanted=wanted)
    raise _missing(uri, "there is no")


def _scan_all(
    folders: Sequence[str], recursive: bool, wanted: tuple[str, ...]
) -> tuple[list[str], list[str]]:
    """Images and other files below folders; each real folder is entered once."""
    found: list[str] = []
    others: list[str] = []
    visited: set[tuple[int, int]] = set()
    pending = list(reversed(folders))
    linked: list[str] = []
    while pending or linked:
        # Real folders first, so that what is reachable both ways keeps its real path.
        folder = pending.pop() if pending else linked.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = entry.name
                    if name.startswith("."):
                        continue
                    if entry.is_dir():
                        if recursive:
                            (linked if entry.is_symlink() else pending).append(entry.path)
                    elif entry.is_file():
                        (found if name.lower().endswith(wanted) else others).append(entry.path)
        except PermissionError:
            raise WrongUse(
                "source_missing",
                f"no permission to read the folder {folder}",
                "Grant read access to it, or give a source without it.",
            ) from None
        linked.sort()
    found.sort()
    return found, others


def _remote_rows(uri: str, recursive: bool, wanted: tuple[str, ...]) -> _Rows:
    # Web servers list nothing, and "?" begins a query there.
    if uri.lower().endswith(_LIST_EXTENSIONS) or uri.startswith(("http://", "https://")):
        return _file_rows(uri, wanted)
    parts = uri.split("/")
    fixed = next((n for n, part in enumerate(parts) if not _WILDCARDS.isdisjoint(part)), len(parts))
    storage, pattern = open_storage("/".join(parts[:fixed])), "/".join(parts[fixed:])
    names = storage.glob(pattern) if pattern else storage.list(recursive=recursive)
    shown = [storage.uri_of(name) for name in names if pattern or not _hidden(name)]
    if not shown and not pattern and storage.exists():
        return _file_rows(uri, wanted)
    if not shown:
        raise _missing(uri, "nothing is at")
    found = [name for name in shown if name.lower().endswith(wanted)]
    others = [name for name in shown if not name.lower().endswith(wanted)]
    return _found(sorted(found), others, source=uri, wanted=wanted)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _found(found: list[str], others: list[str], *, source: str, wanted: tuple[str, ...]) -> _Rows:
    if found:
        return _Rows(found, {})
    endings = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in others)
    seen = ", ".join(f"{count} × {ending}" for ending, count in endings.most_common(8)) or "no files at all"
    raise WrongUse(
        "source_missing",
        f"no images in {source}: looked for {' '.join(wanted)}; found {seen}",
        "Give a folder, glob or list that holds images, or name other file endings.",
    )


# --- lists and manifests ---


def _file_rows(uri: str, wanted: tuple[str, ...]) -> _Rows:
    lower = uri.lower()
    if lower.endswith(".parquet"):
        return _parquet_rows(_read_parquet(uri), uri)
    if lower.endswith(".txt"):
        return _Rows([_beside(uri, line) for line in _text_lines(uri)], {})
    if lower.endswith(".csv"):
        return _csv_rows(uri)
    if lower.endswith(wanted):
        return _Rows([uri], {})
    raise WrongUse(
        "source_missing",
        f"{uri} is neither an image ({' '.join(wanted)}) nor a list ({' '.join(_LIST_EXTENSIONS)})",
        "Give a folder, a glob, a list file or a manifest.",
    )


def _read_text(uri: str) -> str:
    try:
        data = _folder_of(uri).read_bytes(PurePosixPath(uri).name)
    except FileNotFoundError:
        raise _missing(uri, "there is no") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _bad_list(uri, line, "not UTF-8 text") from None


def _text_lines(uri: str) -> Iterator[str]:
    entries = 0
    for line in io.StringIO(_read_text(uri)):
        entry = line.strip()
        if entry and not entry.startswith("#"):
            entries += 1
            yield entry
    if not entries:
        raise _bad_list(uri, None, "names no image")


def _csv_rows(uri: str) -> _Rows:
    reader = csv.DictReader(io.StringIO(_read_text(uri), newline=""))
    columns = [name.strip() for name in reader.fieldnames or ()]
    if "uri" not in columns:
        raise _bad_list(uri, 1, f"no column 'uri' (columns: {', '.join(columns) or 'none'})")
    reader.fieldnames = columns
    extras: dict[str, list[int | None]] = {name: [] for name in _OPTIONAL if name in columns}
    uris: list[str] = []
    try:
        for row in reader:
            entry = (row["uri"] or "").strip()
            if not entry:
                raise _bad_list(uri, reader.line_num, "the uri is empty")
            uris.append(_beside(uri, entry))
            for name, values in extras.items():
                text = (row[name] or "").strip()
                try:
                    values.append(int(text) if text else None)
                except ValueError:
                    raise _bad_list(uri, reader.line_num, f"{name} '{text}' is not a whole number") from None
    except csv.Error as error:
        raise _bad_list(uri, reader.line_num, str(error)) from None
    if not uris:
        raise _bad_list(uri, None, "names no image")
    return _Rows(uris, extras)


def _read_parquet(uri: str) -> pa.Table:
    folder, name = _folder_of(uri), PurePosixPath(uri).name
    try:
        file = folder.arrow_filesystem().open_input_file(folder.path(name))
    except FileNotFoundError:
        raise _missing(uri, "there is no") from None
    with file:
        try:
            parquet = pq.ParquetFile(file)
            kept = [c for c in ("id", "uri", *_OPTIONAL) if c in parquet.schema_arrow.names]
            if "uri" not in kept:
                names = ", ".join(parquet.schema_arrow.names)
                raise _bad_manifest(uri, f"no column 'uri' (columns: {names})")
            table = parquet.read(columns=kept)
        except pa.ArrowException as error:
            raise _bad_manifest(uri, f"not a Parquet file ({error})") from None
    if not table.num_rows:
        raise _bad_manifest(uri, "it has no rows")
    return table


def _parquet_rows(table: pa.Table, origin: str) -> _Rows:
    """Rows of a list, or of a manifest, whose URIs and ids must then be what they would be if built now."""
    columns = {}
    for name, kind in (("uri", pa.string()), ("id", pa.int64()), *_OPTIONAL.items()):
        if name in table.column_names:
            try:
                columns[name] = table.column(name).cast(kind)
            except pa.ArrowException:
                raise _bad_manifest(
                    origin, f"column '{name}' is {table.column(name).type}, not {kind}"
                ) from None
    for name in ("uri", "id"):
        if name in columns and columns[name].null_count:
            raise _bad_manifest(origin, f"column '{name}' has {columns[name].null_count} empty values")
    rows = _Rows(columns["uri"].to_pylist(), {n: columns[n].to_pylist() for n in _OPTIONAL if n in columns})
    if "id" not in columns:
        rows.uris = [_beside(origin, uri) for uri in rows.uris]
        return rows
    given = columns["id"].to_pylist()
    for number, (uri, identity, expected) in enumerate(zip(rows.uris, given, _ids(rows), strict=True)):
        if canonical_uri(uri) != uri:
            raise _bad_manifest(
                origin, f"row {number}: uri '{uri}' is not canonical ('{canonical_uri(uri)}')"
            )
        if identity != expected:
            raise _bad_manifest(origin, f"row {number}: id {identity} is not the id of '{uri}' ({expected})")
    if len(set(given)) < len(given):
        again = next(uri for uri, count in Counter(rows.uris).items() if count > 1)
        raise _bad_manifest(origin, f"'{again}' appears twice")
    return rows


def _beside(list_uri: str, entry: str) -> str:
    """Canonical URI of an entry of a list; relative ones start at the list's folder."""
    if "://" in entry or entry.startswith(("/", "file:")):
        return canonical_uri(entry)
    folder = list_uri.rpartition("/")[0]
    if not is_remote(list_uri):
        return canonical_uri(f"{folder}/{entry}")
    return canonical_uri(f"{folder}/{entry.removeprefix('./')}")


def _folder_of(uri: str) -> Storage:
    return open_storage(uri.rpartition("/")[0] or "/")


# --- ids ---


def _ids(rows: _Rows) -> list[int]:
    if "offset" not in rows.extras:
        return [stable_id(uri) for uri in rows.uris]
    lengths = rows.extras.get("length", itertools.repeat(None))
    return [
        stable_id(uri, offset=offset, length=length)
        for uri, offset, length in zip(rows.uris, rows.extras["offset"], lengths)  # noqa: B905
    ]


def _assemble(rows: _Rows, *, origin: str) -> Manifest:
    _check_names(rows.uris)
    _check_numbers(rows, origin)
    ids = _ids(rows)
    keys = list(
        zip(rows.uris, *(rows.extras[n] for n in ("offset", "length") if n in rows.extras), strict=True)
    )
    first: dict[int, int] = {}
    kept: list[int] = []
    for number, identity in enumerate(ids):
        earlier = first.setdefault(identity, number)
        if earlier == number:
            kept.append(number)
        elif keys[earlier] != keys[number]:
            raise WrongUse(
                "source_invalid",
                f"two images share the id {identity}: {_name(keys[earlier])} and {_name(keys[number])}",
                "Rename or move one of them.",
            )
    columns = {"id": pa.array(ids, pa.int64()), "uri": pa.array(rows.uris, pa.string())}
    for name, kind in _OPTIONAL.items():
        if any(value is not None for value in rows.extras.get(name, ())):
            columns[name] = pa.array(rows.extras[name], kind)
    table = pa.table(columns)
    duplicates = len(ids) - len(kept)
    return Manifest(table.take(pa.array(kept, pa.int64())) if duplicates else table, duplicates)


def _name(key: Sequence[object]) -> str:
    return " ".join(f"'{part}'" if isinstance(part, str) else str(part) for part in key)


def _check_names(uris: list[str]) -> None:
    bad = [uri for uri in uris if not _is_utf8(uri)]
    if bad:
        shown = bad[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise WrongUse(
            "source_invalid",
            f"{len(bad)} file name(s) are not valid UTF-8, the first: {shown}",
            "Rename them (for example with convmv), so that they can be stored in Parquet.",
        )


def _is_utf8(uri: str) -> bool:
    try:
        uri.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_numbers(rows: _Rows, origin: str) -> None:
    limits = {"offset": 0, "length": 1, "width": 1, "height": 1}
    highest = {"offset": 2**63, "length": 2**63, "width": 2**31, "height": 2**31}
    for name, values in rows.extras.items():
        for number, value in enumerate(values):
            if value is not None and not limits[name] <= value < highest[name]:
                raise _bad_list(origin, None, f"row {number}: {name} {value} is out of range")
    offsets, lengths = (rows.extras.get(n, [None] * len(rows.uris)) for n in ("offset", "length"))
    for number, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        if (offset is None) != (length is None):
            raise _bad_list(origin, None, f"row {number}: offset and length must be given together")


# --- errors ---


def _missing(uri: str, what: str) -> MaskMillError:
    return WrongUse(
        "source_missing",
        f"{what} {uri}",
        "Give an existing folder, glob, list file (.txt, .csv, .parquet) or manifest.",
    )


def _bad_list(uri: str, line: int | None, text: str) -> MaskMillError:
    place = uri if line is None else f"{uri}:{line}"
    return WrongUse(
        "source_invalid",
        f"{place}: {text}",
        "A list has a path or URI per line (.txt), or a column 'uri' and, where known, offset, length, width"
        " and height (.csv, .parquet).",
    )


def _bad_manifest(uri: str, text: str) -> MaskMillError:
    return WrongUse(
        "source_invalid",
        f"{uri}: {text}",
        "Build it again from its source; in a plain list of images leave out the column 'id'.",
    )


def _endings(extensions: Iterable[str]) -> tuple[str, ...]:
    endings = tuple(dict.fromkeys("." + e.strip().lower().lstrip(".") for e in extensions if e.strip(" .")))
    if not endings:
        raise WrongUse("source_missing", "no file endings to look for", "Give at least one, such as .jpg.")
    return endings
