from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.errors import MaskMillError
from pipeline.evaluation.results import (
    ClassResult,
    EvaluationResult,
    Images,
    MeasuredDataset,
    MeasuredModel,
    claim_folder,
    evaluation_result,
    extremes,
    new_folder,
    read_results,
    write_result,
)
from pipeline.evaluation.tables import Evaluation, ImageScore
from pipeline.labelling.recipes import RECIPES, change_recipe
from pipeline.metrics.names import PER_CLASS
from pipeline.metrics.statistics import SegmentationStatistics, summarise_classes
from pipeline.report import comparison


def record(groups: list[str | None]) -> EvaluationResult:
    truth = np.array([[0, 0, 1], [1, 2, 255]], np.uint8)
    labels = np.array([[0, 1, 1], [1, 255, 0]], np.uint8)
    statistics = SegmentationStatistics.of(truth, labels, np.full((2, 3), 200, np.uint8), 3)
    return evaluation_result(
        Evaluation(statistics, [ImageScore("a", "0.parquet", 0.5)], missing=["b"]),
        title="t",
        protocol="custom",
        dataset=MeasuredDataset(name="pairs", split="all", images=2, fingerprint="ab"),
        model=MeasuredModel(recipe={"name": "r"}, weights={"model": "m"}),
        names=("x", "y", "z"),
        colors=np.array([[255, 0, 16], [1, 2, 3], [4, 5, 6]], np.uint8),
        groups=groups,
        published=[],
        worst=[],
        best=[],
    )


def test_every_metric_of_a_class_is_recorded() -> None:
    figures = set(summarise_classes(SegmentationStatistics.zero(2)))
    assert figures == {"pixels", *PER_CLASS}
    assert figures | {"id", "name", "color", "group"} == set(ClassResult.model_fields)


def test_a_record_holds_the_figures_and_is_what_the_report_reads(tmp_path: Path) -> None:
    made = record([None] * 3)
    # By hand: IoU of x 1/2, of y 2/3, of z 0 (missed).
    assert [entry.iou for entry in made.classes] == [0.5, pytest.approx(2 / 3), 0.0]
    assert made.metrics["miou"] == pytest.approx((0.5 + 2 / 3) / 3)
    assert made.metrics["pixel_accuracy"] == pytest.approx(3 / 5)
    assert made.classes[0].color == "#ff0010"
    assert made.images == Images(evaluated=1, missing=1)
    assert "miou_seen" not in made.metrics
    write_result(tmp_path, made)
    assert [read for _, read in read_results(str(tmp_path))] == [made]


def test_groups_give_the_figures_of_zero_shot_segmentation() -> None:
    metrics = record(["seen", "seen", "unseen"]).metrics
    assert metrics["miou_seen"] == pytest.approx((0.5 + 2 / 3) / 2)
    assert metrics["miou_unseen"] == 0.0 and metrics["hiou"] == 0.0


def test_what_does_not_exist_is_null(tmp_path: Path) -> None:
    made = record([None] * 3)
    made.metrics["ece"] = None
    assert json.loads(write_result(tmp_path, made).read_text())["metrics"]["ece"] is None


@pytest.mark.parametrize(
    ("scores", "count", "worst", "best"),
    [
        ([0.3, 0.1, 0.9, 0.5], 1, ["b"], ["c"]),
        ([0.3, 0.1, 0.9, 0.5], 9, ["b", "a"], ["c", "d"]),
        ([0.3, None, 0.9], 2, ["a"], ["c"]),
        ([0.3], 2, [], []),
    ],
)
def test_no_image_is_worst_and_best(scores: list, count: int, worst: list, best: list) -> None:
    images = [ImageScore(name, "p", score) for name, score in zip("abcd", scores, strict=False)]
    low, high = extremes(images, count)
    assert [image.name for image in low] == worst and [image.name for image in high] == best


