"""The card of a label table, read with the package ``datasets``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.card import write_card
from pipeline.table.labels import OK, decode_confidence, decode_mask, iter_rows
from tests.pipeline.formats.tables import TOYWORLD, toy_table


def test_load_dataset_opens_a_label_table(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    table = toy_table(tmp_path / "table", 8)
    # Parts of older versions lack a column; a manifest is Parquet too.
    part = sorted((tmp_path / "table/labels").iterdir())[0]
    pq.write_table(pq.read_table(part).drop_columns(["version"]), part)
    pq.write_table(pq.read_table(part, columns=["id"]), tmp_path / "table/manifest.parquet")

    write_card(table, TOYWORLD)
    loaded = datasets.load_dataset(table.uri, split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features["segments"].feature["class_id"].names == list(TOYWORLD.names)
    rows = {row["id"]: row for row in iter_rows(table)}
    assert len(loaded) == len(rows) == 8
    for found in loaded:
        row = rows[found["id"]]
        assert all(found[name] == row[name] for name in ("uri", "sha256", "status", "error", "quality"))
        if row["status"] == OK:
            assert (np.asarray(found["mask"]) == decode_mask(row["mask"]["bytes"])).all()
            shown = np.asarray(found["confidence"])
            assert (shown == decode_confidence(row["confidence"]["bytes"])).all()
            assert [one["class_id"] for one in found["segments"]] == [
                one["class_id"] for one in row["segments"]
            ]
        else:
            assert found["mask"] is None


def test_a_card_of_somebody_else_is_left_alone(tmp_path: Path):
    table, card = open_storage(tmp_path), tmp_path / "README.md"
    write_card(table, TOYWORLD)
    ours = card.read_text()
    other = Ontology.from_dict({"name": "other", "classes": ["猫 | x"]})
    write_card(table, other)
    assert "猫 \\| x" in card.read_text() and card.read_text() != ours
    changed = card.read_text().replace("A label table", "My label table")
    for text in (changed, "mine", "", ours[:-3]):
        card.write_text(text)
        write_card(table, other)
        assert card.read_text() == text
