from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from pipeline.labelling.recipes import RECIPES, recipe_from_dict
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_help_names_every_command(maskmill: Run) -> None:
    done = maskmill("--help")
    assert done.returncode == 0
    for command in ("label", "show", "train", "evaluate", "demo", "recipes"):
        assert command in done.stdout


def test_label_help_explains_every_flag(maskmill_here: Run) -> None:
    text = maskmill_here("label", "--help", COLUMNS="200").stdout
    for flag in (
        "--images", "--manifest", "--output", "--classes", "--ontology", "--recipe", "--set",
        "--no-background",
        "--min-confidence", "--max-failure-rate", "--overwrite", "--address", "--verbose",
    ):  # fmt: skip
        assert flag in text


def test_recipes_are_printed_whole(maskmill_here: Run) -> None:
    printed = yaml.safe_load(maskmill_here("recipes").stdout)
    labelling = {name: recipe_from_dict(fields) for name, fields in printed["label"].items()}
    assert labelling == dict(RECIPES)
    training = printed["train maskclip-plus"]
    assert {name: MASKCLIP_PLUS_RECIPES.from_dict(fields) for name, fields in training.items()} == dict(
        MASKCLIP_PLUS_RECIPES.recipes
    )


def test_train_help_names_what_can_be_trained(maskmill_here: Run) -> None:
    assert "maskclip-plus" in maskmill_here("train", "--help").stdout
    text = maskmill_here("train", "maskclip-plus", "--help", COLUMNS="200").stdout
    for flag in (
        "--labels",
        "--output",
        "--recipe",
        "--set",
        "--unseen",
        "--dataset",
        "--workers",
        "--register",
    ):
        assert flag in text


@pytest.mark.parametrize(
    "arguments", [["label"], ["label", "--output"], ["nonsense"], ["show"], ["label", "--outptu", "x"]]
)
def test_wrong_flags_exit_with_2(maskmill_here: Run, arguments: list[str]) -> None:
    done = maskmill_here(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_show_without_a_table_says_so(maskmill_here: Run, tmp_path: Path) -> None:
    done = maskmill_here("show", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and str(tmp_path) in done.stderr