def test_a_result_is_not_written_over_unless_asked(tmp_path: Path) -> None:
    claim_folder(tmp_path, overwrite=False)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/old.png").write_bytes(b"old")
    assert new_folder(tmp_path, "x", overwrite=False) == tmp_path  # an interrupted run goes on
    write_result(tmp_path, record([None] * 3))
    with pytest.raises(MaskMillError) as caught:
        new_folder(tmp_path, "x", overwrite=False)
    assert caught.value.code == "output_exists"
    assert new_folder(tmp_path, "x", overwrite=True) == tmp_path
    claim_folder(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == [".maskmill-result"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_left_alone(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "images.txt").write_text("mine")
    with pytest.raises(MaskMillError) as caught:
        new_folder(tmp_path, "x", overwrite=overwrite)
    assert caught.value.code == "output_not_ours"


def test_a_result_is_a_local_folder() -> None:
    with pytest.raises(MaskMillError) as caught:
        new_folder("s3://bucket/result", "x", overwrite=False)
    assert caught.value.code == "wrong_use"


def test_no_password_of_an_address_gets_into_a_result(tmp_path: Path) -> None:
    made = record([None] * 3)
    made.model.weights["pretrained"] = "https://user:hunter22@host/weights.pt"
    assert "hunter22" not in write_result(tmp_path, made).read_text()


def test_a_result_of_an_older_version_is_read(tmp_path: Path) -> None:
    # Every field of the recipe at the top, as schema 1 had it before recipes held settings of their parts.
    written = record([None] * 3).model_dump(mode="json")
    written["model"]["recipe"] = {
        "name": "toy",
        "model": "toyclip",
        "pretrained": "bundled",
        "scale": [512, 128],
        "keep_ratio": True,
        "head": "value",
        "image_stats": "clip",
        "profile": "weights",
        "clipseg": {"prefix": "fixed", "extract_layers": None},
        "hash": "1387",
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(written))
    ((_, read),) = read_results(tmp_path)
    assert isinstance(read, EvaluationResult)
    assert read.model.recipe == RECIPES["toy"].to_dict() | {"hash": "1387"}
    changed = change_recipe(RECIPES["toy"], {"images.scale": (640, 160)})
    again = read.model_copy(update={"model": read.model.model_copy(update={"recipe": changed.to_dict()})})
    settings = comparison.evaluations([read, again])["settings"]
    assert settings == [("recipe images.scale", ["512, 128", "640, 160"])]


def test_an_unknown_recipe_stays_as_it_was_written() -> None:
    assert MeasuredModel(recipe={"prompt_denoising": True}).recipe == {"prompt_denoising": True}


def test_a_benchmark_of_an_older_version_is_read(tmp_path: Path) -> None:
    figures = {"mean": 0.5, "low": 0.4, "high": 0.6, "runs": [0.45, 0.55]}
    line = {"name": "head value", "series": None, "x": None, "values": {"miou": figures}}
    section = {"name": "heads", "title": "Heads", "note": "n", "chart": "bars", "metrics": ["miou"]}
    claim = {"claim": "A beats B", "source": "s", "shows": True, "detail": "+0.3"}
    written = {
        "schema_version": 1,
        "kind": "benchmark",
        "name": "toyworld",
        "title": "t",
        "created": "2026-11-29T10:00:00Z",
        "command": "maskmill benchmark toyworld",
        "hardware": {"cpu": "x", "cores": 2, "gpu": None},
        "seconds": 1.5,
        "toy": True,
        "sections": [
            section | {"rows": [line | {"published": {"miou": 0.2}, "source": "Table 2", "missing": None}]}
        ],
        "claims": [claim],
        "pictures": [{"file": "pictures/a.png", "caption": "a"}],
    }
    (tmp_path / "benchmark.json").write_text(json.dumps(written))
    ((_, read),) = read_results(tmp_path)
    (tmp_path / "again").mkdir()
    assert json.loads(write_result(tmp_path / "again", read).read_text()) == written
