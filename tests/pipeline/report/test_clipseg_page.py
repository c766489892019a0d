from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.report.clipseg_page import Answer, clipseg_page, clipseg_sheet
from pipeline.report.training_page import write_training_page
from pipeline.trained.clipseg import ClipSegRecord

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
        "data": {
            "source": "phrases", "fingerprint": "abc", "images": 3000, "triplets": 20000,
            "kinds": {"words": 5, "examples": [1, 2]},
        },
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
    assert "words: 5, examples: 1, 2" in page and not re.search(r"[{\[](&#39;|\d)", page)  # no Python on it
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
