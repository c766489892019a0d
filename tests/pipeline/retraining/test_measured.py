from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from models.errors import MaskMillError
from pipeline.evaluation.images import set_digest, write_images
from pipeline.evaluation.results import (
    EVALUATION_FILE,
    Labelling,
    MeasuredDataset,
    MeasuredModel,
    evaluation_result,
    write_result,
)
from pipeline.evaluation.tables import Evaluation, ImageScore, image_digest
from pipeline.files.storage import open_storage
from pipeline.metrics.statistics import SegmentationStatistics
from pipeline.retraining.gate import GatePolicy, decide
from pipeline.retraining.labels import LabelSummary
from pipeline.retraining.measured import read_measured


def evaluate(folder: Path, wrong: float, labelling: Labelling | None = None) -> Evaluation:
    """What ``maskmill evaluate`` leaves of a model that is wrong for a share of the pixels."""
    rng = np.random.default_rng(0)
    found = Evaluation(SegmentationStatistics.zero(3))
    for index in range(40):
        truth = rng.choice([0, 1, 255], (40, 40)).astype(np.uint8)
        labels = np.where(rng.random(truth.shape) < wrong, 2, truth).astype(np.uint8)
        one = SegmentationStatistics.of(truth, labels, None, 3)
        confusion = one.confusion
        counts = [np.arange(3), confusion.sum(1), confusion[:, :-1].sum(0), np.diag(confusion)]
        name = f"image {index}"
        digest = image_digest(name, b"", truth)
        found.images.append(ImageScore(name, "0.parquet", one.miou, np.stack(counts, axis=1), digest))
        found.statistics = found.statistics + one
    result = evaluation_result(
        found,
        title="t",
        protocol="custom",
        dataset=MeasuredDataset(name="pairs", content=set_digest(image.digest for image in found.images)),
        model=MeasuredModel(),
        names=("x", "y", "z"),
        colors=np.zeros((3, 3), np.uint8),
        groups=[None] * 3,
        published=[],
        worst=[],
        best=[],
        conditions="c" * 64,
        labelling=labelling,
    )
    folder.mkdir()
    write_images(open_storage(folder), found.images)
    write_result(folder, result)
    return found


LABELS = LabelSummary(
    digest="d" * 64,
    classes=("x", "y"),
    class_pixels=(30, 10),
    class_images=(1, 1),
    pixels=50,
    images=2,
    status={"ok": 2},
    mean_quality=0.5,
)


def test_what_evaluate_wrote_is_what_the_gate_judges(tmp_path: Path) -> None:
    evaluate(tmp_path / "champion", 0.3)
    made = evaluate(tmp_path / "candidate", 0.2, Labelling(images=40, seconds=10))
    champion = read_measured(str(tmp_path / "champion"), "champion version 3")
    candidate = read_measured(open_storage(tmp_path / "candidate"), "candidate", model_bytes=7, labels=LABELS)
    assert candidate.images == tuple(sorted(f"image {index}" for index in range(40)))
    assert np.array_equal(candidate.truth.sum(0), made.statistics.confusion.sum(1))
    assert candidate.seconds_per_image == 0.25 and champion.seconds_per_image is None
    assert candidate.label_classes == ("x", "y") and candidate.labels_digest == "d" * 64
    assert candidate.label_histogram is not None and candidate.label_histogram.tolist() == [0.75, 0.25]
    assert candidate.model_bytes == 7 and candidate.has_truth
    decision = decide(candidate, champion, GatePolicy(resamples=1000))
    assert decision.promotes, decision.sentences()
    assert decide(candidate, None, GatePolicy()).promotes
    refused = decide(champion, candidate, GatePolicy(resamples=1000))
    assert {"gain", "interval", "labels"} <= {reason.check for reason in refused.failed}


def test_a_result_without_counts_says_what_to_do(tmp_path: Path) -> None:
    evaluate(tmp_path / "old", 0.3)
    file = tmp_path / "old" / EVALUATION_FILE
    record = json.loads(file.read_text())
    del record["dataset"]["content"], record["conditions"]
    file.write_text(json.dumps(record))
    for place in (tmp_path / "old", tmp_path / "nothing"):
        with pytest.raises(MaskMillError) as caught:
            read_measured(place, "candidate")
        assert caught.value.code == "input_missing" and "maskmill evaluate" in caught.value.remedy
