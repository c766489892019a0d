"""The rows of a table as a view has them: read, seen through it, and counted.

What a row says of its maps, ``segments`` and ``quality``, is computed from the maps that the view gives; what
is stored is that of the labels before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipeline.files.storage import Storage
from pipeline.table.labels import (
    LABEL_SCHEMA,
    MAP_TOO_LARGE,
    OK,
    Counts,
    decode_confidence,
    decode_mask,
    is_large,
    iter_batches,
    large_map,
    summarise_batches,
)
from pipeline.table.statistics import Confidence, Labels, MapStatistics, quality, segments
from pipeline.table.strips import read_strips, sample
from pipeline.table.views import TableView

#: Columns that a view computes anew.
COMPUTED = ("segments", "quality")
#: Pixels of the maps of a large image in pictures.
SHOWN_PIXELS = 1 << 24
_MAPS = ("mask", "confidence")


def decode_maps(mask: bytes, confidence: bytes, view: TableView | None) -> tuple[Labels, Confidence]:
    """Class ids and confidence (H, W) of a row, in the ids of the view; without one, those stored.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    labels, sure = decode_mask(mask), decode_confidence(confidence)
    return (labels, sure) if view is None else view.apply(labels, sure)


def shown_maps(mask: bytes, confidence: bytes, view: TableView | None) -> tuple[Labels, Confidence]:
    """``decode_maps`` for pictures: of a large image a sample of its rows and columns, in little memory."""
    if not is_large(mask):
        return decode_maps(mask, confidence, view)
    labels, sure = sample(mask, SHOWN_PIXELS), sample(confidence, SHOWN_PIXELS)
    return (labels, sure) if view is None else view.apply(labels, sure)


def iter_viewed(
    table: Storage | str | os.PathLike[str],
    columns: Sequence[str],
    view: TableView | None,
    *,
    batch_size: int = 64,
    names: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table as ``pipeline.table.labels.iter_batches`` does, as the view has them.

    Decodes every mask if ``segments`` or ``quality`` is asked for, in threads; those of large images in
    strips. Where the view asks for connected components, which no strip shows whole, large images have no
    labels: their ``status`` is ``map_too_large``.

    Args:
        table: the output of a labelling run, or the folder with its Parquet files.
        columns: columns to read, without ``mask`` and ``confidence``, which are those of the table.
        view: None leaves the rows as they are stored.
        batch_size: rows per batch.
        names: read only these files, relative to ``table``.
    """
    assert not set(columns) & set(_MAPS), "maps are seen through decode_maps"
    if view is None or not set(columns) & set(COMPUTED):
        yield from iter_batches(table, columns, batch_size=batch_size, names=names)
        return
    read = list(dict.fromkeys([*columns, "status", "height", "width", *_MAPS]))
    schema = pa.schema([LABEL_SCHEMA.field(name) for name in columns])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for batch in iter_batches(table, read, batch_size=min(batch_size, 64), names=names):
            rows = list(pool.map(lambda row: _computed(row, view), batch.to_pylist()))
            yield pa.RecordBatch.from_pylist([{name: row[name] for name in columns} for row in rows], schema)


def _computed(row: dict[str, Any], view: TableView) -> dict[str, Any]:
    if row["status"] != OK:
        return row
    ignored = view.ontology.ignore_index
    if is_large(row["mask"]["bytes"]):
        return row | _computed_in_strips(row, view)
    labels, confidence = decode_maps(row["mask"]["bytes"], row["confidence"]["bytes"], view)
    return row | {
        "segments": segments(labels, confidence, ignore_index=ignored),
        "quality": quality(confidence, labels, ignore_index=ignored),
    }


def _computed_in_strips(row: dict[str, Any], view: TableView) -> dict[str, Any]:
    if view.areas.any():
        why = f"{large_map(row['height'], row['width'])}: the view asks for the area of its pieces"
        return {"status": MAP_TOO_LARGE, "error": why, "segments": None, "quality": None}
    counted = MapStatistics(view.ontology.ignore_index)
    maps = (read_strips(row[name]["bytes"]) for name in _MAPS)
    for (top, labels), (_, confidence) in zip(*maps, strict=True):
        counted.add(*view.apply(labels, confidence), top)
    return {"segments": counted.segments(), "quality": counted.quality()}


def summarise_view(table: Storage | str | os.PathLike[str], view: TableView | None) -> dict[str, Any]:
    """Summarise a table as ``pipeline.table.labels.summarise`` does, as the view has it."""
    return summarise_batches(iter_viewed(table, ["id", *Counts.COLUMNS], view, batch_size=4096), table)
