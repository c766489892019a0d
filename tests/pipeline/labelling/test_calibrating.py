"""The first pass over a corpus: what it finds, and that a table keeps it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jobs.label import label_images
from jobs.labelling.options import LabelOptions
from models.errors import MaskMillError
from pipeline.labelling.calibrating import calibrated, count_scores, plain_scores
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES, change_recipe, table_recipe
from pipeline.ontology.reading import load_ontology
from pipeline.table.record import read_table_record
from pipeline.toyworld.scenes import generate
from pipeline.tracking.tracker import OFF

TOYWORLD = load_ontology("toyworld")
ASKED = change_recipe(RECIPES["toy"], {"calibrate": 0.95, "candidates": 5, "precision": "fp32"})


def test_it_measures_plain_scores() -> None:
    plain = plain_scores(ASKED)
    assert plain.maskclip.classes == RECIPES["toy"].maskclip.classes
    labeller = prepare_labeller(plain, TOYWORLD).build(threads=1)
    scenes = generate(3, 12, 128).images
    whole = count_scores(labeller, scenes)  # type: ignore[arg-type]
    halves = count_scores(labeller, scenes[:5]) + count_scores(labeller, scenes[5:])  # type: ignore[arg-type]
    assert np.array_equal(whole, halves) and (whole.sum(1) == 12 * 16 * 16).all()
    found = calibrated(ASKED, whole).maskclip.classes
    assert len(found.bias) == 14 and not found.uncalibrated and found.candidates == 5


def test_without_a_corpus_it_is_refused() -> None:
    with pytest.raises(MaskMillError, match="measures the scores of a corpus") as caught:
        prepare_labeller(ASKED, TOYWORLD)
    assert caught.value.code == "setting_invalid"


@pytest.mark.cluster
@pytest.mark.slow
def test_a_table_keeps_what_was_measured(tmp_path: Path, shared_ray: str) -> None:
    scenes = generate(4, 5, 128).images
    (tmp_path / "images").mkdir()
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    options = LabelOptions(
        output=str(tmp_path / "table"), max_failure_rate=0.5, address=shared_ray, tracking=OFF
    )
    assert label_images(str(tmp_path / "images"), ASKED, TOYWORLD, options) == 0
    record = json.loads((tmp_path / "table" / "dataset.json").read_text())
    bias = record["recipe"]["maskclip"]["classes"]["bias"]
    labeller = prepare_labeller(plain_scores(ASKED), TOYWORLD).build(threads=1)
    wanted = calibrated(ASKED, count_scores(labeller, scenes))  # type: ignore[arg-type]
    assert tuple(bias) == wanted.maskclip.classes.bias
    # The same command goes on with it; another one is told.
    recorded = table_recipe(read_table_record(options.output))
    assert ASKED.differences(recorded) == [] and ASKED.adopt(recorded) == recorded
    other = change_recipe(ASKED, {"calibrate": 0.9})
    assert other.differences(recorded) == ["maskclip.classes.calibrate: 0.95 there, 0.9 here"]
    assert change_recipe(ASKED, {"bias": [0.0] * 14}).differences(recorded)
