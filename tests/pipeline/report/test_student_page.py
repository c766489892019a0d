from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.files.images import ImageSettings
from pipeline.ontology.reading import parse_classes
from pipeline.report.student_page import Example, student_page, student_sheet
from pipeline.report.training_page import Score, write_training_page
from pipeline.trained.student import StudentRecord

ONTOLOGY = parse_classes("grass, sky", background=None, templates="toyworld")


def _student(**training: Any) -> StudentRecord:
    return StudentRecord(
        uri="runs/pets",
        created="",
        fingerprint="",
        config={"decoder": "deeplabv2", "backbone": "resnet101c"},
        ontology=ONTOLOGY,
        recipe={"name": "r", "selftrain": {"guided": [1, 40], "self_train": [41, -1]}},
        labelling=ImageSettings(scale=(512, 128), keep_ratio=True, resize="antialias", max_pixels=10**6),
        teacher={
            "weights": {"model": "ViT-B-16", "pretrained": "openai"}, "labels": "tables/pets",
            "counts": {"images": 4321, "failed": 0, "status": {"ok": 4321}},
        },
        text={},
        metrics={},
        training={"iterations": 100, "seconds": 90.0} | training,
        versions={"python": "3"},
    )  # fmt: skip


def _example(truth: bool) -> Example:
    image = np.full((20, 30, 3), 90, np.uint8)
    labels = np.zeros((20, 30), np.uint8)
    labels[:, 15:] = 1
    return Example("a.png", image, labels, labels, labels if truth else None)


STUDENT_LINES = [
    {"step": step, "loss": 3.0 / step, "agreement": step / 100, "drift": 0.0} for step in (10, 50, 100)
]


@pytest.mark.parametrize("truth", [False, True])
def test_the_page_of_a_student(tmp_path: Path, truth: bool) -> None:
    scores = [Score("teacher", 0.5, [0.4, 0.6]), Score("student", 0.65, [0.7, None])] if truth else []
    made = student_page(
        _student(unseen=["sky"]), [_example(truth)] * 3, scores=scores, note="a note",
    )  # fmt: skip
    page = write_training_page(tmp_path / "report.html", made, STUDENT_LINES).read_text()
    assert page.count('alt="student of a.png"') == 3 and page.count("data:image/") == 3 * (4 if truth else 3)
    assert page.count('alt="truth of a.png"') == (3 if truth else 0) and ("+30.0" in page) is truth
    assert page.count("<svg") == 3 and page.count('class="reference"') == 3  # where self-training began
    for part in ("Student of ViT-B-16", "a note", "4,321", "tables/pets", "maskmill label --model runs/pets"):
        assert part in page, part
    assert not made.toy and made.data[1] == ("images", "4,321") and made.data[-1] == ("without truth", "sky")


def test_the_sheet_has_a_row_for_each_kind() -> None:
    without, with_truth = (student_sheet([_example(truth)] * 2, _student()) for truth in (False, True))
    assert with_truth.height > without.height and with_truth.width == without.width
