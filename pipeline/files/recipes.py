"""Named sets of typed settings: looked up by name or read from YAML, changed by ``key=value``, validated.

A field of a recipe may be a dataclass of settings itself (``loop``); its fields are then written
``loop.iterations``, or ``iterations`` alone where no other group has that name.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import hashlib
import json
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from models.errors import WrongUse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What all recipes have.

    Attributes:
        name: what the recipe is called; not part of the hash.
    """

    name: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return fields

    @property
    def hash(self) -> str:
        """Sha256 (hex) of every field but the name."""
        fields = self.to_dict()
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


R = TypeVar("R", bound=Recipe)


class RecipeBook(Generic[R]):
    """The recipes of one kind.

    Args:
        kind: the dataclass.
        recipes: those with a name.
        default: name of the recipe that files build on unless they say otherwise.
        check: raises ``recipe_invalid`` for combinations that no single field forbids; is given the recipe
            and words for where it comes from.
    """

    def __init__(
        self,
        kind: type[R],
        recipes: Iterable[R],
        *,
        default: str,
        check: Callable[[R, str], None] = lambda _recipe, _where: None,
    ) -> None:
        self.recipes: Mapping[str, R] = {recipe.name: recipe for recipe in recipes}
        self.default = default
        self._adapter: TypeAdapter[R] = TypeAdapter(kind)
        self._check = check
        self._paths = _paths(kind)

    def load(self, name_or_path: str, settings: Sequence[str] = ()) -> R:
        """A recipe by name or YAML file, with ``key=value`` changes applied in order.

        Args:
            name_or_path: a known name, or a YAML file of fields; ``base`` names the recipe it starts from.
            settings: ``key=value`` strings; the value is read as YAML.

        Raises:
            MaskMillError: ``recipe_invalid`` or ``recipe_invalid``, naming the key and what is allowed.
        """
        return self._validated(
            _merged(self._base_fields(name_or_path), self.parse(settings)), where=name_or_path
        )

    def parse(self, settings: Sequence[str]) -> dict[str, Any]:
        """``key=value`` strings as fields of a recipe; the values are read as YAML.

        Raises:
            MaskMillError: ``recipe_invalid``, naming the key and what is allowed.
        """
        fields: dict[str, Any] = {}
        for setting in settings:
            key, separator, value = setting.partition("=")
            if not separator:
                raise WrongUse(
                    "recipe_invalid",
                    f"--set {setting!r} is not of the form key=value.",
                    f"Write --set {next(iter(self._paths))}=….",
                )
            path = self._path(key.strip(), where=f"--set {setting}")
            try:
                parsed = yaml.safe_load(value)
            except yaml.YAMLError:
                parsed = value
            fields = _merged(fields, _nested(path, parsed))
        return fields

    def change(self, recipe: R, fields: Mapping[str, Any]) -> R:
        """The recipe with other fields, checked as one from a file is.

        Raises:
            MaskMillError: ``recipe_invalid``.
        """
        return self._validated(_merged(recipe.to_dict(), fields), where=recipe.name)

    def from_dict(self, fields: Mapping[str, Any]) -> R:
        """The recipe that ``to_dict`` wrote."""
        return self._validated(dict(fields), where="the recorded recipe")

    def _base_fields(self, name_or_path: str) -> dict[str, Any]:
        if name_or_path in self.recipes:
            return self.recipes[name_or_path].to_dict()
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            near = difflib.get_close_matches(name_or_path, self.recipes, n=1)
            hint = f"Did you mean {near[0]}? " if near else ""
            raise WrongUse(
                "recipe_invalid",
                f"There is no recipe {name_or_path!r}.",
                f"{hint}Known: {', '.join(self.recipes)}; or give a YAML file.",
            )
        try:
            written = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise WrongUse(
                "recipe_invalid",
                f"{path} cannot be read as YAML: {error}",
                "Give a YAML file of recipe fields.",
            ) from error
        if not isinstance(written, dict):
            raise WrongUse(
                "recipe_invalid",
                f"{path} holds no fields.",
                f"Write lines such as `{next(iter(self._paths))}: …`.",
            )
        base = written.pop("base", self.default)
        if base not in self.recipes:
            raise WrongUse(
                "recipe_invalid",
                f"{path}: base {base!r} is not a recipe.",
                f"Known: {', '.join(self.recipes)}.",
            )
        fields = self.recipes[base].to_dict() | {"name": path.stem}
        for key, value in _flat(written):
            fields = _merged(fields, _nested(self._path(key, where=str(path)), value))
        return fields

    def _path(self, key: str, *, where: str) -> str:
        """The full dotted name of a field, given that or its last word."""
        if key in self._paths:
            return key
        meant = [path for path in self._paths if path.rpartition(".")[2] == key]
        if len(meant) == 1:
            return meant[0]
        if meant:
            raise WrongUse(
                "recipe_invalid", f"{where}: {key!r} can be {' or '.join(meant)}.", "Write which one."
            )
        words = {path.rpartition(".")[2]: path for path in self._paths}
        near = difflib.get_close_matches(key.rpartition(".")[2], words, n=1)
        hint = f"Did you mean {words[near[0]]}? " if near else ""
        raise WrongUse(
            "recipe_invalid",
            f"{where}: there is no field {key!r}.",
            f"{hint}Fields: {', '.join(self._paths)}.",
        )

    def _validated(self, fields: dict[str, Any], *, where: str) -> R:
        try:
            recipe = self._adapter.validate_python(fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise WrongUse(
                "recipe_invalid",
                f"{where}: {place} = {first['input']!r}: {first['msg']}.",
                "Correct the value, or leave it out.",
            ) from error
        self._check(recipe, where)
        return recipe


def _paths(kind: type, prefix: str = "") -> tuple[str, ...]:
    """Dotted names of all fields that are no groups."""
    hints = typing.get_type_hints(kind)
    paths: list[str] = []
    for field in dataclasses.fields(kind):
        inner = hints[field.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            paths += _paths(inner, f"{prefix}{field.name}.")
        else:
            paths.append(prefix + field.name)
    return tuple(paths)


def _nested(path: str, value: Any) -> dict[str, Any]:
    head, _, rest = path.partition(".")
    return {head: _nested(rest, value) if rest else value}


def _flat(fields: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(dict(fields))
    for key, value in changes.items():
        inner = merged.get(key)
        if isinstance(value, Mapping) and isinstance(inner, Mapping):
            merged[key] = _merged(inner, value)
        else:
            merged[key] = value
    return merged
