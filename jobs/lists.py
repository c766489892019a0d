"""``maskmill datasets`` and ``maskmill recipes``: what there is to choose from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from tyro.conf import Positional

from models.errors import WrongUse
from pipeline.files.recipes import Recipe, RecipeBook
from pipeline.tracking.names import flatten


@dataclass(frozen=True, kw_only=True)
class Datasets:
    """List the benchmark datasets: what they are and how their folders must look."""

    def run(self) -> int:
        """Print them."""
        from pipeline.datasets.registry import DATASETS

        for name, info in DATASETS.items():
            print(f"{name:14} {info.description} (split {info.default_split})\n  from {info.source.home}")
            print("\n".join(f"    {line}" for line in info.source.layout.splitlines()) + "\n")
        return 0


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes of label and train, or explain the fields of one."""

    name: Positional[str | None] = None
    """the recipe to explain; default: list all."""

    def run(self, console: Console | None = None) -> int:
        """Print them.

        Raises:
            MaskMillError: ``recipe_invalid`` if there is no such recipe.
        """
        console = console or Console()
        books = _books()
        if self.name is None:
            for command, book in books.items():
                _print(console, f"maskmill {command} --recipe …")
                for name, recipe in book.recipes.items():
                    _print(console, f"  {name:28} {_summary(recipe, book)}")
                _print(console, "")
            _print(console, "Every field of one: maskmill recipes NAME. Change one: --set FIELD=VALUE.")
            return 0
        known = {name: None for book in books.values() for name in book.recipes}
        if self.name not in known:
            raise WrongUse(
                "recipe_invalid", f"There is no recipe {self.name!r}.", f"Known: {', '.join(known)}."
            )
        for command, book in books.items():
            if self.name in book.recipes:
                _explain(console, command, book.recipes[self.name], book)
        return 0


def _books() -> dict[str, RecipeBook[Any]]:
    """The recipes by the command that takes them."""
    from pipeline.labelling.recipes import LABEL_RECIPES
    from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES
    from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

    return {
        "label": LABEL_RECIPES,
        "train maskclip-plus": MASKCLIP_PLUS_RECIPES,
        "train clipseg": CLIPSEG_RECIPES,
    }


def _summary(recipe: Recipe, book: RecipeBook[Any]) -> str:
    """What the recipe sets otherwise than the default one."""
    if recipe.name == book.default:
        return "the default"
    usual = flatten(book.recipes[book.default].to_dict())
    return " ".join(
        f"{field}={_text(value)}"
        for field, value in flatten(recipe.to_dict()).items()
        if field != "name" and value != usual.get(field)
    )


def _explain(console: Console, command: str, recipe: Recipe, book: RecipeBook[Any]) -> None:
    usual = flatten(book.recipes[book.default].to_dict())
    _print(console, f"maskmill {command} --recipe {recipe.name}")
    for field, value in flatten(recipe.to_dict()).items():
        if field == "name":
            continue
        default = usual.get(field)
        other = "" if value == default else f"    ({book.default}: {_text(default)})"
        _print(console, f"  {field} = {_text(value)}{other}")
    _print(console, "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
