"""The page of a training: what it is given is on it, as text, and nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.report.training_page import Card, Score, TrainingPage, write_training_page


def made(**fields: Any) -> TrainingPage:
    image = np.full((20, 30, 3), 90, np.uint8)
    given: dict[str, Any] = {
        "title": "A <model>",
        "toy": False,
        "training": {"iterations": 1200, "seconds": 90.0, "samples_per_second": 12.0, "data_wait": 0.25},
        "samples": "crops",
        "tiles": [("kind", "deep")],
        "cards": [Card("a.png", [("image", image), ("found", image)])] * 3,
        "curves": {"loss": "loss", "iou": "IoU", "absent": "not logged"},
        "curves_note": "By step.",
        "data": [("images", "1,234")],
        "files": [("folder", "runs/a")],
        "commands": {"Use it": "maskmill segment --weights <runs/a>"},
        "settings": {"recipe": {"name": "r", "note": "<script>"}},
    }
    return TrainingPage(**(given | fields))


LINES = [{"step": step, "loss": 3.0 / step, "iou": None if step < 50 else 0.5} for step in range(10, 101, 10)]


def test_all_that_is_given_is_there(tmp_path: Path) -> None:
    page = write_training_page(tmp_path / "sub" / "report.html", made(marks=[40]), LINES).read_text()
    for part in (
        "A &lt;model&gt;", "1,200", "1.5 min", "25 % of the time", "0.075 s", "1,234", "runs/a", "By step.",
        "maskmill segment --weights &lt;runs/a&gt;", "recipe.note",
    ):  # fmt: skip
        assert part in page, part
    assert page.count('alt="found of a.png"') == 3 and page.count("data:image/") == 6
    assert page.count("<svg") == 2 and page.count('class="reference"') == 2
    assert "not logged" not in page and "IoU of every class" not in page and "a toy" not in page
    # Names of users are text, and nothing is fetched from elsewhere.
    assert "<script" not in page and not re.search(r"https?://", page)


def test_a_run_that_was_stopped_says_so_and_a_toy_is_called_one(tmp_path: Path) -> None:
    training = {"iterations": 3, "stopped": "self_training_collapsed: fish vanished"}
    page = write_training_page(
        tmp_path / "report.html", made(training=training, toy=True, cards=[]), []
    ).read_text()
    assert "fish vanished" in page and "a toy" in page
    assert "<svg" not in page and "Side by side" not in page and "time of training" not in page


@pytest.mark.parametrize(("ious", "gain"), [([0.7, None], "+30.0"), ([0.3, None], "-10.0")])
def test_gains_of_classes(tmp_path: Path, ious: list[float | None], gain: str) -> None:
    scores = [Score("teacher", 0.5, [0.4, 0.6]), Score("student", 0.65, ious)]
    page = write_training_page(
        tmp_path / "report.html", made(scores=scores, names=("grass", "<b>sky</b>")), LINES
    ).read_text()
    assert "IoU of every class" in page and gain in page and "+15.0" in page and "<b>sky</b>" not in page
