"""Figures of a table, against those of its decoded masks."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.committed import part_files, read_part, write_part
from pipeline.table.labels import LABEL_SCHEMA, decode_confidence, decode_mask, iter_rows, summarise
from pipeline.table.profile import COARSE, FINE, MOST_PAIRED, Profile, Spread, profile_table
from pipeline.table.record import read_table_record, write_table_record
from pipeline.table.views import View
from tests.pipeline.formats.tables import TOYWORLD, toy_table


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Storage:
    """Toy scenes in several files; every second one has been read twice."""
    table = toy_table(tmp_path_factory.mktemp("profile"), 13)
    for name in part_files(table):
        rows = read_part(table, name).to_pylist()
        for row in rows:
            if row["status"] == "ok" and row["id"] % 2:
                row["agreement"] = row["quality"]
        write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    return table


def _profile(table: Storage, view: View | None = None) -> Profile:
    record = read_table_record(table.uri)
    return profile_table(table, record, None if view is None else view.of(record.ontology))


def test_figures_are_those_of_the_masks(table: Storage) -> None:
    rows = [row for row in iter_rows(table) if row["status"] == "ok"]
    masks = [decode_mask(row["mask"]["bytes"]) for row in rows]
    sure = [decode_confidence(row["confidence"]["bytes"]) / 255 for row in rows]
    found = _profile(table).to_dict()
    assert (found["images"], found["labelled"], found["failed"]) == (13, 12, 1)
    assert found["status"] == {"ok": 12, "truncated": 1}
    everything, confidence = (np.concatenate([one.ravel() for one in maps]) for maps in (masks, sure))
    labelled = int((everything != 255).sum())
    assert found["pixels"] == everything.size and found["ignored_pixels"] == everything.size - labelled
    for number, one in enumerate(found["classes"]):
        here = everything == number
        assert one["name"] == TOYWORLD.names[number] and one["pixels"] == here.sum()
        assert one["pixel_share"] == pytest.approx(here.sum() / labelled)
        images = [mask for mask in masks if (mask == number).any()]
        assert one["images"] == len(images) == sum(one["segment_confidence"])
        assert one["image_share"] == pytest.approx(len(images) / 12)
        expected = confidence[here].mean() if here.any() else None
        assert one["mean_confidence"] == (None if expected is None else pytest.approx(expected))
        means = [sure[at][mask == number].mean() for at, mask in enumerate(masks) if (mask == number).any()]
        bins = np.histogram(means, COARSE, (0, 1))[0]
        assert one["segment_confidence"] == bins.tolist()
    pairs = {}
    for one, two in combinations(range(TOYWORLD.num_classes), 2):
        images = sum(bool((mask == one).any() and (mask == two).any()) for mask in masks)
        if images:
            pairs[TOYWORLD.names[one], TOYWORLD.names[two]] = images
    assert {tuple(pair["classes"]): pair["images"] for pair in found["together"]} == pairs
    told = [pair["images"] for pair in found["together"]]
    assert told == sorted(told, reverse=True)
    qualities = [row["quality"] for row in rows]
    assert found["quality"]["score"] == "classes" and found["quality"]["count"] == 12
    assert found["quality"]["mean"] == pytest.approx(np.mean(qualities))
    twice = [row["quality"] for row in rows if row["id"] % 2]
    assert 0 < len(twice) < 12 and found["agreement"]["count"] == len(twice)
    assert found["agreement"]["mean"] == pytest.approx(np.mean(twice))
    assert json.loads(json.dumps(found)) == found


def test_a_view_has_the_figures_of_its_labels(table: Storage) -> None:
    names = TOYWORLD.names
    found = _profile(table, View(threshold=0.5, merge={"first": names[:2]}))
    masks = [
        np.where(decode_confidence(row["confidence"]["bytes"]) < 128, 255, decode_mask(row["mask"]["bytes"]))
        for row in iter_rows(table)
        if row["status"] == "ok"
    ]
    pixels = np.bincount(np.concatenate([mask.ravel() for mask in masks]), minlength=256)
    assert len(found.names) == len(names) - 1 and found.names[0] == "first"
    assert found.class_pixels.tolist() == [pixels[:2].sum(), *pixels[2 : len(names)]]
    assert found.agreement.count == 0, "the second reading is of the labels before"


@pytest.mark.slow
def test_a_table_on_an_object_store(bucket: str) -> None:
    table = toy_table(f"{bucket}/profile", 6, rows_a_part=2)
    found = _profile(table).to_dict()
    assert found["labelled"] == 5 and found["errors"] == {"truncated": "the file ends too soon"}
    counted = summarise(table)
    assert {str(one["id"]): one["pixels"] for one in found["classes"] if one["pixels"]} == counted[
        "class_pixels"
    ]


def test_a_table_of_an_older_version_has_figures(table: Storage, tmp_path: Path) -> None:
    older = open_storage(tmp_path)
    rows = pa.Table.from_pylist(list(iter_rows(table)), schema=LABEL_SCHEMA)
    write_part(older, rows.drop_columns(["agreement", "segment_agreement", "version"]))
    record = read_table_record(table.uri).model_copy(update={"quality": "softmin"})
    write_table_record(older, record)
    found, now = _profile(older).to_dict(), _profile(table).to_dict()
    assert found["agreement"] is None and found["quality"] == now["quality"] | {"score": "softmin"}
    assert found["classes"] == now["classes"]


def test_rows_that_are_there_twice_are_told(table: Storage, tmp_path: Path) -> None:
    copied = open_storage(tmp_path)
    write_table_record(copied, read_table_record(table.uri))
    for name in part_files(table):
        write_part(copied, read_part(table, name))
    first = tmp_path / part_files(copied)[0]
    first.with_name("copy.parquet").write_bytes(first.read_bytes())
    with pytest.raises(MaskMillError, match="twice"):
        _profile(copied)


def test_an_empty_table_and_many_classes() -> None:
    empty = Profile(("cat", "dog")).to_dict()
    assert empty["quality"]["mean"] is None and empty["together"] == [] and empty["images"] == 0
    many = Ontology.from_dict({"name": "many", "classes": [f"c{at}" for at in range(MOST_PAIRED + 1)]})
    assert Profile(many.names).together is None and Profile(many.names).pairs() == []


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=200), st.sampled_from([0.05, 0.5, 0.95]))
def test_a_spread_knows_mean_quantiles_and_histogram(values: list[float], share: float) -> None:
    spread, numbers = Spread(), np.array(values)
    for some in np.array_split(np.concatenate([numbers, [np.nan]]), 3):
        spread.add(some)
    assert spread.count == len(values) and spread.mean == pytest.approx(numbers.mean())
    # Of bins that are closed below, as far as floats tell.
    whole = np.minimum(numbers * FINE, FINE - 1).astype(int)
    assert spread.histogram() == np.bincount(whole // (FINE // COARSE), minlength=COARSE).tolist()
    exact = np.quantile(numbers, share, method="inverted_cdf")
    found = spread.quantile(share)
    assert found is not None and abs(found - exact) <= 1 / FINE + 1e-6
