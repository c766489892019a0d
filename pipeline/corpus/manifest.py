"""The manifest: a table of images with stable 64-bit ids.

``id`` is the first 8 bytes of BLAKE2b over the canonical URI and the byte range, if any, so an image has the
same id in every manifest. The optional columns ``offset`` and ``length`` (bytes within the URI), ``width``
and ``height`` (pixels) are present only if known for at least one image.

What grants access, such as the signature of a presigned URL, is not part of an address: it is neither stored
nor hashed, so a list that was signed anew names the same images. A manifest in memory has it in the column
``ADDRESS``, from which a run fetches; ``write_manifest`` leaves this column out.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Callable
from hashlib import blake2b
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import WrongUse
from pipeline.corpus.sources.find import find_images
from pipeline.corpus.sources.found import (
    OPTIONAL_COLUMNS,
    ImageList,
    bad_list,
    bad_manifest,
    describe_left_out,
)
from pipeline.corpus.sources.parquet import read_parquet
from pipeline.files.redaction import without_signature
from pipeline.files.storage import canonical_uri, open_storage

ADDRESS = "address"
"""Column of a manifest in memory, if any address is signed: where to fetch from."""


def build_manifest(
    source: str | os.PathLike[str], *, notice: Callable[[str], object] = lambda _line: None
) -> pa.Table:
    """Find images and assign ids. Of several rows for one image, the first is kept.

    Args:
        notice: called with a line on what was found and not taken, if anything was.
        source: one of
            - a folder, local or remote (``s3://bucket/prefix``): searched recursively, sorted; hidden names
              are skipped; symbolic links are followed, but no folder is entered twice;
            - a glob (``photos/**/*.jpg``); matching local folders are searched as above;
            - a list: ``.txt`` with a path or URI per line (# starts a comment line), ``.csv``/``.parquet``
              with a column ``uri`` and optionally offset, length, width, height, or ``.jsonl`` with an object
              per line; relative paths are relative to the list's folder;
            - COCO's ``.json``;
            - ``.tar`` archives, as of WebDataset: one, a glob, or a folder with no images beside them;
            - Parquet with the images themselves, as of Hugging Face: likewise;
            - an existing manifest (Parquet with ``id``), which is checked;
            - a single image.

    Returns:
        Columns id int64, uri string, and where known offset, length int64, width, height int32, ``ADDRESS``
        string.

    Raises:
        MaskMillError: ``source_missing``, ``source_invalid``, ``password_in_address``, ``storage_*``.
    """
    uri = canonical_uri(source)
    images = find_images(uri)
    table = _table(images, uri)
    repeated = len(images.uris) - table.num_rows
    lines = [
        describe_left_out(images.left_out),
        f"{repeated:,} listed more than once, and taken once" if repeated else "",
    ]
    if any(lines):
        notice(f"{without_signature(uri)}: {'; '.join(line for line in lines if line)}")
    return table


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
    images = read_parquet(uri)
    if images.ids is None:
        raise bad_manifest(uri, "no column 'id'")
    return _table(images, uri)


def write_manifest(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write a manifest to one Parquet file, atomically, without signatures."""
    uri = canonical_uri(path)
    table = table.drop_columns([ADDRESS]) if ADDRESS in table.column_names else table
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    open_storage(uri.rpartition("/")[0] or "/").write_bytes(PurePosixPath(uri).name, buffer.getvalue())


def _table(images: ImageList, source: str) -> pa.Table:
    _check_names(images.uris)
    _check_numbers(images, source)
    unknown = [None] * len(images.uris)
    offsets, lengths = (images.optional.get(name, unknown) for name in ("offset", "length"))
    uris = [without_signature(uri) for uri in images.uris]
    keys = list(zip(uris, offsets, lengths, strict=True))
    ids = [stable_id(uri, offset=offset, length=length) for uri, offset, length in keys]
    if images.ids is not None:
        _check_ids(images.ids, ids, images.uris, source)
    first: dict[int, int] = {}
    for row, identity in enumerate(ids):
        earlier = first.setdefault(identity, row)
        if keys[earlier] != keys[row]:
            raise WrongUse(
                "source_invalid",
                f"two images share the id {identity}: {_shown(keys[earlier])} and {_shown(keys[row])}",
                "Rename or move one of them.",
            )
    columns = {"id": pa.array(ids, pa.int64()), "uri": pa.array(uris, pa.string())}
    for name, kind in OPTIONAL_COLUMNS.items():
        if name in images.optional:
            columns[name] = pa.array(images.optional[name], kind)
    if uris != images.uris:
        columns[ADDRESS] = pa.array(images.uris, pa.string())
    table = pa.table(columns)
    if len(first) < len(ids):
        table = table.take(pa.array(first.values(), pa.int64()))
    unknown_columns = [
        name for name in OPTIONAL_COLUMNS if name in columns and table[name].null_count == len(table)
    ]
    return table.drop_columns(unknown_columns)


def _shown(key: tuple[str, int | None, int | None]) -> str:
    uri, *known = key
    return " ".join([f"'{uri}'", *(str(number) for number in known if number is not None)])


def _check_names(uris: list[str]) -> None:
    bad = []
    for uri in uris:
        try:
            uri.encode()
        except UnicodeEncodeError:
            bad.append(uri)
    if bad:
        shown = bad[0].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        raise WrongUse(
            "source_invalid",
            f"{len(bad)} file name(s) are not valid UTF-8, the first: {shown}",
            "Rename them (for example with convmv), so that they can be stored in Parquet.",
        )


def _check_numbers(images: ImageList, source: str) -> None:
    for name, values in images.optional.items():
        lowest = 0 if name == "offset" else 1
        end = 2 ** (OPTIONAL_COLUMNS[name].bit_width - 1)
        for row, value in enumerate(values):
            if value is not None and not lowest <= value < end:
                raise bad_list(source, f"row {row}: {name} {value} is out of range")
    unknown = [None] * len(images.uris)
    offsets, lengths = (images.optional.get(name, unknown) for name in ("offset", "length"))
    for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True)):
        if (offset is None) != (length is None):
            raise bad_list(source, f"row {row}: offset and length must be given together")


def _check_ids(given: list[int], expected: list[int], uris: list[str], source: str) -> None:
    """Check that an existing manifest has the ids and canonical URIs that it would get now."""
    for row, (uri, identity, right) in enumerate(zip(uris, given, expected, strict=True)):
        wanted = without_signature(canonical_uri(uri))
        if wanted != uri:
            raise bad_manifest(
                source, f"row {row}: uri '{without_signature(uri)}' is not canonical ('{wanted}')"
            )
        if identity != right:
            raise bad_manifest(source, f"row {row}: id {identity} is not the id of '{uri}' ({right})")
    if len(set(given)) < len(given):
        again = next(uri for uri, count in Counter(uris).items() if count > 1)
        raise bad_manifest(source, f"'{again}' appears twice")
