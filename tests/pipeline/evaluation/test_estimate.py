"""How right a table is, by a sample of it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from jobs.options import ViewOptions
from jobs.stats import ShowStatistics
from models.errors import MaskMillError
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.estimate import LEAST, Measured, measure_sample
from pipeline.evaluation.tables import evaluate_table
from pipeline.evaluation.truth import find_truth
from pipeline.files.storage import Storage, open_storage
from pipeline.metrics.estimation import regression_estimate
from pipeline.review.queue import Entry, Queue, Reason, write_queue
from pipeline.review.saving import new_record
from pipeline.table.committed import write_part
from pipeline.table.corrections import REJECTED
from pipeline.table.labels import LABEL_SCHEMA, OK, decode_mask, iter_rows, ok_row
from pipeline.table.record import write_table_record
from pipeline.table.views import TableView
from tests.pipeline.formats.tables import TOYWORLD, toy_table

COUNT = 80


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 79 images, and a truth for 59 of them that its labels are right to in part."""
    folder = tmp_path_factory.mktemp("estimate")
    table = toy_table(folder / "table", COUNT, size=24, rows_a_part=16, images=folder / "images")
    rng = np.random.default_rng(0)
    (folder / "truth" / "inner").mkdir(parents=True)
    for number, row in enumerate(iter_rows(table)):
        if row["status"] == "ok" and len(list(folder.glob("truth/**/*.png"))) < 59:
            labels = decode_mask(row["mask"]["bytes"]).copy()
            labels[: rng.integers(0, 20)] = rng.integers(0, TOYWORLD.num_classes)
            name = Path(row["uri"]).name
            Image.fromarray(labels).save(folder / "truth" / ("inner" if number % 2 else ".") / name)
    return folder


def storage(folder: Path) -> Storage:
    return open_storage(folder / "table")


def measured(folder: Path, truth: Path, view: TableView | None = None) -> Measured:
    table = storage(folder)
    return measure_sample(table, find_truth(str(truth), table, TOYWORLD), view=view)


def estimate_of(capsys: pytest.CaptureFixture[str], table: str, truth: str, **more: Any) -> dict[str, Any]:
    assert ShowStatistics(table=table, estimate=truth, json=True, **more).run() == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    return told


def test_a_sample_is_measured_as_evaluate_does(folder: Path, tmp_path: Path) -> None:
    found = measured(folder, folder / "truth")
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for mask in folder.glob("truth/**/*.png"):
        (tmp_path / "masks" / mask.name).symlink_to(mask)
        (tmp_path / "images" / mask.name).symlink_to(folder / "images" / mask.name)
    pairs = open_pairs(str(tmp_path), ontology=TOYWORLD)
    right = evaluate_table(
        storage(folder).uri, pairs, class_names=TOYWORLD.names, ignore_index=255, boundary=False
    )
    assert sorted(found.miou) == pytest.approx(sorted(one.miou or 0.0 for one in right.images))
    assert len(found.miou) == 59
    qualities = [row["quality"] for row in iter_rows(storage(folder)) if row["status"] == "ok"]
    assert set(found.quality) <= set(qualities)


def test_stats_tells_the_estimate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, truth = storage(folder).uri, str(folder / "truth")
    told = estimate_of(capsys, table, truth)
    sample = measured(folder, folder / "truth")
    expected = regression_estimate(sample.quality, sample.miou, told["quality"]["mean"], 79)
    assert (
        told["estimate"]["image_miou"] == pytest.approx(vars(expected)) and told["estimate"]["sample"] == 59
    )
    assert ShowStatistics(table=table, estimate=truth).run() == 0
    text = capsys.readouterr().out
    assert "Estimated from 59 images with truth: the mean IoU of an image is" in text


