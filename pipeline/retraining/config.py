"""The configuration of a retraining: one YAML file, checked whole before anything is imported or made.

Relative paths in it are relative to its folder, so that it means the same to a scheduler as to you.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from models.errors import MaskMillError, WrongUse, did_you_mean
from models.settings import as_written
from pipeline.datasets.base import Dataset
from pipeline.datasets.pairs import open_pairs
from pipeline.datasets.registry import DATASETS, open_dataset
from pipeline.files.documents import parsed_yaml, read_document, yaml_lines
from pipeline.files.recipes import Recipe
from pipeline.files.redaction import redact
from pipeline.files.storage import is_remote, open_storage, placed_beside, refuse_secrets
from pipeline.labelling.recipes import LABEL_RECIPES, LabelRecipe, templates_for
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import builtin_ontologies, load_ontology, parse_classes
from pipeline.retraining.gate import GatePolicy
from pipeline.retraining.webhook import webhook_url
from pipeline.tracking.destination import DEFAULT_URI, URI_VARIABLE, resolve_uri
from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES, ClipSegRecipe
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES, MaskClipPlusRecipe

CODE = "setting_invalid"
EXAMPLE_FILE = "retrain.yaml"
Kind = Literal["maskclip-plus", "clipseg"]
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][\w.-]{0,99}$")]
_WIDTH = 110
_REMEDY = f"Correct the file; maskmill retrain --init shows every field (default: ./{EXAMPLE_FILE})."


class _Part(BaseModel):
    # A field's docstring is its comment in the example.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, populate_by_name=True
    )


def _other(example: Any) -> Any:
    """Marks a field that stands instead of another one: it is a comment in the example."""
    return Field(default=None, examples=[example], json_schema_extra={"instead": True})


class Labelling(_Part):
    """Who labels the images that are trained on."""

    by: Literal["teacher", "champion"] = "teacher"
    """teacher: the recipe below labels every image once, in one table that grows. champion: the model that
    was promoted last labels all images anew (the recipe, while there is none); needs truth in evaluation."""
    recipe: str = Field(default="maskclip", examples=["maskclip"])
    """The teacher: a recipe (maskmill recipes lists them) or a YAML file."""
    settings: dict[str, Any] = Field(default={}, alias="set", examples=[{"head": "value"}])
    """Changes to the recipe, as --set of maskmill label."""
    max_failure_rate: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Stop if a larger share of the new images cannot be labelled."""


class Model(_Part):
    """A model to train anew in every tick."""

    kind: Kind = Field(examples=["maskclip-plus"])
    """maskclip-plus: a student with fixed classes, small and fast. clipseg: one that takes words and
    examples."""
    name: Name | None = Field(default=None, examples=["student"])
    """Name of its folder in each tick; default: student, or clipseg."""
    registered: Name | None = Field(default=None, examples=["pets"])
    """Name in MLflow's registry; default: the name of the retraining, with that of the model if there are
    several."""
    recipe: str | None = Field(default=None, examples=["maskclip-plus-voc20"])
    """How to train: a recipe (maskmill recipes lists them) or a YAML file."""
    settings: dict[str, Any] = Field(default={}, alias="set", examples=[{"iterations": 4000}])
    """Changes to the recipe, as --set of maskmill train."""

    @property
    def folder(self) -> str:
        """Name of its folder."""
        return self.name or {"maskclip-plus": "student", "clipseg": "clipseg"}[self.kind]


