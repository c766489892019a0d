"""An ontology from a YAML file, a built-in name or a list on the command line."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from models.errors import WrongUse, did_you_mean
from pipeline.files.documents import check_yaml_depth
from pipeline.ontology.ontology import BUILTIN, DEFAULT_BACKGROUND, Ontology, validate
from pipeline.ontology.problems import Location, invalid

#: Commas of other scripts, which separate names as well.
_COMMAS: Final = str.maketrans(dict.fromkeys("\uff0c\u3001\uff64\u060c", ","))
#: Characters that may be meant to separate names, or belong to one.
_DOUBTFUL: Final = ";\uff1b|"


@cache
def builtin_ontologies() -> tuple[str, ...]:
    """Names of the built-in ontologies."""
    return tuple(sorted(path.stem for path in BUILTIN.glob("*.yaml") if path.stem != "background"))


def parse_classes(
    text: str,
    *,
    background: Sequence[str] | Literal["default"] | None = DEFAULT_BACKGROUND,
    name: str = "classes",
    templates: str | Sequence[str] = "openai85",
) -> Ontology:
    """Parse an ontology from a list on the command line.

    Args:
        text: class names separated by commas, also those of other scripts; quote a name that contains one:
            ``cat, "salt, pepper"``. A byte order mark in front and commas at the ends are ignored.
        background: see ``Ontology``.
        name: name of the ontology.
        templates: name of a template set, or templates.

    Raises:
        MaskMillError: ``ontology_invalid`` for empty or repeated names, unbalanced quotes, and ``;`` or ``|``
            outside quotes.

    >>> parse_classes("cat, dog", background=None).names
    ('cat', 'dog')
    """
    origin = f"class list {text!r}"
    try:
        rows = csv.reader(_with_commas(text, origin).splitlines(), skipinitialspace=True, strict=True)
        names = [cell for row in rows for cell in row]
    except csv.Error as error:
        message = f"{origin}: unbalanced quotes ({error})"
        remedy = 'Quote names that contain a comma: "salt, pepper".'
        raise WrongUse("ontology_invalid", message, remedy) from None
    if not any(cell.strip() for cell in names):
        remedy = 'Give at least one, for example "cat, dog, grass".'
        raise WrongUse("ontology_invalid", f"{origin}: it has no classes", remedy)
    while not names[0].strip():
        del names[0]
    while not names[-1].strip():
        del names[-1]
    data = {"name": name, "classes": names, "background": background, "templates": templates}
    return validate(data, origin=origin, lines={})


def _with_commas(text: str, origin: str) -> str:
    """The text with plain commas outside quotes, and without a byte order mark."""
    pieces = text.removeprefix("\ufeff").split('"')
    for number in range(0, len(pieces), 2):
        for mark in _DOUBTFUL:
            if mark in pieces[number]:
                raise WrongUse(
                    "ontology_invalid",
                    f"{origin}: does {mark} separate two names, or does it belong to one?",
                    f'Separate names by commas: "cat, dog". Quote a name that holds {mark}.',
                )
        pieces[number] = pieces[number].translate(_COMMAS)
    return '"'.join(pieces)


def load_ontology(source: str | Path) -> Ontology:
    """Load a built-in ontology or a YAML file.

    Args:
        source: a name from ``builtin_ontologies()`` or the path of a YAML file.

    Raises:
        MaskMillError: ``ontology_invalid``, naming file and line if the file is invalid.
    """
    builtin = str(source) in builtin_ontologies()
    path = BUILTIN / f"{source}.yaml" if builtin else Path(source).expanduser()
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise WrongUse(
            "ontology_invalid",
            f"no ontology file or built-in set '{source}'",
            f"{did_you_mean(str(source), builtin_ontologies())}"
            f"Name a YAML file or one of: {', '.join(builtin_ontologies())}.",
        )
    try:
        text = path.read_bytes()
    except OSError as error:
        raise invalid(str(path), None, f"cannot be read: {error.strerror}") from error
    return read_ontology_text(text, origin=str(path), default_name=path.stem, folder=path.resolve().parent)


def read_ontology_text(
    text: bytes | str, *, origin: str, default_name: str, folder: Path | None = None
) -> Ontology:
    """Parse an ontology from YAML text.

    Args:
        text: the document.
        origin: file name for errors.
        default_name: name of the ontology if the document has none.
        folder: folder for relative paths of examples, which are then read and hashed; None leaves them as
            they are.

    Raises:
        MaskMillError: ``ontology_invalid``, naming origin and line.
    """
    data, lines = _parse_yaml(text, origin)
    if not isinstance(data, dict):
        raise invalid(origin, 1, "the file must be a mapping with the key 'classes'")
    data.setdefault("name", default_name)
    return validate(data, origin=origin, lines=lines, folder=folder)


def _parse_yaml(text: bytes | str, origin: str) -> tuple[Any, dict[Location, int]]:
    """Parse YAML into plain values, and the line (from 1) of every key and item by location."""
    try:
        check_yaml_depth(text)
    except RecursionError:
        raise invalid(origin, None, "nested too deeply for an ontology") from None
    except (yaml.YAMLError, ValueError):
        pass  # told below, with the line
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        node = loader.get_single_node()
        if node is None:
            raise invalid(origin, 1, "the file is empty")
        lines = dict(_lines_of(node, (), origin, set()))
        return loader.construct_document(node), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise invalid(origin, mark.line + 1 if mark else None, f"not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise invalid(origin, None, f"not valid YAML: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def _lines_of(
    node: yaml.Node, where: Location, origin: str, seen: set[int]
) -> Iterator[tuple[Location, int]]:
    line = node.start_mark.line + 1
    if id(node) in seen:
        # Refuse aliases, as nested ones can expand without bound.
        raise invalid(origin, line, "YAML anchors and aliases are not supported here")
    seen.add(id(node))
    yield where, line
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _lines_of(item, (*where, index), origin, seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, value in node.value:
            key_line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode) or not key.tag.endswith(":str"):
                raise invalid(origin, key_line, "keys must be plain words")
            if key.value in keys:
                raise invalid(origin, key_line, f"key '{key.value}' appears twice")
            keys.add(key.value)
            if key.value == "color" and isinstance(value, yaml.ScalarNode) and value.value == "":
                text = 'color is empty; quote it ("#aabbcc"), since # begins a comment in YAML'
                raise invalid(origin, key_line, text)
            for place, place_line in _lines_of(value, (*where, key.value), origin, seen):
                yield place, key_line if place == (*where, key.value) else place_line