def test_a_view_is_estimated_as_it_is_seen(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, truth = storage(folder).uri, str(folder / "truth")
    stored = estimate_of(capsys, table, truth)["estimate"]
    # If all is one class, nothing is wrong but the pixels without a label, one in fifty.
    seen = ViewOptions(merge=(f"{','.join(TOYWORLD.names)}=thing",))
    one = estimate_of(capsys, table, truth, seen=seen)
    assert one["estimate"]["sample"] == 59 and one["estimate"]["image_miou"]["mean"] > 0.97
    assert stored["image_miou"]["mean"] < 0.9
    view = ViewOptions(threshold=("0.5",)).of_table(table)
    weak = measured(folder, folder / "truth", view)
    told = estimate_of(capsys, table, truth, seen=ViewOptions(threshold=("0.5",)))
    expected = regression_estimate(weak.quality, weak.miou, told["quality"]["mean"], 79)
    assert told["estimate"]["image_miou"] == pytest.approx(vars(expected))
    assert expected.mean < stored["image_miou"]["mean"] and weak.quality.min() > 0.5


@pytest.mark.slow
def test_corrections_of_images_by_chance_count_as_truth(
    bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = toy_table(bucket, COUNT, size=24, rows_a_part=16)
    corrections = f"{bucket}/corrections"
    rows = [row for row in iter_rows(table) if row["status"] == OK]
    write_table_record(open_storage(corrections), new_record(TOYWORLD, bucket))
    with pytest.raises(MaskMillError, match="drawn by chance"):
        ShowStatistics(table=bucket, estimate=corrections).run()
    doubtful, by_chance = (Reason(kind=kind, text="") for kind in ("quality", "random"))
    entries, said = [], []
    for number, row in enumerate(rows[:70]):
        # 60 by chance, two of them also doubtful: 5 are rejected, 20 wrong. And ten doubtful ones, all wrong.
        reasons = (doubtful, by_chance) if number < 2 else (by_chance,) if number < 60 else (doubtful,)
        entries.append(Entry(id=row["id"], uri=row["uri"], reasons=reasons))
        labels = decode_mask(row["mask"]["bytes"]).copy()
        if number < 25 or number >= 60:
            labels[:] = (labels[0, 0] + 1) % TOYWORLD.num_classes
        kept = {name: row[name] for name in ("id", "uri", "sha256", "height", "width")}
        sure = np.full(labels.shape, 255, np.uint8)
        said.append(
            row | {"status": REJECTED, "mask": None, "confidence": None}
            if number < 5
            else ok_row(**kept, labels=labels, confidence=sure, ignore_index=TOYWORLD.ignore_index)
        )
    write_part(open_storage(corrections), pa.Table.from_pylist(said, schema=LABEL_SCHEMA))
    write_queue(Queue(table=table.uri, corrections=corrections, entries=tuple(entries)), bucket)
    told = estimate_of(capsys, bucket, corrections)["estimate"]
    assert told["sample"] == 55
    assert "10 that were chosen as doubtful" in told["notes"][0]
    assert "without truth: 5." in told["notes"][1]
    right = measure_sample(table, find_truth(corrections, table, TOYWORLD)).miou
    assert len(right) == 65, "the doubtful ones have a truth, too"
    assert told["by_the_sample_alone"]["mean"] > right.mean() + 0.05
    assert 35 / 55 - 0.02 < told["by_the_sample_alone"]["mean"] < 1
    assert ShowStatistics(table=bucket, estimate=corrections).run() == 0
    assert "without truth: 5." in capsys.readouterr().out


def test_what_is_wrong_with_a_sample_is_told(folder: Path, tmp_path: Path) -> None:
    masks = sorted(folder.glob("truth/**/*.png"))

    def refused(code: str) -> str:
        with pytest.raises(MaskMillError) as caught:
            measured(folder, tmp_path)
        assert caught.value.code == code
        return str(caught.value)

    refused("image_invalid")
    for mask in masks[: LEAST - 1]:
        (tmp_path / mask.name).write_bytes(mask.read_bytes())
    assert "49 labelled images" in refused("too_few_images")
    file = io.BytesIO()
    Image.new("L", (9, 9)).save(file, "PNG")
    (tmp_path / masks[-1].name).write_bytes(file.getvalue())
    assert "9 x 9" in refused("mask_invalid")
    Image.new("L", (24, 24), 200).save(tmp_path / masks[-1].name)
    assert masks[-1].name in refused("mask_invalid")
