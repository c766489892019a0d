"""The commands in the documentation are commands: they parse, and their recipes take their settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from jobs.benchmarks.maskclip import METHODS
from jobs.cli import COMMANDS, TRAININGS, check_command, parse
from jobs.evaluate.command import Evaluate
from jobs.label import Label
from jobs.train.command import Train
from pipeline.evaluation.published import load_published
from pipeline.labelling.recipes import RECIPES, change_recipe, load_recipe
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
_CODE = re.compile(r"```sh\n(.*?)```|`([^`\n]+)`", re.DOTALL)


def commands(page: Path) -> list[str]:
    """What begins with ``maskmill`` in a page, and is more than the name of a command."""
    found = []
    for block, inline in _CODE.findall(page.read_text()):
        for line in (block or inline).replace("\\\n", " ").splitlines():
            text = line.strip()
            if text.startswith("maskmill ") and "…" not in text and not _names(text):
                found.append(text)
    return found


def _names(text: str) -> bool:
    """Whether a text is the name of a command, as sentences have it."""
    return {*shlex.split(text, comments=True)[1:]} <= {*COMMANDS, *TRAININGS} - {"runs"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in commands(page):
        words = shlex.split(text, comments=True)[1:]
        try:
            check_command(words)
            command = parse(words)
            if isinstance(command, (Label, Evaluate)) and command.by.model is None:
                command.by.load()
            if isinstance(command, Train) and words[1] == "maskclip-plus":
                MASKCLIP_PLUS_RECIPES.load(command.model.recipe, command.model.settings)
        except (Exception, SystemExit) as error:
            pytest.fail(f"{page.name}: {text}: {error}")


def test_published_figures_in_the_readme_are_those_of_their_sources() -> None:
    rows = re.findall(r"^\| (`.*`.*) \| (.+) \| ([\d.]+) \| ([\d.]+) \|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 9
    for recipes, title, mean, voc in rows:
        method = title.partition(",")[0]
        known = {
            figure.dataset: figure.value
            for table in ("unified_repositories", "unified_eight_sets")
            for figure in load_published(table).figures()
            if (figure.method, figure.model) == (method, "ViT-B/16")
        }
        assert (float(mean), float(voc)) == (round(known["mean of eight"], 1), round(known["voc20"], 1)), (
            title
        )
        name, _, refiner = recipes.replace("`", "").partition(", ")
        recipe = load_recipe(name, [refiner] if refiner else [])
        helped = {"LPOSS": "lposs", "ProxyCLIP": "proxy"}
        if method in helped:  # with sizes of their own, so no rows of the benchmark
            assert recipe.maskclip.head == helped[method] and recipe.maskclip.helper
            continue
        wanted = change_recipe(RECIPES["maskclip"], METHODS[method]).maskclip
        assert (recipe.maskclip.head, recipe.maskclip.refine) == (wanted.head, wanted.refine)


def test_the_page_of_symptoms_has_commands() -> None:
    page = ROOT / "docs/diagnostics.md"
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    symptoms = [row for row in rows if len(row) == 4 and row[0] != "| symptom"]
    assert len(symptoms) >= 15
    assert all(all(cell.strip(" |") for cell in row) for row in symptoms)
    assert len(commands(page)) >= 15
