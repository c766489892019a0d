"""Options that several commands share.

A single option is an annotated type. A group is a dataclass that a command holds as
``Annotated[Group, FLAT]``: its fields then look like the command's own.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import tyro

from models.errors import WrongUse, did_you_mean
from pipeline.tracking.names import place_name

if TYPE_CHECKING:
    from pipeline.datasets.base import Dataset
    from pipeline.labelling.recipes import LabelRecipe
    from pipeline.ontology.ontology import Ontology
    from pipeline.table.views import TableView, View

T = TypeVar("T")

WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".ckpt")
FLAT = tyro.conf.arg(name="")
NO_HINT = tyro.conf.arg(help_behavior_hint="")
"""For options whose help says what happens without them; tyro would add "(default: None)"."""
Maybe = Annotated[T | None, NO_HINT]
Flag = Annotated[bool, NO_HINT]
Repeated = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, NO_HINT]
Settings = Annotated[Repeated, tyro.conf.arg(name="set", metavar="KEY=VALUE")]
Address = Annotated[
    str | None,
    tyro.conf.arg(
        help="address of a Ray cluster; default: the one in RAY_ADDRESS, else this machine alone.",
        help_behavior_hint="",
    ),
]
Verbose = Annotated[
    bool, tyro.conf.arg(aliases=["-v"], help="show Ray's own messages.", help_behavior_hint="")
]
Tracking = Annotated[
    str | None,
    tyro.conf.arg(
        help="MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db; off: none.",
        help_behavior_hint="",
    ),
]
Corrected = Annotated[
    str | None,
    tyro.conf.arg(
        name="corrections",
        metavar="TABLE|off",
        help="corrections of the labels by people (maskmill review), which replace them; default: "
        "corrections/ beside the table, if it exists; off: none.",
        help_behavior_hint="",
    ),
]
SystemMetrics = Annotated[
    bool, tyro.conf.arg(help="also track the load of this machine.", help_behavior_hint="")
]


@dataclass(frozen=True, kw_only=True)
class LabellingModel:
    """The model that labels.

    Attributes:
        recipe: a named recipe or a YAML file, with every setting that changes the labels; maskmill recipes
            lists them. Default: maskclip.
        model: a trained model, the --output of maskmill train, instead of --recipe; a student brings its
            own classes. Or clipseg, the released model.
        settings: change one setting of the recipe, such as head=value; may be repeated.
    """

    recipe: Maybe[str] = None
    model: Maybe[str] = None
    settings: Settings = ()

    def load(self) -> tuple[LabelRecipe, Ontology | None]:
        """The recipe, and the classes if the model is a student.

        Raises:
            MaskMillError: ``wrong_use``, ``setting_invalid``; and for any fault in the model's folder.
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

        known = () if "/" in self.model or Path(self.model).exists() else LABEL_RECIPES.recipes
        if self.model in known:
            raise WrongUse(
                "wrong_use", f"{self.model} is a recipe, not a trained model.", f"Give --recipe {self.model}."
            )
        if did_you_mean(self.model, known):
            raise WrongUse(
                "name_unknown",
                f"There is no model {self.model}.",
                f"{did_you_mean(self.model, known)}Give --recipe NAME, or the --output of maskmill train.",
            )
        if is_trained(self.model):
            return clipseg_recipe(self.model, self.settings), None
        return student_recipe(self.model, self.settings)


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Images with true masks.

    Attributes:
        dataset: name of a benchmark; maskmill datasets lists them.
        root: folder of the benchmark (a path, or s3://…).
        split: part of the benchmark; default: the one that papers report, if there is one. With --images: a
            text file that lists those with masks; default: all of them.
        images: your own images, with --truth, instead of --dataset.
        truth: folder of masks for --images (PNG, values are class ids, 255 is ignored).
    """

    dataset: Maybe[str] = None
    root: Maybe[str] = None
    split: Maybe[str] = None
    images: Maybe[str] = None
    truth: Maybe[str] = None

    @property
    def given(self) -> bool:
        """Whether any of the options is set."""
        return any(value is not None for value in (self.dataset, self.images, self.truth))

    def title(self, opened: Dataset) -> str:
        """What was opened, for the name of a run."""
        own = self.images or (self.root if opened.name in ("pairs", "coco-json") else None)
        return place_name(own) if own else f"{opened.name} {opened.split}".strip()

    def open(self, classes: Ontology | None, *, table: str | None, command: str) -> Dataset:
        """Open the images and masks.

        Args:
            classes: what the values of the masks mean; a benchmark brings its own.
            table: label table to take the classes from if ``classes`` is None.
            command: command named in error messages.

        Raises:
            MaskMillError: ``wrong_use``; as ``pipeline.datasets.registry.open_dataset``.
        """
        from pipeline.datasets.base import Dataset
        from pipeline.datasets.pairs import open_pairs
        from pipeline.datasets.registry import DATASETS, open_dataset
        from pipeline.table.record import read_table_record

        images = exactly_one("--dataset", self.dataset, "--images", self.images, command=command)
        if self.dataset == "phrasecut":
            raise WrongUse(
                "wrong_use",
                "PhraseCut asks for phrases, not for classes.",
                "Run maskmill benchmark clipseg-referring.",
            )
        if self.dataset is not None:
            _refuse(self.truth, "--truth belongs to --images", command)
            info = DATASETS.get(self.dataset)
            own = info is not None and info.needs_ontology
            if own and classes is None and table is not None:
                classes = read_table_record(table).ontology
            options = {"ontology": classes} if own and classes is not None else {}
            opened = open_dataset(self.dataset, root=self.root, split=self.split, **options)
            assert isinstance(opened, Dataset), "only PhraseCut is no Dataset"
            return opened
        _refuse(self.root, "--root belongs to --dataset", command)
        if self.truth is None:
            raise WrongUse("wrong_use", "--images needs --truth.", "Add the folder of masks: --truth DIR.")
        if classes is None and table is None:
            raise WrongUse(
                "wrong_use",
                "What the values of --truth mean is not known.",
                "Add --ontology, a YAML file or a built-in name, such as voc21.",
            )
        if classes is None:
            assert table is not None
            classes = read_table_record(table).ontology
        return open_pairs(images=images, masks=self.truth, split=self.split or "all", ontology=classes)


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    """What to make of the labels of a table, from its stored confidence: nothing is labelled again.

    Attributes:
        view: a view that --save-view stored beside the table, or a YAML file; the options below add to it.
        threshold: pixels with less confidence (0 to 1) are ignored; of one class: dog=0.6; may be repeated.
        thresholds: take the thresholds of the classes from this ontology, a YAML file.
        min_area: ignore connected pieces with fewer pixels; of one class: dog=200; may be repeated.
        merge: classes that become one: "cat,dog=pet"; background=… makes them background; may be repeated.
        drop: classes whose pixels are ignored: "sky, grass".
        rename: give a class another name: grass=lawn; may be repeated.
        save_view: keep these settings beside the table, in views/NAME.json.
    """

    view: Annotated[Maybe[str], tyro.conf.arg(metavar="NAME|FILE")] = None
    threshold: Annotated[Repeated, tyro.conf.arg(metavar="[CLASS=]SHARE")] = ()
    thresholds: Annotated[Maybe[str], tyro.conf.arg(metavar="FILE")] = None
    min_area: Annotated[Repeated, tyro.conf.arg(metavar="[CLASS=]PIXELS")] = ()
    merge: Annotated[Repeated, tyro.conf.arg(metavar="CLASS,CLASS=NAME")] = ()
    drop: Annotated[Maybe[str], tyro.conf.arg(metavar="CLASS,CLASS")] = None
    rename: Annotated[Repeated, tyro.conf.arg(metavar="CLASS=NAME")] = ()
    save_view: Annotated[Maybe[str], tyro.conf.arg(metavar="NAME")] = None

    @property
    def given(self) -> bool:
        """Whether any of the options is set."""
        return self != ViewOptions()

    def load(self, table: str) -> View:
        """The view that the options describe.

        Args:
            table: the label table, beside which views are kept.

        Raises:
            MaskMillError: ``wrong_use`` for an option of another form; as
                ``pipeline.table.views.read_view`` and ``pipeline.ontology.reading.load_ontology``.
        """
        from pipeline.ontology.reading import load_ontology
        from pipeline.table.views import View, read_view

        view = View() if self.view is None else read_view(self.view, table)
        if self.thresholds is not None:
            entries = load_ontology(self.thresholds).classes
            own = {entry.name: entry.threshold for entry in entries if entry.threshold is not None}
            view = view.with_changes(View(thresholds=own))
        general, by_class = _by_class("--threshold", self.threshold, _share)
        smallest, areas = _by_class("--min-area", self.min_area, _pixels)
        merge: dict[str, tuple[str, ...]] = {}
        for text in self.merge:
            members, target = _pair("--merge", text, "cat,dog=pet")
            merge[target] = (*merge.get(target, ()), *_names("--merge", members))
        return view.with_changes(
            View(
                threshold=general,
                thresholds=by_class,
                min_area=smallest or 0,
                min_areas=areas,
                merge=merge,
                drop=_names("--drop", self.drop or ""),
                rename=dict(_pair("--rename", text, "grass=lawn") for text in self.rename),
            )
        )

    def of_table(self, table: str) -> TableView | None:
        """The view of a table; None if nothing is to change.

        Raises:
            MaskMillError: as ``load``; as ``pipeline.labelling.recipes.table_view``; ``input_missing``.
        """
        from pipeline.labelling.recipes import table_view
        from pipeline.table.record import read_table_record

        if not self.given:
            return None
        record = read_table_record(table)
        bound = table_view(self.load(table), record, table)
        if self.save_view is not None and bound.view.changes_nothing:
            raise WrongUse(
                "wrong_use",
                f"There is nothing to keep as {self.save_view}: no other option says what to change.",
                "Add --threshold, --merge or another of them.",
            )
        return None if bound.view.changes_nothing else bound

    def keep(self, table: str, view: TableView | None) -> list[str]:
        """Do what --save-view asks, once the command is known to be right; returns lines to print.

        Raises:
            MaskMillError: as ``pipeline.table.views.save_view``.
        """
        from pipeline.table.views import save_view

        if self.save_view is None or view is None:
            return []
        place = save_view(view.view, table, self.save_view)
        return [f"View kept in {place}; use it again with --view {self.save_view}."]


def _by_class(
    option: str, given: Sequence[str], value_of: Callable[[str, str], T]
) -> tuple[T | None, dict[str, T]]:
    """The values of ``VALUE`` and ``CLASS=VALUE`` arguments: the general one, and those by class."""
    general: T | None = None
    by_class: dict[str, T] = {}
    for text in given:
        name, equals, value = text.rpartition("=")
        if equals and name.strip():
            by_class[name.strip()] = value_of(f"{option} {text}", value)
        else:
            general = value_of(f"{option} {text}", value)
    return general, by_class


def _share(said: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 1:
        raise WrongUse(
            "wrong_use", f"{said} has no number from 0 to 1.", "Write --threshold 0.4 or --threshold dog=0.6."
        )
    return number


def _pixels(said: str, value: str) -> int:
    if not value.strip().isdecimal():
        raise WrongUse(
            "wrong_use", f"{said} has no number of pixels.", "Write --min-area 64 or --min-area dog=200."
        )
    return int(value)


def _pair(option: str, text: str, example: str) -> tuple[str, str]:
    old, _, new = (part.strip() for part in text.rpartition("="))
    if not old or not new:
        raise WrongUse(
            "wrong_use", f"{option} {text!r} does not say what becomes what.", f"Write {option} {example}."
        )
    return old, new


def _names(option: str, text: str) -> tuple[str, ...]:
    """Names separated by commas; those that hold one are quoted."""
    try:
        cells = [
            cell.strip() for row in csv.reader([text], skipinitialspace=True, strict=True) for cell in row
        ]
    except csv.Error as error:
        raise WrongUse(
            "wrong_use", f"{option} {text!r}: {error}.", 'Quote names that hold a comma: "salt, pepper".'
        ) from None
    return tuple(dict.fromkeys(filter(None, cells)))


def _refuse(given: object, why: str, command: str) -> None:
    if given:
        raise WrongUse("wrong_use", f"{why}.", f"See maskmill {command} --help.")


def refuse_missing_file(weights: str | None) -> None:
    """Refuse a weights file that does not exist. Other faults show only once torch reads the file.

    Raises:
        MaskMillError: ``weights_missing``.
    """
    path = Path(weights or "").expanduser()
    if path.suffix in WEIGHT_SUFFIXES and "://" not in str(weights) and not path.exists():
        raise WrongUse("weights_missing", f"There is no weights file {weights}.", "Check the path.")


def exactly_one(first: str, one: T | None, second: str, other: T | None, *, command: str) -> T:
    """The value of the one option that is set.

    Raises:
        MaskMillError: ``wrong_use`` if both are given, or neither.
    """
    if one is not None and other is None:
        return one
    if other is not None and one is None:
        return other
    both = ", not both" if one is not None else ""
    raise WrongUse("wrong_use", f"Give either {first} or {second}{both}.", f"See maskmill {command} --help.")


def refuse_less_than_one(**options: int | None) -> None:
    """Refuse numbers of things that are given and below 1.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    for name, number in options.items():
        if number is not None and number < 1:
            option = f"--{name.replace('_', '-')}"
            raise WrongUse("wrong_use", f"{option} {number} is less than 1.", "Give a positive number.")


def comma_separated(text: str) -> tuple[str, ...]:
    """The names in ``"cow, motorbike"``, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def named_values(option: str, given: Sequence[str], *, last: bool = True) -> dict[str, str]:
    """``NAME=VALUE`` arguments as a mapping, split at the last ``=`` (names may contain some) or the first.

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
