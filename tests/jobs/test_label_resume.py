"""Which recorded table a labelling job may add to."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jobs import label
from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.labelling.recipes import RECIPES, LabelRecipe
from pipeline.ontology.ontology import parse_classes

CLASSES = parse_classes("cat, dog")


def existing(folder: Path, recorded: dict[str, Any], recipe: LabelRecipe) -> dict[str, Any] | None:
    """The record that a job with ``recipe`` finds in a table labelled with the ``recorded`` fields."""
    record = {"recipe": recorded, "ontology": CLASSES.to_dict() | {"hash": CLASSES.hash}}
    (folder / label.DATASET_FILE).write_text(json.dumps(record))
    job = label.LabelJob(
        source="images", ontology=CLASSES, recipe=recipe, output=str(folder), overwrite=False,
        max_failure_rate=0.05, address=None, verbose=False, tracking=None, system_metrics=False,
    )  # fmt: skip
    return label._existing(open_storage(str(folder)), job)


@pytest.mark.parametrize("name", RECIPES)
def test_a_table_older_than_a_field_has_its_default(tmp_path: Path, name: str) -> None:
    recipe = RECIPES[name]
    recorded = recipe.to_dict() | {"hash": "of the fields it had"}
    del recorded["corruption"]
    assert existing(tmp_path, recorded, recipe) is not None
    with pytest.raises(MaskMillError, match="corruption: '' there, 'spatter:2' here") as caught:
        existing(tmp_path, recorded, dataclasses.replace(recipe, corruption="spatter:2"))
    assert caught.value.code == "output_differs"


def test_a_corrupted_table_is_not_continued_with_clean_images(tmp_path: Path) -> None:
    recipe = RECIPES["toy"]
    corrupted = dataclasses.replace(recipe, corruption="spatter:2")
    assert existing(tmp_path, corrupted.to_dict(), corrupted) is not None
    with pytest.raises(MaskMillError, match="corruption: 'spatter:2' there, '' here"):
        existing(tmp_path, corrupted.to_dict(), recipe)


def test_the_name_of_a_recipe_does_not_matter(tmp_path: Path) -> None:
    recipe = RECIPES["toy"]
    assert existing(tmp_path, recipe.to_dict(), dataclasses.replace(recipe, name="renamed")) is not None