class Evaluation(_Part):
    """The images that candidate and champion are compared on. They are never trained on."""

    images: str | None = Field(default=None, examples=["truth/images/"])
    """Folder of images with true masks."""
    truth: str | None = Field(default=None, examples=["truth/masks/"])
    """Folder of their masks (PNG; values are class ids, 255 is ignored)."""
    ontology: str | None = _other("truth/classes.yaml")
    """What the values of the masks mean, if not the classes above: a YAML file or a built-in name."""
    dataset: str | None = _other("voc20")
    """A benchmark instead of images and truth; maskmill datasets lists them."""
    root: str | None = _other("VOC2012/")
    """Folder of the benchmark."""
    split: str | None = _other("val")
    """Part of the benchmark."""
    hold_out: Annotated[float, Field(gt=0, lt=1)] | None = _other(0.1)
    """Without any truth: hold this share of the images out, and measure by agreement with the teacher."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = {
            "images and truth": self.images or self.truth,
            "dataset": self.dataset,
            "hold_out": self.hold_out,
        }
        given = [name for name, value in ways.items() if value is not None]
        if len(given) != 1:
            raise _problem(f"give one of images with truth, dataset, or hold_out, not {len(given) or 'none'}")
        if (self.images is None) != (self.truth is None):
            raise _problem("images and truth belong together")
        if self.dataset is None and (self.root is not None or self.split is not None):
            raise _problem("root and split belong to dataset")
        if self.dataset is not None and self.dataset not in DATASETS:
            raise _problem(
                f"there is no dataset {self.dataset}. {did_you_mean(self.dataset, DATASETS)}".rstrip()
            )
        if self.dataset == "phrasecut":
            raise _problem("PhraseCut asks for phrases, not for classes")
        return self

    @property
    def has_truth(self) -> bool:
        """Whether true masks are known."""
        return self.hold_out is None


class Budget(_Part):
    """What one run may cost."""

    images: Annotated[int, Field(ge=1)] | None = Field(default=None, examples=[100000])
    """Label at most so many images in a tick; further new ones wait for the next."""
    hours: Annotated[float, Field(gt=0)] | None = Field(default=None, examples=[12])
    """Stop after so many hours; the next run resumes where this one stopped."""


class When(_Part):
    """When a tick begins. Without new images it never does."""

    min_new: Annotated[int, Field(ge=1)] = Field(default=1, examples=[500])
    """Wait for so many new images."""
    max_age: Annotated[float, Field(gt=0)] | None = Field(default=None, examples=[30])
    """Begin with fewer, if the last tick is so many days ago."""
    budget: Budget = Budget()
    """Bounds of one tick."""


class Retraining(_Part):
    """What ``retrain.yaml`` says."""

    name: Name = Field(examples=["pets"])
    """Name of the retraining, and of its model in MLflow's registry."""
    output: str = Field(examples=["retraining/"])
    """Folder (or s3://… prefix) for tables, models, verdicts and the ledger. One retraining each."""
    images: str = Field(examples=["photos/"])
    """Where images arrive: folder, glob, list or s3://… prefix, as --images of maskmill label."""
    classes: str | list[str] | None = Field(default=None, examples=["cat, dog, grass"])
    """Class names; everything else becomes "background"."""
    ontology: str | None = _other("classes.yaml")
    """Classes in a YAML file, or a built-in name, instead of classes."""
    tracking: str | None = Field(default=None, examples=["https://mlflow.example.org"])
    """MLflow tracking URI; null: MLFLOW_TRACKING_URI, else SQLite in mlruns.db beside this file."""
    label: Labelling = Labelling()
    """Who labels the images that are trained on."""
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    """What is trained anew in every tick, each with a champion of its own."""
    evaluation: Evaluation
    """What candidate and champion are compared on. None of these images is trained on, under any name."""
    gate: GatePolicy = GatePolicy()
    """What a candidate must show to take the champion's place. Shares and IoUs are in [0, 1]."""
    when: When = When()
    """When a tick begins, and what it may cost."""
    webhook_env: str | None = Field(default=None, examples=[None])
    """Environment variable with the address that is told of promotions, refusals and failures."""
    address: str | None = Field(default=None, examples=[None])
    """Address of a Ray cluster; null: RAY_ADDRESS, else this machine alone."""
    workers: Annotated[int, Field(ge=0)] | None = Field(default=None, examples=[None])
    """Training processes; null: one per GPU, or this process alone."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if (self.classes is None) == (self.ontology is None):
            raise _problem("give either classes or ontology")
        if self.label.by == "champion" and not self.evaluation.has_truth:
            raise _problem(
                "label.by champion needs evaluation with truth: agreement with its own labels says nothing "
                "about a champion"
            )
        for what, names in (
            ("models of one name", [model.folder for model in self.models]),
            ("models registered as one", [self.registered(model) for model in self.models]),
        ):
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise _problem(f"two {what}: {twice}")
        if self.webhook_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.webhook_env):
            raise _problem(
                "webhook_env is the name of an environment variable that holds the address, which is a secret"
            )
        return self

    def registered(self, model: Model) -> str:
        """The name of a model in the registry."""
        return model.registered or (self.name if len(self.models) == 1 else f"{self.name}-{model.folder}")

    def fixed(self) -> dict[str, str]:
        """What must stay the same as long as the output is used, by name; tables know their recipes."""
        return {
            "name": self.name,
            "label.by": self.label.by,
            **{f"models.{model.folder}.kind": model.kind for model in self.models},
            **{f"models.{model.folder}.registered": self.registered(model) for model in self.models},
        }


def _problem(text: str) -> PydanticCustomError:
    return PydanticCustomError("retraining", "{text}", {"text": text})


# --- reading ------------------------------------------------------------------------------------------------


def read_config(path: str | os.PathLike[str]) -> Retraining:
    """Read and check a configuration, with its recipes, classes and addresses.

    Raises:
        MaskMillError: ``setting_invalid``, naming file, line, field and remedy;
            ``ontology_invalid``, ``wrong_use``.
    """
    file = Path(path).expanduser()
    place = open_storage(file.parent)
    try:
        data = read_document(place, file.name, code=CODE)
    except FileNotFoundError:
        raise WrongUse(
            CODE,
            f"There is no configuration {file}.",
            f"Write one with maskmill retrain --init {file}, and fill it in.",
        ) from None
    config = parse_config(data, str(file), folder=file.resolve().parent)
    check_config(config, str(file))
    return config


def parse_config(data: bytes, where: str, *, folder: Path) -> Retraining:
    """A configuration from its text.

    Args:
        data: YAML in UTF-8.
        where: the file, for errors.
        folder: of the file, which its relative paths begin from.

    Raises:
        MaskMillError: ``setting_invalid``, ``wrong_use``.
    """
    written = parsed_yaml(data, where, code=CODE)
    if not isinstance(written, dict):
        raise WrongUse(CODE, f"{where} holds no fields.", _REMEDY)
    lines = yaml_lines(data)
    try:
        return Retraining.model_validate(_located(written, folder))
    except ValidationError as error:
        problems = [_described(problem, where, lines) for problem in error.errors(include_url=False)]
        shown = list(dict.fromkeys(problems))
        more = [f"… and {len(shown) - 8} more"] if len(shown) > 8 else []
        raise WrongUse(CODE, "\n".join([*shown[:8], *more]), _REMEDY) from None
    except MaskMillError as error:
        if error.code != "setting_invalid":  # of the gate's settings, which tell their own errors
            raise
        name = error.message.partition(" = ")[0]
        line = lines.get(("gate", *name.split(".")), lines.get(("gate",)))
        hint = did_you_mean(name, GatePolicy.model_fields) if name not in GatePolicy.model_fields else ""
        raise WrongUse(
            CODE, f"{_place(where, line)}: gate.{error.message} {hint}".rstrip(), _REMEDY
        ) from None


@dataclass(frozen=True)
class Named:
    """The places that a configuration names, as they are written.

    Attributes:
        data: (field, place) of images, truth, output and so on.
        files: YAML files of recipes and classes.
        tracking: MLflow's URI; None if it is left to the environment.
    """

    data: tuple[tuple[str, str], ...]
    files: tuple[str, ...]
    tracking: str | None


def named_places(data: bytes, where: str, *, folder: Path) -> Named:
    """What a configuration names; arguments and errors as of ``parse_config``, which checks it."""
    parse_config(data, where, folder=folder)
    written = parsed_yaml(data, where, code=CODE)
    evaluation, label = written["evaluation"], written.get("label") or {}
    places = [("output", written["output"]), ("images", written["images"])]
    places += [(name, evaluation.get(name)) for name in ("images", "truth", "root")]
    files = [label.get("recipe"), *(one.get("recipe") for one in written["models"])]
    files += [part.get("ontology") for part in (written, evaluation)]
    return Named(
        tuple((name, place) for name, place in places if place),
        tuple(file for file in files if file and file.endswith((".yaml", ".yml"))),
        written.get("tracking"),
    )


def check_config(config: Retraining, where: str) -> None:
    """Load what a configuration names, so that a wrong name is told now.

    Raises:
        MaskMillError: ``setting_invalid``, ``ontology_invalid``, ``wrong_use``.
    """
    with _within(where):
        label_recipe(config)
        load_classes(config)
        for model in config.models:
            training_recipe(model)
        if config.evaluation.ontology is not None:
            load_ontology(config.evaluation.ontology)
        webhook_url(config.webhook_env)
        tracking_uri(config)


@contextmanager
def _within(where: str) -> Iterator[None]:
    """Names the file in errors about what it names."""
    try:
        yield
    except MaskMillError as error:
        raise type(error)(error.code, f"{where}: {error.message}", error.remedy) from error


def _located(written: Mapping[Any, Any], folder: Path) -> dict[Any, Any]:
    """A copy whose relative paths begin from a folder; what is no text is told by the model."""
    found = dict(written)
    _locate(found, folder, "output", "images")
    _locate(found, folder, "ontology", known=builtin_ontologies())
    for name in ("label", "evaluation"):
        if isinstance(found.get(name), dict):
            found[name] = dict(found[name])
    if isinstance(found.get("label"), dict):
        _locate(found["label"], folder, "recipe", known=LABEL_RECIPES.recipes)
    if isinstance(found.get("evaluation"), dict):
        _locate(found["evaluation"], folder, "images", "truth", "root")
        _locate(found["evaluation"], folder, "ontology", known=builtin_ontologies())
    if isinstance(found.get("models"), list):
        found["models"] = [dict(one) if isinstance(one, dict) else one for one in found["models"]]
        for one in found["models"]:
            if isinstance(one, dict):
                _locate(
                    one, folder, "recipe", known=(*MASKCLIP_PLUS_RECIPES.recipes, *CLIPSEG_RECIPES.recipes)
                )
    tracking = found.get("tracking")
    if isinstance(tracking, str):
        if redact(tracking) != tracking:
            raise WrongUse(
                "wrong_use",
                f"tracking holds a user name, a password or a token: {redact(tracking)}",
                "Leave it out: MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
                "MLFLOW_TRACKING_TOKEN.",
            )
        found["tracking"] = _beside(tracking, folder)
    elif tracking is None and not os.environ.get(URI_VARIABLE):
        found["tracking"] = _beside(DEFAULT_URI, folder)
    return found


def _locate(part: dict[Any, Any], folder: Path, *names: str, known: Container[str] | None = None) -> None:
    """Make paths of a part of the configuration absolute.

    Args:
        part: is changed.
        folder: where relative paths begin.
        names: of the fields.
        known: names that are no paths; everything else that may stand there is the path of a YAML file.
    """
    for name in names:
        text = part.get(name)
        if not isinstance(text, str) or not text:
            continue
        if known is not None and (text in known or not text.endswith((".yaml", ".yml"))):
            continue
        part[name] = placed_beside(folder, text)
        if is_remote(part[name]):
            refuse_secrets(part[name])


def _beside(tracking: str, folder: Path) -> str:
    """A tracking URI whose SQLite file, if its path is relative, lies in a folder."""
    scheme, _, rest = tracking.partition(":///")
    if scheme.partition("+")[0] == "sqlite" and rest and not rest.startswith("/"):
        return f"{scheme}:///{os.path.join(folder, rest)}"
    return tracking


def _described(problem: Any, where: str, lines: Mapping[tuple[Any, ...], int]) -> str:
    loc = tuple(part for part in problem["loc"] if part not in ("str", "list[str]"))
    line = next((lines[loc[:end]] for end in range(len(loc), -1, -1) if loc[:end] in lines), None)
    place = ".".join(map(str, loc))
    text = problem["msg"]
    if problem["type"] == "extra_forbidden":
        known = [model_field.alias or name for name, model_field in _fields_at(loc[:-1]).items()]
        text = f"there is no such field. {did_you_mean(str(loc[-1]), known)}Fields: {', '.join(known)}"
    elif problem["type"] == "missing":
        text = "is missing"
    elif problem["type"] == "string_pattern_mismatch":
        text = "must be letters, digits, '.', '_' and '-', at most 100"
    return f"{_place(where, line)}: {f'{place}: ' if place else ''}{text}."


def _fields_at(loc: tuple[Any, ...]) -> dict[str, Any]:
    kind: type[BaseModel] = Retraining
    for part in loc:
        if isinstance(part, str):
            kind = _model_of(kind.model_fields[part].annotation) or kind
    return dict(kind.model_fields)


def _place(where: str, line: int | None) -> str:
    return where if line is None else f"{where}:{line}"


# --- what it names ------------------------------------------------------------------------------------------


def as_settings(changes: Mapping[str, Any]) -> list[str]:
    """``set`` as the arguments of ``--set``; JSON is YAML."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in changes.items()]


