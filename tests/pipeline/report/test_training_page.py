from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.report import plots
from pipeline.report.training_page import Example, Score, preview_sheet, write_training_page

NAMES = ("grass", "<b>sky</b>")
PALETTE = np.array([[0, 128, 0], [0, 0, 255]], np.uint8)
RECORD: dict[str, Any] = {
    "config": {"decoder": "deeplabv2", "backbone": "resnet101c"},
    "recipe": {"name": "r", "selftrain": {"guided": [1, 40], "self_train": [41, -1]}, "note": "<script>"},
    "teacher": {"weights": {"model": "ViT-B-16", "pretrained": "openai"}},
    "training": {"iterations": 100, "seconds": 90.0, "samples_per_second": 12.0, "stopped": None},
    "versions": {"python": "3"},
}


def _example(truth: bool) -> Example:
    image = np.full((20, 30, 3), 90, np.uint8)
    labels = np.zeros((20, 30), np.uint8)
    labels[:, 15:] = 1
    return Example("a.png", image, labels, labels, labels if truth else None)


def _lines() -> list[dict[str, float]]:
    return [
        {"step": step, "loss": 3.0 / step, "agreement": step / 100, "drift": 0.0}
        for step in range(10, 101, 10)
    ]


@pytest.mark.parametrize("truth", [False, True])
def test_the_page_shows_pictures_curves_and_scores(tmp_path: Path, truth: bool) -> None:
    scores = [Score("teacher", 0.5, [0.4, 0.6]), Score("student", 0.65, [0.7, None])] if truth else []
    page = write_training_page(
        tmp_path / "sub" / "report.html", record=RECORD, lines=_lines(), examples=[_example(truth)] * 3,
        names=NAMES, palette=PALETTE, scores=scores, note="a note",
    ).read_text()  # fmt: skip
    assert page.count('alt="student of a.png"') == 3 and page.count("data:image/") == 3 * (4 if truth else 3)
    assert ("IoU of every class" in page) is truth and ("+30.0" in page) is truth
    assert page.count("<svg") == 3 and page.count('class="reference"') == 3  # where self-training began
    # Names of users are text, and nothing is fetched from elsewhere.
    assert "<b>sky</b>" not in page and "<script" not in page and not re.search(r"https?://", page)


def test_a_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    record = RECORD | {"training": RECORD["training"] | {"stopped": "self_training_collapsed: fish vanished"}}
    page = write_training_page(
        tmp_path / "report.html", record=record, lines=[], examples=[], names=NAMES, palette=PALETTE
    ).read_text()
    assert "fish vanished" in page and "<svg" not in page


def test_the_sheet_has_a_row_for_each_kind() -> None:
    without, with_truth = (
        preview_sheet([_example(truth)] * 2, names=NAMES, palette=PALETTE, caption="c")
        for truth in (False, True)
    )
    assert with_truth.height > without.height and with_truth.width == without.width


def test_a_trace_spans_its_points_and_marks() -> None:
    points = [plots.Point(float(x), float(x % 7)) for x in range(0, 5000)]
    drawn = str(plots.trace(points, label="loss <x>", marks=[100.0, 9999.0]))
    assert drawn.count('class="reference"') == 1 and "loss &lt;x&gt;" in drawn
    assert len(re.findall(r"[\d.]+,[\d.]+", drawn)) < 1000  # thinned
