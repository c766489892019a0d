"""Recipes: settings by name or from YAML, changed by ``key=value``, and validated once.

A recipe may hold settings of its parts (``loop``). Their fields are written ``loop.iterations``, or just
``iterations`` if no other part has a field of that name. What is marked with ``Steps`` (phases, warm-up,
intervals) follows ``iterations`` in proportion when that is changed, unless it is set as well.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, TypeVar

import yaml

from models.errors import MaskMillError, WrongUse, did_you_mean
from models.settings import NEUTRAL, Settings, Steps, as_written, knobs, value_at
from pipeline.files.documents import parsed_yaml


class Recipe(Settings):
    """Base class of all recipes."""

    name: Annotated[str, NEUTRAL] = ""
    """Name of the recipe."""

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return self.model_dump(mode="json")

    @property
    def hash(self) -> str:
        """Sha256 (hex) of the fields that change the result."""
        return hashlib.sha256(json.dumps(self.effective(), sort_keys=True).encode()).hexdigest()

    def differences(self, recorded: Recipe) -> list[str]:
        """The result-changing fields that differ from ``recorded``, as ``images.scale: … there, … here``."""
        return changed_fields(recorded.effective(), self.effective())


def changed_fields(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, as ``images.scale: … there, … here``.

    Tables, trainings and benchmarks use it to decide whether they may be resumed.
    """
    return [
        f"{name}: {as_written(recorded.get(name))} there, {as_written(given.get(name))} here"
        for name in sorted(recorded.keys() | given.keys())
        if recorded.get(name) != given.get(name)
    ]


class Described(NamedTuple):
    """A field of a recipe with its description; ``default`` is None if there is none."""

    name: str
    value: Any
    default: Any
    description: str
    changes_result: bool


def describe(recipe: Recipe) -> list[Described]:
    """Describe every field of a recipe except its name."""
    fields = recipe.to_dict()
    defaults = type(recipe)().to_dict()
    return [
        Described(
            knob.name,
            value_at(fields, knob.name),
            value_at(defaults, knob.name),
            knob.description,
            knob.changes_result,
        )
        for knob in knobs(type(recipe))
        if knob.name != "name"
    ]


R = TypeVar("R", bound=Recipe)


