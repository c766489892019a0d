"""Which recorded table a labelling run may add to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.labelling.recorded import recorded_table
from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe
from pipeline.ontology.reading import parse_classes
from pipeline.table.labels import DATASET_FILE
from pipeline.table.record import TableRecord

CLASSES = parse_classes("cat, dog")


def existing(folder: Path, recorded: dict[str, Any], recipe: LabelRecipe) -> TableRecord | None:
    """The record that a run with ``recipe`` finds in a table labelled with the ``recorded`` fields."""
    weights = {"model": recipe.model, "pretrained": recipe.pretrained, "fingerprint": "0"}
    record = {
        "recipe": recorded,
        "precision": "bf16",
        "ontology": CLASSES.to_record(),
        "weights": weights,
    }
    (folder / DATASET_FILE).write_text(json.dumps(record))
    return recorded_table(open_storage(str(folder)), recipe, CLASSES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_table_older_than_a_field_has_its_default(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    recorded = recipe.to_dict() | {"hash": "of the fields it had"}
    del recorded["images"]["corruption"]
    assert existing(tmp_path, recorded, recipe) is not None
    with pytest.raises(MaskMillError, match=r'images\.corruption: "" there, spatter:2 here') as caught:
        existing(tmp_path, recorded, change_recipe(recipe, {"corruption": "spatter:2"}))
    assert caught.value.code == "output_differs"


def test_a_corrupted_table_is_not_continued_with_clean_images(tmp_path: Path) -> None:
    recipe = RECIPES["toy"]
    corrupted = change_recipe(recipe, {"corruption": "spatter:2"})
    assert existing(tmp_path, corrupted.to_dict(), corrupted) is not None
    with pytest.raises(MaskMillError, match=r'images\.corruption: spatter:2 there, "" here'):
        existing(tmp_path, corrupted.to_dict(), recipe)


def test_the_name_of_a_recipe_does_not_matter(tmp_path: Path) -> None:
    recipe = RECIPES["toy"]
    assert existing(tmp_path, recipe.to_dict(), recipe.replace(name="renamed")) is not None


#: What a table holds that was labelled before recipes held settings.
FLAT = {
    "name": "toy", "model": "toyclip", "pretrained": "bundled", "scale": [512, 128], "keep_ratio": True,
    "resize": "opencv", "max_pixels": 100000000, "corruption": "", "head": "value", "image_stats": "clip",
    "profile": "weights", "window": 0, "window_stride": 0, "ks_threshold": 0.0, "ks_axis": "token",
    "ks_source": "projected", "pd_threshold": 0.0, "temperature": 100.0, "precision": "auto",
    "batch_size": 0, "min_confidence": 0.0, "clipseg": {"text_weight": 0.5}, "hash": "of all that",
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"batch_size": 2}, {"precision": "bf16"}, {"precision": "auto"}])
def test_what_changes_no_label_does_not_keep_a_table_from_going_on(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert existing(tmp_path, FLAT, RECIPES["toy"].replace(**changes)) is not None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"precision": "fp32"}, "precision: bf16 there, fp32 here"),
        ({"scale": (256, 128)}, "images.scale: [512, 128] there, [256, 128] here"),
        ({"head": "maskclip"}, "maskclip.head: value there, maskclip here"),
        ({"min_confidence": 0.5}, "min_confidence: 0.0 there, 0.5 here"),
    ],
)
def test_what_changes_labels_needs_a_table_of_its_own(
    tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(MaskMillError, match=re.escape(says)):
        existing(tmp_path, FLAT, change_recipe(RECIPES["toy"], changes))
