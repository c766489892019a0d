"""``maskmill datasets`` and ``maskmill recipes``: list what can be chosen."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Annotated, Any

from rich.console import Console
from tyro.conf import Positional, arg

from models.errors import WrongUse, did_you_mean
from models.settings import as_written
from pipeline.files.recipes import Recipe, RecipeBook, describe
from pipeline.labelling.lineage import licence, lineage
from pipeline.labelling.recipes import LabelRecipe

WIDTH = 92
"""Text width in columns."""


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """List the benchmark datasets and the folder layout that each needs.

    Attributes:
        name: the dataset to show; default: list all.
    """

    name: Annotated[Positional[str | None], arg(metavar="DATASET", help_behavior_hint="")] = None

    def run(self) -> int:
        """Print them.

        Raises:
            WrongUse: ``name_unknown``.
        """
        from pipeline.datasets.registry import DATASETS

        if self.name is not None and self.name not in DATASETS:
            raise WrongUse(
                "name_unknown",
                f"There is no dataset {self.name!r}.",
                f"{did_you_mean(self.name, DATASETS)}Known: {', '.join(DATASETS)}.",
            )
        for name, info in DATASETS.items():
            if self.name in (None, name):
                print(f"{name:14} {info.description} (split {info.default_split})\n  from {info.source.home}")
                print("\n".join(f"    {line}" for line in info.source.layout.splitlines()) + "\n")
        return 0


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes of label and train, or explain the fields of one.

    Attributes:
        name: the recipe to explain; default: list all.
    """

    name: Annotated[Positional[str | None], arg(metavar="RECIPE", help_behavior_hint="")] = None

    def run(self, console: Console | None = None) -> int:
        """Print them.

        Raises:
            MaskMillError: ``setting_invalid`` if there is no such recipe.
        """
        console = console or Console()
        books = _books()
        if self.name is None:
            for command, book in books.items():
                _print(console, f"maskmill {command} --recipe …")
                for name, recipe in book.recipes.items():
                    _print(console, f"  {name:36} {_summary(recipe, book, WIDTH)}")
                for weights, names in _by_weights(book).items():
                    _print(console, f"  {weights}: {', '.join(names)}")
                _print(console, "")
            _print(console, "Every field of one: maskmill recipes NAME. Change one: --set FIELD=VALUE.")
            return 0
        known = {name: None for book in books.values() for name in book.recipes}
        if self.name not in known:
            raise WrongUse(
                "setting_invalid",
                f"There is no recipe {self.name!r}.",
                f"{did_you_mean(self.name, known)}Known: {', '.join(known)}.",
            )
        for command, book in books.items():
            if self.name in book.recipes:
                _explain(console, command, book.recipes[self.name])
        return 0


def _books() -> dict[str, RecipeBook[Any]]:
    """The recipe books by command."""
    from pipeline.labelling.recipes import LABEL_RECIPES
    from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES
    from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

    return {
        "label": LABEL_RECIPES,
        "train maskclip-plus": MASKCLIP_PLUS_RECIPES,
        "train clipseg": CLIPSEG_RECIPES,
    }


def _weights(recipe: LabelRecipe) -> str:
    """What the weights have seen, and their terms."""
    return f"weights: {lineage(recipe)}; licence: {licence(recipe)}"


def _by_weights(book: RecipeBook[Any]) -> dict[str, list[str]]:
    """Names of label recipes by what their weights have seen; training takes the weights of its table."""
    groups: dict[str, list[str]] = {}
    for name, recipe in book.recipes.items():
        if isinstance(recipe, LabelRecipe):
            groups.setdefault(_weights(recipe), []).append(name)
    return groups


def _summary(recipe: Recipe, book: RecipeBook[Any], width: int) -> str:
    """The settings in which the recipe differs from the default one, cut to one line."""
    if recipe.name == book.default:
        return "the default"
    usual = {field.name: field.value for field in describe(book.recipes[book.default])}
    changes = [
        f"{field.name}={as_written(field.value)}"
        for field in describe(recipe)
        if field.value != usual.get(field.name)
    ]
    return textwrap.shorten(" ".join(changes), width, placeholder=" …")


def _explain(console: Console, command: str, recipe: Recipe) -> None:
    _print(console, f"maskmill {command} --recipe {recipe.name}")
    if isinstance(recipe, LabelRecipe):
        _print(console, _weights(recipe))
    for field in describe(recipe):
        default = "" if field.value == field.default else f"    (default: {as_written(field.default)})"
        _print(console, f"\n  {field.name} = {as_written(field.value)}{default}")
        note = "" if field.changes_result else " Does not change the result."
        _print(
            console,
            textwrap.indent(textwrap.fill((field.description + note).replace("``", ""), WIDTH), "      "),
        )
    _print(console, "")


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
