"""The manifest: a table of images with stable 64-bit ids.

``id`` is the first 8 bytes of BLAKE2b over the canonical URI and the byte range, if any, so an image has the
same id in every manifest. The optional columns ``offset`` and ``length`` (bytes within the URI), ``width``
and ``height`` (pixels) are present only if known for at least one image.

What grants access, such as the signature of a presigned URL, is not part of an address: it is neither stored
nor hashed, so a list that was signed anew names the same images. A manifest in memory has it in the column
``ADDRESS``, from which a run fetches; ``write_manifest`` leaves this column out.

A source is read in batches and cut into partitions (``Corpus``), so its size does not matter. In a file, each
partition is a row group, and the key ``maskmill.partitions`` of its metadata tells their number.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import WrongUse
from pipeline.corpus.corpus import ADDRESS, Corpus, within
from pipeline.corpus.sources.find import find_images
from pipeline.corpus.sources.found import OPTIONAL_COLUMNS, ImageList, LeftOut, bad_list, bad_manifest
from pipeline.corpus.sources.parquet import (
    KINDS,
    kept_parquet,
    listed,
    open_parquet,
    parquet_errors,
    read_parquet,
)
from pipeline.corpus.spill import ALL, PARTITION, Span, Spill, keys, spans
from pipeline.files.redaction import without_signature
from pipeline.files.storage import canonical_uri, open_storage

PARTITIONS_KEY = b"maskmill.partitions"
_ALL_AT_ONCE = 1 << 62
_ROW = "row"
_ROWS = pa.schema(
    [
        ("id", pa.int64()),
        ("uri", pa.string()),
        *OPTIONAL_COLUMNS.items(),
        (ADDRESS, pa.string()),
        (_ROW, pa.int64()),
    ]
)
"""While a corpus is built: ``ADDRESS`` only where it differs, and the place in the source."""


def build_corpus(
    source: str | os.PathLike[str],
    *,
    notice: Callable[[str], object] = lambda _line: None,
    limit: int | None = None,
    most: int = PARTITION,
) -> Corpus:
    """Find images and assign ids, in memory that does not grow with their number.

    Args:
        source: as for ``build_manifest``.
        notice: called with a line on what was found and not taken, if anything was.
        limit: take only the first so many images.
        most: images of a partition, on average.

    Raises:
        MaskMillError: ``input_missing``, ``dataset_invalid``, ``wrong_use``, ``storage_*``.
    """
    uri = canonical_uri(source)
    partitioned = _partitioned(uri) if uri.endswith(".parquet") else None
    if partitioned is not None:
        return partitioned if limit is None else Corpus.of(_first(partitioned, limit))
    left_out = LeftOut()
    corpus, repeated = _gathered(find_images(uri, left_out, in_order=limit is not None), uri, limit, most)
    lines = [
        left_out.describe(),
        f"{repeated:,} listed more than once, and taken once" if repeated else "",
    ]
    if any(lines):
        notice(f"{without_signature(uri)}: {'; '.join(line for line in lines if line)}")
    return corpus


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
            - Parquet with the images themselves, as of Hugging Face: the same;
            - an existing manifest (Parquet with ``id``), which is checked;
            - a single image.

    Returns:
        Columns id int64, uri string, and where known offset, length int64, width, height int32, ``ADDRESS``
        string.

    Raises:
        MaskMillError: ``input_missing``, ``dataset_invalid``, ``wrong_use``, ``storage_*``.
    """
    return build_corpus(source, notice=notice, most=_ALL_AT_ONCE).table()


def stable_id(uri: str, *, offset: int | None = None, length: int | None = None) -> int:
    """Signed 64-bit id of a canonical URI, or of a byte range within it."""
    key = uri.encode()
    if offset is not None:
        key += b"\0%d:%d" % (offset, -1 if length is None else length)
    return int.from_bytes(blake2b(key).digest()[:8], "big", signed=True)


def read_manifest(path: str | os.PathLike[str]) -> pa.Table:
    """Read and check a manifest.

    Raises:
        MaskMillError: ``input_missing``; ``dataset_invalid`` if columns, ids or URIs are wrong.
    """
    return read_corpus(path, most=_ALL_AT_ONCE).table()


def read_corpus(path: str | os.PathLike[str], *, most: int = PARTITION) -> Corpus:
    """Read and check a manifest of any size.

    Raises:
        MaskMillError: as ``read_manifest``.
    """
    uri = canonical_uri(path)
    partitioned = _partitioned(uri)
    return partitioned or _gathered(_only_manifests(read_parquet(uri), uri), uri, None, most)[0]


def _only_manifests(batches: Iterable[ImageList], uri: str) -> Iterator[ImageList]:
    for images in batches:
        if images.ids is None:
            raise bad_manifest(uri, "no column 'id'")
        yield images