def label_recipe(config: Retraining) -> LabelRecipe:
    """The recipe of the teacher."""
    return LABEL_RECIPES.load(config.label.recipe, as_settings(config.label.settings))


def training_recipe(model: Model) -> MaskClipPlusRecipe | ClipSegRecipe:
    """The recipe that a model is trained by."""
    recipe: Recipe
    if model.kind == "maskclip-plus":
        recipe = MASKCLIP_PLUS_RECIPES.load(
            model.recipe or "maskclip-plus-voc20", as_settings(model.settings)
        )
        if recipe.form != "annotation-free":
            raise WrongUse(
                "setting_invalid",
                f"Recipe {recipe.name} ({recipe.form}) trains with truth, and a retraining has labels only.",
                "Take an annotation-free recipe, such as maskclip-plus-voc20.",
            )
        return recipe
    return CLIPSEG_RECIPES.load(model.recipe or "clipseg-phrasecut-plus", as_settings(model.settings))


def load_classes(config: Retraining) -> Ontology:
    """The classes that are labelled."""
    if config.ontology is not None:
        return load_ontology(config.ontology)
    given = config.classes
    text = given if isinstance(given, str) else ", ".join(f'"{name}"' for name in given or ())
    return parse_classes(text, templates=templates_for(label_recipe(config), None))


