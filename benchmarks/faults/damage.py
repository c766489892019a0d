"""Damage that happens to label tables: what does it, and what ``maskmill verify`` calls it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.table.committed import part_name
from pipeline.table.labels import OK, decode_confidence, decode_mask, encode_confidence, encode_mask

Row = dict[str, Any]


def parts(table: Path) -> list[Path]:
    """Parts of a table in the order of their names."""
    return sorted((table / "labels").glob("*.parquet"))


def _emptied(part: Path) -> None:
    part.write_bytes(b"")


def _torn(part: Path) -> None:
    part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])


def _without_its_end(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def _with_a_flipped_bit(part: Path) -> None:
    """In the middle of a mask or a confidence map."""
    data = bytearray(part.read_bytes())
    data[data.index(b"IDAT") + 12] ^= 16
    part.write_bytes(data)


def _of_other_columns(part: Path) -> None:
    pq.write_table(pa.table({"id": [1, 2], "a": ["x", "y"]}), part)


def _copied(part: Path) -> None:
    shutil.copy(part, part.with_name("copy.parquet"))


def _copied_under_a_name_that_sorts_first(part: Path) -> None:
    shutil.copy(part, part.with_name("a copy of it.parquet"))


def _deleted(part: Path) -> None:
    part.unlink()


def _overwritten_with_another(part: Path) -> None:
    other = next(path for path in parts(part.parents[1]) if path != part)
    shutil.copy(other, part)


def _renamed(part: Path) -> None:
    part.rename(part.with_name(f"part-{'0' * 32}.parquet"))


def _rewritten(part: Path, change: Callable[[list[Row]], list[Row]], *, rename: bool = False) -> None:
    """Change the rows of a part; its name stays that of its ids only if told to."""
    table = pq.read_table(part)
    new = pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema)
    if rename:
        part.unlink()
        part = part.with_name(part_name(new["id"].to_numpy()))
    pq.write_table(new, part)


def _in_a_row(change: Callable[[Row], Row | None]) -> Callable[[Path], None]:
    def damage(part: Path) -> None:
        def one(rows: list[Row]) -> list[Row]:
            at = next(index for index, row in enumerate(rows) if row["status"] == OK)
            rows[at] = rows[at] | (change(rows[at]) or {})
            return rows

        _rewritten(part, one)

    return damage


def _png(data: bytes) -> Row:
    return {"bytes": data, "path": None}


def _mask_changed(row: Row, change: Callable[[np.ndarray], Any]) -> Row:
    mask = decode_mask(row["mask"]["bytes"])
    changed = change(mask)
    return {"mask": _png(encode_mask(mask if changed is None else changed))}


def _recoloured(row: Row) -> Row:
    def change(mask: np.ndarray) -> None:
        mask[0, :8] = (int(mask[0, 0]) + 1) % 3

    return _mask_changed(row, change)


def _of_no_class(row: Row) -> Row:
    def change(mask: np.ndarray) -> None:
        mask[:2, :2] = 200

    return _mask_changed(row, change)


def _confidence_of_other_size(row: Row) -> Row:
    return {"confidence": _png(encode_confidence(decode_confidence(row["confidence"]["bytes"])[:-1]))}


def _wrong_area(row: Row) -> Row:
    first, *rest = row["segments"]
    return {"segments": [first | {"area": first["area"] + 1}, *rest]}


def _miscounted(part: Path) -> None:
    record = part.parents[1] / "dataset.json"
    data = json.loads(record.read_text())
    data["counts"]["images"] += 7
    record.write_text(json.dumps(data))


#: By name: what does it to a part (of at least one labelled image), and the kinds that it may be called.
DAMAGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "emptied": (_emptied, {"part_unreadable"}),
    "torn": (_torn, {"part_unreadable"}),
    "without its end": (_without_its_end, {"part_unreadable"}),
    "a flipped bit": (_with_a_flipped_bit, {"part_unreadable"}),
    "other columns": (_of_other_columns, {"part_foreign"}),
    "copied": (_copied, {"part_copied"}),
    "copied, sorts first": (_copied_under_a_name_that_sorts_first, {"part_copied"}),
    "deleted": (_deleted, {"id_missing"}),
    "overwritten": (_overwritten_with_another, {"part_copied"}),
    "renamed": (_renamed, {"part_misnamed"}),
    "a row twice": (
        lambda part: _rewritten(part, lambda rows: [*rows, rows[0]], rename=True),
        {"id_doubled"},
    ),
    "a row lost": (lambda part: _rewritten(part, lambda rows: rows[1:], rename=True), {"id_missing"}),
    "no mask": (_in_a_row(lambda _row: {"mask": None}), {"row_inconsistent"}),
    "failed with a mask": (_in_a_row(lambda _row: {"status": "empty", "error": "x"}), {"row_inconsistent"}),
    "mask no PNG": (_in_a_row(lambda _row: {"mask": _png(b"no picture")}), {"mask_damaged"}),
    "mask torn": (
        _in_a_row(lambda row: {"mask": _png(row["mask"]["bytes"][: len(row["mask"]["bytes"]) // 2])}),
        {"mask_damaged"},
    ),
    "confidence torn": (
        _in_a_row(lambda row: {"confidence": _png(row["confidence"]["bytes"][:60])}),
        {"confidence_damaged"},
    ),
    "mask of another size": (
        _in_a_row(lambda row: _mask_changed(row, lambda mask: mask[1:])),
        {"size_differs"},
    ),
    "confidence of another size": (_in_a_row(_confidence_of_other_size), {"size_differs"}),
    "height": (_in_a_row(lambda row: {"height": row["height"] + 1}), {"size_differs"}),
    "no class": (_in_a_row(_of_no_class), {"class_unknown"}),
    "mask edited": (_in_a_row(_recoloured), {"statistics_differ"}),
    "area": (_in_a_row(_wrong_area), {"statistics_differ"}),
    "quality": (_in_a_row(lambda row: {"quality": row["quality"] / 2}), {"statistics_differ"}),
    "miscounted": (_miscounted, {"counts_differ"}),
}