def write_manifest(manifest: pa.Table | Corpus, path: str | os.PathLike[str]) -> None:
    """Write a manifest to one Parquet file, atomically, without signatures."""
    corpus = Corpus.of(manifest) if isinstance(manifest, pa.Table) else manifest
    uri = canonical_uri(path)
    storage, name = open_storage(uri.rpartition("/")[0] or "/"), PurePosixPath(uri).name
    several = len(corpus.partitions) > 1
    columns = _columns_of(corpus)
    schema = pa.schema({column: KINDS[column] for column in columns})
    if several:
        schema = schema.with_metadata({PARTITIONS_KEY: str(len(corpus.partitions)).encode()})
    with (
        storage.new_file(name) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        for rows in corpus:
            missing = [
                pa.nulls(rows.num_rows, KINDS[c]) if c not in rows.column_names else rows[c] for c in columns
            ]
            rows = pa.table(missing, schema=schema)
            if several:
                rows = _by_id(rows)
            writer.write_table(rows, row_group_size=max(1, rows.num_rows) if several else None)


def _by_id(rows: pa.Table) -> pa.Table:
    return rows.take(pa.array(np.argsort(keys(rows["id"].to_numpy()))))


def _columns_of(corpus: Corpus) -> list[str]:
    """Columns that any partition has."""
    found = {name for rows in corpus for name in rows.column_names}
    return ["id", *(name for name in KINDS if name in found and name != "id")]


# --- a source in batches becomes partitions ---


def _gathered(batches: Iterable[ImageList], source: str, limit: int | None, most: int) -> tuple[Corpus, int]:
    """The corpus of a source, and how many of its entries repeat others."""
    spill = Spill(_ROWS)
    present: set[str] = set()
    taken: set[int] = set()
    manifest = False
    for images in batches:
        rows = _checked(images, source, spill.rows)
        manifest = manifest or images.ids is not None
        present.update(name for name in rows.column_names if rows[name].null_count < rows.num_rows)
        if limit is not None:
            rows = _up_to(rows, limit, taken)
        spill.add(rows)
        if limit is not None and len(taken) >= limit:
            break
    dropped = [name for name in (*OPTIONAL_COLUMNS, ADDRESS) if name not in present]
    partitions = spans(spill.rows, most)

    def read(span: Span) -> pa.Table:
        rows = _distinct(spill.read(span), source, manifest=manifest)
        if len(partitions) == 1:
            rows = rows.sort_by(_ROW)
        if ADDRESS in present:
            whole = pc.coalesce(rows[ADDRESS], rows["uri"])
            rows = rows.set_column(rows.column_names.index(ADDRESS), ADDRESS, whole)
        rows = rows.drop_columns([*dropped, _ROW])
        # Of a repeated image another row may have known more.
        empty = [name for name in OPTIONAL_COLUMNS if name in rows.column_names]
        empty = [name for name in empty if rows[name].null_count == rows.num_rows]
        return rows.drop_columns(empty) if len(partitions) == 1 else rows

    if len(partitions) == 1:
        corpus = Corpus.of(read(ALL))
    else:
        corpus = Corpus(read, partitions, signed=ADDRESS in present)
    return corpus, spill.rows - corpus.num_rows


def _up_to(rows: pa.Table, limit: int, taken: set[int]) -> pa.Table:
    """The rows up to that with which ``taken`` has ``limit`` ids."""
    for row, identity in enumerate(rows["id"].to_pylist()):
        taken.add(identity)
        if len(taken) >= limit:
            return rows.slice(0, row + 1)
    return rows


def _first(corpus: Corpus, limit: int) -> pa.Table:
    """The first images of a corpus, in the order of its partitions."""
    found: list[pa.Table] = []
    for rows in corpus:
        found.append(rows.slice(0, limit))
        limit -= len(found[-1])
        if limit <= 0:
            break
    return pa.concat_tables(found)


def _distinct(rows: pa.Table, source: str, *, manifest: bool) -> pa.Table:
    """Rows by id, without those that repeat one before them.

    Raises:
        WrongUse: ``dataset_invalid`` if different images share an id, or a manifest has one twice.
    """
    ids = rows["id"].to_numpy()
    again = np.flatnonzero(ids[1:] == ids[:-1]) + 1
    if not len(again):
        return rows
    key = ("uri", "offset", "length")
    one, other = (rows.select(key).take(pa.array(at)).to_pylist() for at in (again - 1, again))
    for earlier, later in zip(one, other, strict=True):
        if earlier != later:
            shown = [_shown((each["uri"], each["offset"], each["length"])) for each in (earlier, later)]
            raise WrongUse(
                "dataset_invalid",
                f"two images share the id {ids[again[0]]}: {shown[0]} and {shown[1]}",
                "Rename or move one of them.",
            )
    if manifest:
        raise bad_manifest(source, f"'{one[0]['uri']}' appears twice")
    kept = np.ones(len(ids), np.bool_)
    kept[again] = False
    return rows.filter(pa.array(kept))


def _checked(images: ImageList, source: str, first_row: int) -> pa.Table:
    """Rows of ``_ROWS`` for some images of a source, of which the first is ``first_row``."""
    _check_names(images.uris)
    _check_numbers(images, source, first_row)
    unknown = [None] * len(images.uris)
    offsets, lengths = (images.optional.get(name, unknown) for name in ("offset", "length"))
    uris = [without_signature(uri) for uri in images.uris]
    ids = [
        stable_id(uri, offset=offset, length=length)
        for uri, offset, length in zip(uris, offsets, lengths, strict=True)
    ]
    if images.ids is not None:
        _check_ids(images.ids, ids, images.uris, source, first_row)
    columns = [
        ids,
        uris,
        *(images.optional.get(name, unknown) for name in OPTIONAL_COLUMNS),
        [given if given != uri else None for given, uri in zip(images.uris, uris, strict=True)],
        range(first_row, first_row + len(ids)),
    ]
    return pa.table(
        [pa.array(values, field.type) for values, field in zip(columns, _ROWS, strict=True)], schema=_ROWS
    )


# --- a file that is cut into partitions already ---


def _partitioned(uri: str) -> Corpus | None:
    """The corpus of a manifest whose row groups are its partitions; None for any other file.

    Its rows are checked when they are first read. They are those of the file as it is now, also if a later
    manifest takes its place.
    """
    try:
        with open_parquet(uri) as file:
            several = _has_partitions(file)
    except WrongUse:
        return None  # told by whoever reads it
    if not several:
        return None
    file = kept_parquet(uri)
    if not _has_partitions(file):
        return None
    metadata = file.metadata
    partitions = spans(metadata.num_row_groups, 1)
    schema = pa.schema({name: KINDS[name] for name in file.schema_arrow.names})
    counts = [metadata.row_group(number).num_rows for number in range(len(partitions))]
    ends = list(itertools.accumulate(counts))
    checked: set[int] = set()

    def read(span: Span) -> pa.Table:
        tables = []
        for number, one in enumerate(partitions):
            if one.end <= span.first or span.end <= one.first:
                continue
            with parquet_errors(uri):
                rows = file.read_row_group(number).replace_schema_metadata(None)
            if number not in checked:
                first_row = ends[number] - rows.num_rows
                found = _checked(listed(uri, rows, first_row), uri, first_row)
                if within(found, one).num_rows < found.num_rows:
                    raise bad_manifest(uri, f"row group {number} has ids of others")
                _distinct(_by_id(found), uri, manifest=True)
                checked.add(number)
            tables.append(within(rows.cast(schema), span))
        return pa.concat_tables(tables)

    return Corpus(read, partitions, metadata.num_rows)


def _has_partitions(file: pq.ParquetFile) -> bool:
    """Whether the row groups are partitions, and the columns those of a manifest."""
    said = (file.schema_arrow.metadata or {}).get(PARTITIONS_KEY, b"")
    count = file.metadata.num_row_groups
    return (
        said == str(count).encode()
        and count > 1
        and count & (count - 1) == 0
        and {"id", "uri"} <= set(file.schema_arrow.names) <= set(KINDS)
    )


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
            "dataset_invalid",
            f"{len(bad)} file name(s) are not valid UTF-8, the first: {shown}",
            "Rename them (for example with convmv), so that they can be stored in Parquet.",
        )


