from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.cli import COMMANDS, TRAININGS, parse
from pipeline.labelling.recipes import LABEL_RECIPES
from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_help_names_every_command(maskmill: Run) -> None:
    done = maskmill("--help")
    assert done.returncode == 0
    for command in ("label", "show", "train", "evaluate", "demo", "recipes"):
        assert command in done.stdout


def test_the_commands_are_those_of_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, names in (([], tuple(COMMANDS)), (["train"], TRAININGS)):
        with pytest.raises(SystemExit):
            parse([*arguments, "--help"])
        listed = re.search(r"\{([\w,-]+)\}", capsys.readouterr().out)
        assert listed and tuple(listed[1].split(",")) == names


@pytest.mark.parametrize(
    "command", [*(name for name in COMMANDS if name != "train"), *(f"train {name}" for name in TRAININGS)]
)
def test_help_shows_nothing_of_python(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        parse([*command.split(), "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"usage: maskmill {command}" in text
    for wrong in ("None", "default: False", "default: True", "(default: )", "may be repeated. (repeatable)"):
        assert wrong not in text, wrong


def test_label_help_explains_every_flag(maskmill_here: Run) -> None:
    text = maskmill_here("label", "--help", COLUMNS="200").stdout
    for flag in (
        "--images", "--manifest", "--output", "--classes", "--ontology", "--recipe", "--set",
        "--no-background",
        "--min-confidence", "--max-failure-rate", "--overwrite", "--address", "--verbose",
    ):  # fmt: skip
        assert flag in text


def test_recipes_are_listed_and_explained(maskmill_here: Run) -> None:
    listed = maskmill_here("recipes").stdout
    for book in (LABEL_RECIPES, MASKCLIP_PLUS_RECIPES, CLIPSEG_RECIPES):
        assert all(f"  {name}" in listed for name in book.recipes)
    assert len(listed.splitlines()) < 50
    assert "weights: a teacher saw annotated masks; licence: permissive: clipseg, clipseg-zero-shot" in listed
    explained = maskmill_here("recipes", "toy").stdout
    for command in ("label", "train maskclip-plus", "train clipseg"):
        assert f"maskmill {command} --recipe toy" in explained
    assert "weights: image-text only; licence: permissive" in explained
    assert "head = value" in explained and "loop.iterations = 450" in explained
    unknown = maskmill_here("recipes", "tyo")
    assert unknown.returncode == 2 and "toy-zero-shot" in unknown.stderr


def test_the_version_is_told(maskmill_here: Run) -> None:
    done = maskmill_here("--version")
    assert done.returncode == 0 and re.fullmatch(r"maskmill \d+\.\d+\S*\n", done.stdout)


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


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_a_closed_stdout_ends_the_command_quietly(
    maskmill_environment: dict[str, str], arguments: list[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)  # as `head` does once it has enough
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments],
        env=maskmill_environment,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


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