class RecipeBook(Generic[R]):
    """The named recipes of one kind.

    Args:
        kind: class of the recipes.
        recipes: the recipes.
        default: name of the recipe that files extend unless they set ``base``.
    """

    def __init__(self, kind: type[R], recipes: Iterable[R], *, default: str) -> None:
        self.recipes: Mapping[str, R] = {recipe.name: recipe for recipe in recipes}
        self.default = default
        self._kind = kind
        self._paths = tuple(knob.name for knob in knobs(kind))
        self._steps = {knob.name: knob.steps for knob in knobs(kind) if knob.steps is not None}

    def load(self, name_or_path: str, settings: Sequence[str] = ()) -> R:
        """Load a recipe by name or from a YAML file, and apply ``key=value`` changes in order.

        Args:
            name_or_path: a known name, or a YAML file of fields; ``base`` names the recipe it extends.
            settings: ``key=value`` strings; the value is read as YAML.

        Raises:
            MaskMillError: ``setting_invalid``, naming the key and the allowed ones.
        """
        fields = self._changed(self._base_fields(name_or_path), self.parse(settings))
        return self._validated(fields, where=name_or_path)

    def parse(self, settings: Sequence[str]) -> dict[str, Any]:
        """Parse ``key=value`` strings into fields by dotted name; values are read as YAML.

        Raises:
            MaskMillError: ``setting_invalid``, naming the key and the allowed ones.
        """
        fields: dict[str, Any] = {}
        for setting in settings:
            key, separator, value = setting.partition("=")
            if not separator:
                raise WrongUse(
                    "setting_invalid",
                    f"--set {setting!r} is not of the form key=value.",
                    f"Write --set {setting}=VALUE.",
                )
            path = self._path(key.strip(), where=f"--set {setting}")
            try:
                fields[path] = yaml.safe_load(value)
            except (yaml.YAMLError, ValueError, RecursionError):  # such as the 13th month
                fields[path] = value
        return fields

    def change(self, recipe: R, fields: Mapping[str, Any]) -> R:
        """A copy of the recipe with some fields changed and validated.

        Args:
            recipe: the recipe to start from.
            fields: by dotted name, by last word, or nested.

        Raises:
            MaskMillError: ``setting_invalid``.
        """
        changes = self._by_path(fields, where=recipe.name)
        return self._validated(self._changed(recipe.to_dict(), changes), where=recipe.name)

    def from_dict(self, fields: Mapping[str, Any]) -> R:
        """The recipe written by ``to_dict``, or by an older MaskMill, which wrote flat fields.

        Raises:
            MaskMillError: ``setting_invalid``.
        """
        where = "the recorded recipe"
        written = {key: value for key, value in fields.items() if key != "hash"}
        return self._validated(_merged({}, self._by_path(written, where=where)), where=where)

    def _base_fields(self, name_or_path: str) -> dict[str, Any]:
        if name_or_path in self.recipes:
            return self.recipes[name_or_path].to_dict()
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            raise WrongUse(
                "setting_invalid",
                f"There is no recipe {name_or_path!r}.",
                f"{did_you_mean(name_or_path, self.recipes)}Known: {', '.join(self.recipes)}; "
                "or give a YAML file.",
            )
        if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long
            raise WrongUse(
                "setting_invalid",
                f"There is no recipe file {path}.",
                f"{did_you_mean(path.stem, self.recipes)}Check the path, or name a recipe: "
                f"{', '.join(self.recipes)}.",
            )
        try:
            data = path.read_bytes()
        except OSError as error:
            raise WrongUse(
                "setting_invalid",
                f"{path} cannot be read: {error.strerror}.",
                "Give a YAML file of recipe fields.",
            ) from error
        written = parsed_yaml(data, str(path), code="setting_invalid")
        if not isinstance(written, dict):
            raise WrongUse(
                "setting_invalid",
                f"{path} holds no fields.",
                f"Write lines such as `{next(iter(self._paths))}: …`.",
            )
        base = written.pop("base", self.default)
        if not isinstance(base, str) or base not in self.recipes:
            raise WrongUse(
                "setting_invalid",
                f"{path}: base {base!r} is not a recipe.",
                f"{did_you_mean(str(base), self.recipes)}Known: {', '.join(self.recipes)}.",
            )
        fields = self.recipes[base].to_dict() | {"name": path.stem}
        return self._changed(fields, self._by_path(written, where=str(path)))

    def _changed(self, fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """All fields with changes by dotted name; what counts steps follows ``iterations``."""
        merged = _merged(fields, changes)
        path = next((path for path in self._paths if path.rpartition(".")[2] == "iterations"), None)
        if path is None:
            return merged
        before, now = value_at(fields, path), value_at(merged, path)
        if not all(isinstance(count, int) and count >= 1 for count in (before, now)):
            return merged  # refused when it is validated
        follow = {}
        for name, steps in self._steps.items():
            if name in changes:
                continue
            value = _scaled(value_at(fields, name), steps, before, now)
            sibling = f"{name.rpartition('.')[0]}.{steps.after}"
            if steps.after and sibling in changes:
                value = _following(value, changes[sibling], now)
            follow[name] = value
        return _merged(merged, follow)

    def _by_path(self, fields: Mapping[Any, Any], *, where: str) -> dict[str, Any]:
        """Nested or flat fields by full dotted name."""
        return {self._path(key, where=where): value for key, value in _flat(fields, self._paths)}

    def _path(self, key: str, *, where: str) -> str:
        """The full dotted name of a field, from that name or its last word."""
        if key in self._paths:
            return key
        meant = [path for path in self._paths if path.rpartition(".")[2] == key]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise WrongUse(
                "setting_invalid", f"{where}: {key!r} can be {' or '.join(meant)}.", "Write which one."
            )
        words = {path.rpartition(".")[2]: path for path in self._paths}
        near = difflib.get_close_matches(key.rpartition(".")[2].lower(), words, n=1)
        hint = f"Did you mean {words[near[0]]}? " if near else ""
        raise WrongUse(
            "setting_invalid",
            f"{where}: there is no field {key!r}.",
            f"{hint}Fields: {', '.join(self._paths)}.",
        )

    def _validated(self, fields: Mapping[str, Any], *, where: str) -> R:
        try:
            return self._kind(**fields)
        except MaskMillError as error:
            raise WrongUse("setting_invalid", f"{where}: {error.message}", error.remedy) from error


def _flat(fields: Mapping[Any, Any], paths: Sequence[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted name; a mapping that is the value of a field stays whole."""
    for key, value in fields.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and path not in paths:
            yield from _flat(value, paths, f"{path}.")
        else:
            yield path, value


NEVER = (-1, -1)
"""The span of steps that is empty."""


def _scaled(value: Any, steps: Steps, before: int, now: int) -> Any:
    """A number of steps, or a span (first, last), of a run of ``before`` steps in one of ``now`` steps."""

    def scale(count: int) -> int:
        return max(1, round(count * now / before)) if count > 0 else count

    if isinstance(value, int):
        return min(value, scale(value)) if steps.interval else scale(value)
    if not _is_span(value):
        return value  # refused when it is validated
    first, last = value
    first, last = (first if first <= 1 else 1 + scale(first - 1)), scale(last)
    return NEVER if first > now else (first, last)


def _following(span: Any, previous: Any, iterations: int) -> Any:
    """A span that begins where the previous one ends; ``NEVER`` if nothing is left for it."""
    if not (_is_span(span) and _is_span(previous)) or tuple(span) == NEVER:
        return span
    end = previous[1]
    return NEVER if end == -1 or end >= iterations else (end + 1, span[1])


def _is_span(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(end, int) for end in value)


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested fields with changes given by dotted name."""
    merged = copy.deepcopy(dict(fields))
    for path, value in changes.items():
        *groups, last = path.split(".")
        place = merged
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return merged
