"""Options that several commands share, each written once.

A single option is an annotated type. A group is a dataclass that a command holds as
``Annotated[Group, FLAT]``: its fields are then written and listed like the command's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from models.errors import WrongUse

if TYPE_CHECKING:
    from pipeline.labelling.recipes import LabelRecipe
    from pipeline.ontology.ontology import Ontology

T = TypeVar("T")

FLAT = tyro.conf.arg(name="")
Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Settings = Annotated[
    tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="set", metavar="KEY=VALUE")
]
Address = Annotated[
    str | None,
    tyro.conf.arg(
        help="address of a Ray cluster; default: the one that RAY_ADDRESS names, else this machine alone."
    ),
]
Verbose = Annotated[bool, tyro.conf.arg(aliases=["-v"], help="show Ray's own messages.")]
Tracking = Annotated[
    str | None,
    tyro.conf.arg(
        help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db; off: none."
    ),
]
SystemMetrics = Annotated[bool, tyro.conf.arg(help="track the load of this machine as well.")]


@dataclass(frozen=True, kw_only=True)
class LabellingModel:
    """What labels."""

    recipe: str | None = None
    """named recipe or YAML file: every knob that changes the labels; maskmill recipes lists them. Default:
    maskclip."""
    model: str | None = None
    """a trained model, the --output of maskmill train, instead of --recipe; a student brings its classes
    along. Or clipseg, the released one."""
    settings: Settings = ()
    """change one knob of the recipe: head=value; may be repeated."""

    def load(self) -> tuple[LabelRecipe, Ontology | None]:
        """The recipe, and the classes of a student.

        Raises:
            MaskMillError: ``wrong_use``, ``recipe_invalid``; and for what is wrong with the model's folder.
        """
        from pipeline.labelling.recipes import LABEL_RECIPES

        if self.model is None or (self.recipe is None and self.model == "clipseg"):
            name = self.recipe or self.model or LABEL_RECIPES.default
            return LABEL_RECIPES.load(name, self.settings), None
        if self.recipe is not None:
            raise WrongUse(
                "wrong_use",
                "--recipe says which CLIP labels, --model which trained model.",
                "Give one of them.",
            )
        from pipeline.labelling.prepare import clipseg_recipe, student_recipe
        from pipeline.trained.clipseg import is_trained

        if is_trained(self.model):
            return clipseg_recipe(self.model, self.settings), None
        return student_recipe(self.model, self.settings)


def exactly_one(first: str, one: T | None, second: str, other: T | None, *, command: str) -> T:
    """The one of two options that is given.

    Raises:
        MaskMillError: ``wrong_use`` if both are given, or neither.
    """
    if one is not None and other is None:
        return one
    if other is not None and one is None:
        return other
    both = ", not both" if one is not None else ""
    raise WrongUse("wrong_use", f"Give either {first} or {second}{both}.", f"See maskmill {command} --help.")


def comma_separated(text: str) -> tuple[str, ...]:
    """The names in ``"cow, motorbike"``, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def named_values(option: str, given: Sequence[str], *, last: bool = True) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a mapping, split at the last ``=`` (names of rows hold some) or the first.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    values = {}
    for text in given:
        name, separator, value = text.rpartition("=") if last else text.partition("=")
        if not separator or not name or not value:
            raise WrongUse(
                "wrong_use",
                f"{option} {text!r} is not of the form NAME=VALUE.",
                f"Write {option} voc20=DIR.",
            )
        values[name] = value
    return values
