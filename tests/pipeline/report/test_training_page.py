"""The page of a training: what it is given is on it, as text, and nothing is fetched."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.files.images import ImageSettings
from pipeline.ontology.ontology import parse_classes
from pipeline.report.training_page import (
    Answer,
    Card,
    Example,
    Score,
    TrainingPage,
    clipseg_page,
    clipseg_sheet,
    student_page,
    student_sheet,
    write_training_page,
)
from pipeline.trained.clipseg import ClipSegRecord
from pipeline.trained.student import StudentRecord


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
        "A &lt;model&gt;", "1,200", "1.5 min", "25% of the time", "0.075 s", "1,234", "runs/a", "By step.",
        "maskmill segment --weights &lt;runs/a&gt;", "recipe.note",
    ):  # fmt: skip
        assert part in page, part
    assert page.count('alt="found of a.png"') == 3 and page.count("data:image/") == 6
    assert page.count("<svg") == 2 and page.count('class="reference"') == 1  # the mark is before IoU's points
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


# --- students ---

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


# --- CLIPSeg and baselines ---

COLUMNS = np.arange(16)[None, :].repeat(12, 0)
LEFT = COLUMNS < 8
NOWHERE = np.zeros((12, 16), bool)
IMAGE = np.full((12, 16, 3), 90, np.uint8)


def _clipseg(**fields: Any) -> ClipSegRecord:
    given: dict[str, Any] = {
        "created": "", "model": "clipseg", "fingerprint": "", "hugging_face": True,
        "config": {"reduce_dim": 64, "extract_layers": [3, 7, 9]},
        "clip": {"model": "ViT-B-16", "pretrained": "openai", "fingerprint": "f"},
        "recipe": {"name": "r", "triplets": {"size": 352}},
        "data": {"source": "phrases", "fingerprint": "abc", "images": 3000, "triplets": 20000},
        "metrics": {"iou": 0.456}, "training": {"iterations": 100, "seconds": 90.0}, "versions": {},
    }  # fmt: skip
    return ClipSegRecord(**(given | fields))


@pytest.mark.parametrize(
    ("there", "probability", "share", "caption"),
    [
        (LEFT, np.where(LEFT, 0.9, 0.1), 1.0, "text; IoU 100.0 %"),
        (LEFT, np.where(LEFT, 0.4, 0.31), 1.0, "text; IoU 50.0 %"),  # the usual threshold is 0.3
        (LEFT, np.full(LEFT.shape, 0.29), 0.25, "text 25%, example; IoU 0.0 %"),
        (NOWHERE, np.full(LEFT.shape, 0.2), 0.0, "text 0%, example; not in the image: rightly not found"),
        (NOWHERE, np.full(LEFT.shape, 0.9), 1.0, "text; not in the image: a false alarm"),
    ],
)  # fmt: skip
def test_captions(there: np.ndarray, probability: np.ndarray, share: float, caption: str) -> None:
    answer = Answer("a", share, IMAGE, there, probability.astype(np.float32))
    assert answer.caption == caption


@pytest.mark.parametrize(
    ("there", "p", "caption", "share"),
    [
        (LEFT, np.ones(LEFT.shape), "text; IoU 80.0 %", 0.8),
        (LEFT, np.where(LEFT, 0.9, 0.1), "text; IoU 100.0 %", 0.8),
        (NOWHERE, np.where(COLUMNS < 10, 0.1, 0.9), "text; not in the image: rightly not found", 0.0),
    ],
)
def test_what_nobody_knows_counts_neither_way(
    there: np.ndarray, p: np.ndarray, caption: str, share: float
) -> None:
    answer = Answer("a", 1.0, IMAGE, there, p.astype(np.float32), known=COLUMNS < 10)
    assert answer.caption == caption and answer.share == pytest.approx(share)


def test_the_page_and_the_picture_of_a_clipseg(tmp_path: Path) -> None:
    p = np.where(LEFT, 0.9, 0.1).astype(np.float32)
    answers = [Answer("<red> car", 1.0, IMAGE, LEFT, p), Answer("", 0.0, IMAGE, LEFT, p, IMAGE)]
    lines = [{"step": step, "loss": 1 / step, "iou": 0.1, "learning_rate": 1e-3} for step in (10, 20)]
    made = clipseg_page(
        _clipseg(), answers, uri="runs/finder", commands={"Ask it": "maskmill segment --weights runs/finder"}
    )
    page = write_training_page(tmp_path / "report.html", made, lines).read_text()
    for part in (
        "CLIPSeg over ViT-B-16", "45.6", "64 wide, layers 3 7 9", "&lt;red&gt; car", "the example alone",
        "20,000", "maskmill segment --weights runs/finder", "recipe.triplets.size",
    ):  # fmt: skip
        assert part in page, part
    assert page.count("data:image/") == 4 + 5 and page.count("<svg") == 3 and "abc" not in page
    one, two = (clipseg_sheet(answers[:count]) for count in (1, 2))
    assert two.width == 2 * one.width and two.height == one.height


@pytest.mark.parametrize(
    ("model", "config", "tile"),
    [
        ("clip-deconv", {"reduce_dim": 8, "reduce2_dim": 8, "extract_layer": 1}, "8 wide, layers 1"),
        ("vitseg", {"reduce_dim": 16, "extract_layers": [0, 2], "tower": "vit"}, "16 wide, layers 0 2"),
    ],
)
def test_baselines_have_a_page(model: str, config: dict[str, Any], tile: str) -> None:
    made = clipseg_page(
        _clipseg(model=model, config=config, hugging_face=False, metrics={}), [], uri="r", commands={}
    )
    assert made.title.startswith({"clip-deconv": "CLIP-Deconv", "vitseg": "ViTSeg"}[model])
    assert [value for name, value in made.tiles if name == "decoder"] == [tile]
    assert not any("transformers" in name for name, _ in made.files)
