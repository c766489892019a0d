"""Parquet: lists of addresses, manifests, and data sets that hold the images themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.sources.found import OPTIONAL_COLUMNS, ImageList, bad_manifest, entry_uri, missing
from pipeline.files.faults import says_damage
from pipeline.files.redaction import without_signature
from pipeline.files.storage import open_storage, storage_errors

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
"""Names of a column of images that are preferred to others."""


def read_parquet_files(uris: Sequence[str]) -> ImageList:
    """The images of several files, as those of a data set of Hugging Face."""
    found = ImageList([])
    for uri in uris:
        one = read_parquet(uri)
        if one.ids is not None or one.optional:
            raise bad_manifest(uri, "a manifest or a list with byte ranges among several files")
        found.uris += one.uris
    return found


def read_parquet(uri: str) -> ImageList:
    """Read a list, or a manifest if there is a column ``id``, or a table with the images themselves.

    Raises:
        WrongUse: ``source_missing``, ``source_invalid``.
    """
    with _opened(uri) as parquet:
        present = parquet.schema_arrow.names
        if not parquet.metadata.num_rows:
            raise bad_manifest(uri, "it has no rows")
        if "uri" not in present:
            return _cells(uri, parquet)
        kinds = {"uri": pa.string(), "id": pa.int64(), **OPTIONAL_COLUMNS}
        table = parquet.read(columns=[column for column in kinds if column in present])
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
        uris = [entry_uri(uri, entry, f"{uri}: row {row}") for row, entry in enumerate(uris)]
    return ImageList(uris, columns, ids)


@contextlib.contextmanager
def _opened(uri: str) -> Iterator[pq.ParquetFile]:
    place = open_storage(uri)
    try:
        with storage_errors(without_signature(uri)):
            file = place.arrow_filesystem().open_input_file(place.path())
    except FileNotFoundError:
        raise missing(uri, "there is no") from None
    with file:
        try:
            yield pq.ParquetFile(file)
        except (pa.ArrowException, OSError) as error:
            if not says_damage(error):
                raise
            raise bad_manifest(uri, f"not a Parquet file ({error})") from None
        except UnicodeDecodeError as error:
            raise bad_manifest(uri, f"it has text that is not UTF-8 ({error})") from None


def _cells(uri: str, parquet: pq.ParquetFile) -> ImageList:
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
            paths = (
                parquet.read(columns=[f"{column}.path"]).column(0).combine_chunks().field("path").to_pylist()
            )
            if None in paths:
                raise bad_manifest(uri, f"row {paths.index(None)}: {column} has neither bytes nor a path")
            return ImageList([entry_uri(uri, path, f"{uri}: row {row}") for row, path in enumerate(paths)])
    return ImageList([f"{uri}#{column}={row}" for row in range(rows)])


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