def open_evaluation(config: Retraining) -> Dataset | None:
    """The images with truth; None if some of the images are held out instead.

    Raises:
        MaskMillError: as ``pipeline.datasets.registry.open_dataset``.
    """
    asked = config.evaluation
    if not asked.has_truth:
        return None
    classes = load_classes(config) if asked.ontology is None else load_ontology(asked.ontology)
    if asked.dataset is None:
        assert asked.images is not None and asked.truth is not None
        return open_pairs(images=asked.images, masks=asked.truth, ontology=classes)
    options = {"ontology": classes} if DATASETS[asked.dataset].needs_ontology else {}
    opened = open_dataset(asked.dataset, root=asked.root, split=asked.split, **options)
    assert isinstance(opened, Dataset), "only PhraseCut is no Dataset"
    return opened


def tracking_uri(config: Retraining) -> str:
    """Where MLflow's registry is.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    asked = config.tracking or os.environ.get(URI_VARIABLE)
    if asked == "off":
        raise WrongUse(
            "wrong_use",
            "A retraining cannot do without tracking: MLflow's registry says which model is champion.",
            "Give tracking a URI of MLflow, such as sqlite:///mlruns.db.",
        )
    return resolve_uri(asked)


# --- the example --------------------------------------------------------------------------------------------


def example() -> str:
    """A documented configuration with every field, as ``maskmill retrain --init`` writes it."""
    head = [
        "# What `maskmill retrain` does, and when. Relative paths begin from this file's folder.",
        "# Run it by a scheduler: exit status 0 promoted or nothing new, 3 refused, 1 failed, 2 wrong use.",
    ]
    return "\n".join([*head, "", *_documented(Retraining, "")]) + "\n"


def write_example(path: str | os.PathLike[str]) -> Path:
    """Write the example.

    Raises:
        MaskMillError: ``output_exists``.
    """
    file = Path(path)
    if not open_storage(file.parent).create_bytes(file.name, example().encode()):
        raise WrongUse("output_exists", f"{file} is there already.", "Name another file.")
    return file


def _documented(kind: type[BaseModel], indent: str) -> Iterator[str]:
    for name, field in kind.model_fields.items():
        description = " ".join((field.description or "").split())
        for line in textwrap.wrap(description, _WIDTH - len(indent) - 2, break_on_hyphens=False):
            yield f"{indent}# {line}"
        key, inner = field.alias or name, _model_of(field.annotation)
        extra = field.json_schema_extra
        comment = "# " if isinstance(extra, dict) and extra.get("instead") else ""
        if inner is None:
            value = field.examples[0] if field.examples else field.default
            yield f"{indent}{comment}{key}: {_flow(value)}"
        elif "tuple" in str(field.annotation):
            yield f"{indent}{key}:"
            first, *rest = _documented(inner, f"{indent}    ")
            dashed = [first, *rest]
            at = next(index for index, line in enumerate(dashed) if not line.lstrip().startswith("#"))
            dashed[at] = f"{indent}  - {dashed[at].lstrip()}"
            yield from dashed
        else:
            yield f"{indent}{key}:"
            yield from _documented(inner, f"{indent}  ")
        if not indent:
            yield ""


def _flow(value: Any) -> str:
    """A value as YAML on one line."""
    if isinstance(value, str) and (not value or "," in value):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, (dict, list, tuple)):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return as_written(value)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as ``tuple[Model, ...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_of(part)) is not None), None)
