"""Parquet: lists of addresses, manifests, and data sets that hold the images themselves."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from pipeline.corpus.sources.found import (
    BATCH,
    OPTIONAL_COLUMNS,
    ImageList,
    bad_manifest,
    entry_uri,
    missing,
)
from pipeline.files.faults import says_damage
from pipeline.files.redaction import without_signature
from pipeline.files.storage import open_storage, storage_errors

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
"""Names of a column of images that are preferred to others."""
KINDS = {"uri": pa.string(), "id": pa.int64(), **OPTIONAL_COLUMNS}
"""Columns of a manifest."""
_COPIED_AT_ONCE = 8 << 20


def read_parquet_files(uris: Sequence[str]) -> Iterator[ImageList]:
    """The images of several files, as those of a data set of Hugging Face."""
    for uri in uris:
        for images in read_parquet(uri):
            if images.ids is not None or images.optional:
                raise bad_manifest(uri, "a manifest or a list with byte ranges among several files")
            yield images


def read_parquet(uri: str) -> Iterator[ImageList]:
    """Read a list, or a manifest if there is a column ``id``, or a table with the images themselves.

    Raises:
        WrongUse: ``input_missing``, ``dataset_invalid``.
    """
    with open_parquet(uri) as parquet:
        present = parquet.schema_arrow.names
        if not parquet.metadata.num_rows:
            raise bad_manifest(uri, "it has no rows")
        if "uri" not in present:
            yield from _cells(uri, parquet)
            return
        row = 0
        wanted = [column for column in KINDS if column in present]
        for batch in parquet.iter_batches(BATCH, columns=wanted, use_threads=False):
            yield listed(uri, pa.table(batch), row)
            row += batch.num_rows


def listed(uri: str, rows: pa.Table, first_row: int = 0) -> ImageList:
    """Rows of a list or manifest, with ``KINDS``.

    Args:
        uri: of the file.
        rows: some of its rows.
        first_row: number of the first, for errors.

    Raises:
        WrongUse: ``dataset_invalid``.
    """
    columns = {}
    for name in rows.column_names:
        column = rows.column(name)
        if column.null_count and name in ("uri", "id"):
            raise bad_manifest(uri, f"column '{name}' has {column.null_count} empty values")
        try:
            columns[name] = column.cast(KINDS[name]).to_pylist()
        except pa.ArrowException:
            raise bad_manifest(uri, f"column '{name}' is {column.type}, not {KINDS[name]}") from None
    uris, ids = columns.pop("uri"), columns.pop("id", None)
    if ids is None:
        uris = [entry_uri(uri, entry, f"{uri}: row {row}") for row, entry in enumerate(uris, start=first_row)]
    return ImageList(uris, columns, ids)


@contextlib.contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file; what is wrong with it is told in words, also while it is read.

    Raises:
        WrongUse: ``input_missing``, ``dataset_invalid``.
    """
    place = open_storage(uri)
    try:
        with storage_errors(without_signature(uri)):
            file = place.arrow_filesystem().open_input_file(place.path())
    except FileNotFoundError:
        raise missing(uri, "there is no") from None
    with file, parquet_errors(uri):
        yield pq.ParquetFile(file)


def kept_parquet(uri: str) -> pq.ParquetFile:
    """A Parquet file as it is now, open for as long as it is used. An object is copied to this machine first.

    Raises:
        WrongUse: ``input_missing``, ``dataset_invalid``.
    """
    place = open_storage(uri)
    try:
        if place.is_local:
            file = LocalFileSystem().open_input_file(place.path())
        else:
            with tempfile.NamedTemporaryFile(prefix="maskmill-ids-") as copy:
                with storage_errors(without_signature(uri)), place.open_file("") as source:
                    shutil.copyfileobj(source, copy, _COPIED_AT_ONCE)
                copy.flush()
                # What is open stays, although its name goes.
                file = LocalFileSystem().open_input_file(copy.name)
    except FileNotFoundError:
        raise missing(uri, "there is no") from None
    with parquet_errors(uri):
        return pq.ParquetFile(file)


@contextlib.contextmanager
def parquet_errors(uri: str) -> Iterator[None]:
    """Tell in words what is wrong with a Parquet file that is opened or read.

    Raises:
        WrongUse: ``dataset_invalid``.
    """
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if not says_damage(error):
            raise
        raise bad_manifest(uri, f"not a Parquet file ({error})") from None
    except UnicodeDecodeError as error:
        raise bad_manifest(uri, f"it has text that is not UTF-8 ({error})") from None


def _cells(uri: str, parquet: pq.ParquetFile) -> Iterator[ImageList]:
    """The images in a column of bytes, or of structs of bytes and path, as Hugging Face keeps them."""
    schema = parquet.schema_arrow
    known = [column.name for column in schema if _holds_images(column.type)]
    preferred = [name for name in IMAGE_COLUMNS if name in known] or known
    if not known or (len(known) > 1 and preferred == known):
        what = (
            f"several columns of bytes: {', '.join(known)}" if known else "no column 'uri' and none of images"
        )
        raise bad_manifest(uri, f"{what} (columns: {', '.join(schema.names)})")
    column = preferred[0]
    rows = parquet.metadata.num_rows
    if pa.types.is_struct(schema.field(column).type):
        first = next(parquet.iter_batches(batch_size=1, columns=[column])).column(0)[0].as_py()
        if first is not None and first["bytes"] is None and first.get("path"):
            row = 0
            for batch in parquet.iter_batches(BATCH, columns=[f"{column}.path"], use_threads=False):
                paths = batch.column(0).field("path").to_pylist()
                if None in paths:
                    at = row + paths.index(None)
                    raise bad_manifest(uri, f"row {at}: {column} has neither bytes nor a path")
                yield ImageList(
                    [entry_uri(uri, path, f"{uri}: row {at}") for at, path in enumerate(paths, start=row)]
                )
                row += len(paths)
            return
    for start in range(0, rows, BATCH):
        yield ImageList([f"{uri}#{column}={row}" for row in range(start, min(rows, start + BATCH))])


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
