from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import LABEL_SCHEMA, failed_row, iter_rows, ok_row, summarise
from pipeline.table.viewed import decode_maps, iter_viewed, summarise_view
from pipeline.table.views import TableView, View

CLASSES = Ontology.from_dict({"name": "c", "classes": ["cat", "dog", "sky"]})


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    rows = [failed_row(id=99, uri="file:///gone.png", status="not_found", error="gone")]
    for number in range(7):
        shape = (int(rng.integers(4, 30)), int(rng.integers(4, 30)))
        labels = rng.choice([0, 1, 2, 255], shape).astype(np.uint8)
        confidence = rng.integers(0, 256, shape).astype(np.uint8)
        rows.append(
            ok_row(
                id=number, uri=f"file:///{number}.png", sha256=bytes(32), height=shape[0], width=shape[1],
                labels=labels, confidence=confidence, ignore_index=255,
            )
        )  # fmt: skip
    (tmp_path / "labels").mkdir()
    for part in range(2):
        pq.write_table(
            pa.Table.from_pylist(rows[part::2], schema=LABEL_SCHEMA),
            tmp_path / "labels" / f"part-{part}.parquet",
        )
    return tmp_path


def test_rows_say_of_a_view_what_a_table_of_its_maps_would_say(table: Path, tmp_path: Path) -> None:
    view = View(threshold=0.4, merge={"pet": ("cat", "dog")}, min_area=3).of(CLASSES)
    other = tmp_path / "other"
    other.mkdir()
    rows = []
    for row in iter_rows(table):
        if row["status"] == "ok":
            labels, confidence = decode_maps(row["mask"]["bytes"], row["confidence"]["bytes"], view)
            known = {key: row[key] for key in ("id", "uri", "sha256", "height", "width")}
            row = ok_row(**known, labels=labels, confidence=confidence, ignore_index=255)
        rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), other / "part-0.parquet")
    assert summarise_view(table, view) == summarise(other) != summarise(table)
    columns = ["id", "status", "segments", "quality"]
    seen = [row for batch in iter_viewed(table, columns, view, batch_size=3) for row in batch.to_pylist()]
    assert seen == list(iter_rows(other, columns))


def test_large_maps_are_seen_through_a_view_in_strips(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = View(threshold=0.4, merge={"pet": ("cat", "dog")}).of(CLASSES)
    pieces = View(threshold=0.4, min_area=3).of(CLASSES)
    columns = ["id", "status", "error", "segments", "quality"]

    def seen(by: TableView) -> list[dict[str, Any]]:
        return [row for batch in iter_viewed(table, columns, by) for row in batch.to_pylist()]

    whole, counts = seen(view), summarise_view(table, view)
    monkeypatch.setattr("pipeline.table.labels.MOST_DECODED", 250)
    monkeypatch.setattr("pipeline.table.strips.STRIP_PIXELS", 40)
    large = {
        row["id"] for row in iter_rows(table) if row["status"] == "ok" and row["height"] * row["width"] > 250
    }
    assert 0 < len(large) < 7
    assert seen(view) == whole and summarise_view(table, view) == counts
    # Pieces of an image are not whole in any strip.
    told = {row["id"]: row for row in seen(pieces)}
    assert {number for number, row in told.items() if row["status"] == "map_too_large"} == large
    assert all(told[number]["segments"] is None and "pixels" in told[number]["error"] for number in large)
    assert summarise_view(table, pieces)["status"] == {
        "ok": 7 - len(large),
        "map_too_large": len(large),
        "not_found": 1,
    }


def test_without_a_view_rows_are_as_they_are_stored(table: Path) -> None:
    assert summarise_view(table, None) == summarise(table)
    stored = [
        row
        for batch in iter_viewed(table, ["id", "uri"], View(threshold=1).of(CLASSES))
        for row in batch.to_pylist()
    ]
    assert stored == list(iter_rows(table, ["id", "uri"]))