def _check_numbers(images: ImageList, source: str, first_row: int) -> None:
    for name, values in images.optional.items():
        lowest = 0 if name == "offset" else 1
        end = 2 ** (OPTIONAL_COLUMNS[name].bit_width - 1)
        for row, value in enumerate(values, start=first_row):
            if value is not None and not lowest <= value < end:
                raise bad_list(source, f"row {row}: {name} {value} is out of range")
    unknown = [None] * len(images.uris)
    offsets, lengths = (images.optional.get(name, unknown) for name in ("offset", "length"))
    for row, (offset, length) in enumerate(zip(offsets, lengths, strict=True), start=first_row):
        if (offset is None) != (length is None):
            raise bad_list(source, f"row {row}: offset and length must be given together")


def _check_ids(given: list[int], expected: list[int], uris: list[str], source: str, first_row: int) -> None:
    """Check that an existing manifest has the ids and canonical URIs that it would get now."""
    rows = enumerate(zip(uris, given, expected, strict=True), start=first_row)
    for row, (uri, identity, right) in rows:
        wanted = without_signature(canonical_uri(uri))
        if wanted != uri:
            raise bad_manifest(
                source, f"row {row}: uri '{without_signature(uri)}' is not canonical ('{wanted}')"
            )
        if identity != right:
            raise bad_manifest(source, f"row {row}: id {identity} is not the id of '{uri}' ({right})")
