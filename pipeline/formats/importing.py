"""Datasets with label maps into label tables: true labels, as rows like those of a labelling.

An image that cannot be read, or whose labels cannot be read or have another size, is a row with a status.
Labels are read in the threads that read the images. Images that the dataset holds itself, rather than their
addresses, are written to ``imported_images/`` of the table.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import pyarrow as pa

from models.errors import MaskMillError
from pipeline.corpus.manifest import stable_id
from pipeline.files.fetch import fetch, file_version
from pipeline.files.images import ImageError, decode, use_one_thread
from pipeline.files.redaction import without_signature
from pipeline.files.storage import Storage, canonical_uri
from pipeline.formats.base import ReadSample, Sample
from pipeline.formats.names import safe
from pipeline.table.committed import LABELS_DIR, RELABELLED_DIR, write_part
from pipeline.table.index import Ids
from pipeline.table.labels import LABEL_SCHEMA, failed_row, ok_row

IMAGES_DIR: Final = "imported_images"
"""Not "images": that may well be the user's own, in the same folder."""
ROWS_A_PART: Final = 256
SIZE_DIFFERS: Final = "mask_invalid"
"""Status of an image whose labels have another size."""
UNREADABLE: Final = ("dataset_invalid", "mask_invalid")
"""Errors of reading a label map that are of this image alone; they become its status."""
_AT_ONCE = 8
"""Images in memory."""


def import_samples(
    samples: Iterable[Sample | ReadSample],
    table: Storage,
    *,
    ignore_index: int,
    done: Ids,
    again: Ids | None = None,
    fence: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda _done: None,
) -> int:
    """Write a row for each sample whose image has none, in parts.

    With ``again``, write new rows of these images instead, which ``apply_relabelled`` puts in the places of
    the old ones.

    Args:
        samples: of the dataset; their ids are not used.
        table: the output.
        ignore_index: of the labels.
        done: ids of rows that are there, int64 (n,).
        again: ids of rows to make anew, int64 (n,); None for those that are not there.
        fence: called before each write; raises if the lease was lost.
        progress: called with the number of samples looked at.

    Returns:
        Number of samples that name an image a second time, and were passed over.

    Raises:
        MaskMillError: what reading the samples raises; what the storage says.
    """
    use_one_thread()
    folder = LABELS_DIR if again is None else RELABELLED_DIR
    present, anew = set(done.tolist()), None if again is None else set(again.tolist())
    fresh: set[int] = set()
    repeated = looked_at = 0
    rows: list[dict[str, Any]] = []
    make = functools.partial(_row, table=table, ignore_index=ignore_index)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for chunk in _chunks(samples, _AT_ONCE):
            looked_at += len(chunk)
            todo = []
            for sample in chunk:
                address, uri = _place(sample, table)
                row_id = stable_id(uri)
                repeated += row_id in fresh
                wanted = row_id not in present if anew is None else row_id in anew
                if wanted and row_id not in fresh:
                    fresh.add(row_id)
                    todo.append((sample, address, uri, row_id))
            rows += pool.map(lambda one: make(*one), todo)
            if len(rows) >= ROWS_A_PART:
                fence()
                write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), folder)
                rows = []
            progress(looked_at)
    if rows:
        fence()
        write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), folder)
    return repeated


def _chunks(samples: Iterable[Sample | ReadSample], size: int) -> Iterator[list[Sample | ReadSample]]:
    source = iter(samples)
    while chunk := list(itertools.islice(source, size)):
        yield chunk


def _place(sample: Sample | ReadSample, table: Storage) -> tuple[str, str]:
    """Where the image is, and its address in the table, which has no signature."""
    if sample.image is not None:
        name = safe(sample.name.rpartition("/")[2])
        # Names of others may be anything, and the same; their order is theirs.
        uri = table.uri_of(f"{IMAGES_DIR}/{sample.number:07d}_{name}{sample.suffix}")
        return uri, uri
    address = canonical_uri(sample.uri)
    return address, without_signature(address)


def _row(
    sample: Sample | ReadSample, address: str, uri: str, row_id: int, *, table: Storage, ignore_index: int
) -> dict[str, Any]:
    version = None
    sha256 = None
    try:
        if sample.image is not None:
            table.write_bytes(f"{IMAGES_DIR}/{address.rpartition('/')[2]}", sample.image)
        version = file_version(address)
        data = sample.image if sample.image is not None else fetch(address)
        sha256 = hashlib.sha256(data).digest()
        height, width = decode(data).shape[:2]
    except ImageError as error:
        return failed_row(
            id=row_id, uri=uri, status=error.code, error=error.message, sha256=sha256, version=version
        )
    known: dict[str, Any] = {
        "id": row_id,
        "uri": uri,
        "sha256": sha256,
        "height": height,
        "width": width,
        "version": version,
    }
    try:
        labels = sample.labels
    except MaskMillError as error:
        if error.code not in UNREADABLE:  # a storage that is out of reach is no fault of the mask
            raise
        return failed_row(**known, status=error.code, error=error.message)
    if labels.shape != (height, width):
        sizes = f"labels of {labels.shape[0]} x {labels.shape[1]}, upright image of {height} x {width} pixels"
        return failed_row(**known, status=SIZE_DIFFERS, error=sizes)
    confidence = np.where(labels == ignore_index, 0, 255).astype(np.uint8)
    return ok_row(**known, labels=labels, confidence=confidence, ignore_index=ignore_index)
