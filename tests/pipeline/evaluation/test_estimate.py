"""How right a table is, by a sample of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.options import ViewOptions
from jobs.stats import ShowStatistics
from models.errors import MaskMillError
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.estimate import LEAST, measure_sample
from pipeline.evaluation.tables import evaluate_table
from pipeline.files.storage import Storage, open_storage
from pipeline.metrics.estimation import regression_estimate
from pipeline.table.labels import decode_mask, iter_rows
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


def test_a_sample_is_measured_as_evaluate_does(folder: Path, tmp_path: Path) -> None:
    found = measure_sample(storage(folder).uri, str(folder / "truth"), TOYWORLD)
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
    assert ShowStatistics(table=table, estimate=truth, json=True).run() == 0
    told = json.loads(capsys.readouterr().out)
    sample = measure_sample(table, truth, TOYWORLD)
    expected = regression_estimate(sample.quality, sample.miou, told["quality"]["mean"], 79)
    assert (
        told["estimate"]["image_miou"] == pytest.approx(vars(expected)) and told["estimate"]["sample"] == 59
    )
    assert ShowStatistics(table=table, estimate=truth).run() == 0
    text = capsys.readouterr().out
    assert "Estimated from 59 images with truth: the mean IoU of an image is" in text
    with pytest.raises(MaskMillError, match="not of a view"):
        ShowStatistics(table=table, estimate=truth, seen=ViewOptions(threshold=("0.5",))).run()


def test_what_is_wrong_with_a_sample_is_told(folder: Path, tmp_path: Path) -> None:
    table = storage(folder).uri
    masks = sorted(folder.glob("truth/**/*.png"))

    def refused(code: str) -> str:
        with pytest.raises(MaskMillError) as caught:
            measure_sample(table, str(tmp_path), TOYWORLD)
        assert caught.value.code == code
        return str(caught.value)

    refused("dataset_missing")
    for mask in masks[: LEAST - 1]:
        (tmp_path / mask.name).write_bytes(mask.read_bytes())
    assert "49 labelled images" in refused("too_few_images")
    file = io.BytesIO()
    Image.new("L", (9, 9)).save(file, "PNG")
    (tmp_path / masks[-1].name).write_bytes(file.getvalue())
    assert "9 x 9" in refused("mask_invalid")
    Image.new("L", (24, 24), 200).save(tmp_path / masks[-1].name)
    assert masks[-1].name in refused("mask_invalid")
