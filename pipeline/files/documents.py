"""Text, JSON and YAML of users, read with errors that name the file, the line and the remedy."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import yaml
from pydantic import ValidationError

from models.errors import WrongUse
from pipeline.files.storage import Storage

DEEPEST = 100
"""Levels of a YAML file; ours have five."""


def read_document(place: Storage, name: str, *, code: str) -> bytes:
    """The content of a file that a user named.

    Args:
        place: its folder.
        name: its name.
        code: of errors.

    Raises:
        FileNotFoundError: there is none.
        MaskMillError: ``code`` if it is a folder, a device or otherwise unreadable; ``storage_*``.
    """
    refuse_no_file(place, name, code=code)
    try:
        return place.read_bytes(name)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise WrongUse(
            code, f"{place.uri_of(name)} cannot be read: {reason}.", "Check the path and its permissions."
        ) from error


def refuse_no_file(place: Storage, name: str, *, code: str) -> None:
    """Refuse a folder, a pipe or a device, before it is opened.

    Raises:
        MaskMillError: ``code``.
    """
    path = place.path(name)
    if place.is_local and os.path.exists(path) and not os.path.isfile(path):
        # A pipe would be waited for, and some devices never end.
        what = "a folder" if os.path.isdir(path) else "a pipe or a device"
        raise WrongUse(code, f"{place.uri_of(name)} is {what}, not a file.", "Name a file.")


def decoded(data: bytes, where: str, *, code: str) -> str:
    """The text of a file in UTF-8, without a byte order mark.

    Args:
        data: the file.
        where: the file, for errors.
        code: of errors.

    Raises:
        MaskMillError: ``code``, naming the line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise WrongUse(
            code, f"{where}:{line}: not UTF-8 text.", "Save the file as UTF-8 (iconv -t utf-8)."
        ) from None


def parsed_json(data: bytes, where: str, *, code: str) -> Any:
    """The value of a JSON file in UTF-8; see ``decoded``."""
    text = decoded(data, where, code=code)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{where}:{error.lineno}: not valid JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        reason = f"{where}: {_too_much(error)}"
    raise WrongUse(code, f"{reason}.", "Correct the file, or get it again.")


def parsed_yaml(data: bytes, where: str, *, code: str) -> Any:
    """The value of a YAML file in UTF-8; see ``decoded``.

    Aliases are refused, as they can expand without bound.
    """
    text = decoded(data, where, code=code)
    try:
        for event in _yaml_events(text):
            if isinstance(event, yaml.AliasEvent):
                mark = event.start_mark
                line = "" if mark is None else f":{mark.line + 1}"
                raise WrongUse(
                    code, f"{where}{line}: YAML aliases are not supported here.", "Write the value out."
                )
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = "" if mark is None else f":{mark.line + 1}"
        reason = f"{where}{line}: not valid YAML: {error.problem}"
    except yaml.YAMLError as error:
        reason = f"{where}: not valid YAML: {' '.join(str(error).split())}"
    except (ValueError, RecursionError) as error:
        reason = f"{where}: {_too_much(error)}"
    raise WrongUse(code, f"{reason}.", "Correct the file.")


def yaml_lines(data: bytes) -> dict[tuple[str | int, ...], int]:
    """The line (from 1) of every key and item of a YAML file, by place, such as ``("models", 0, "kind")``.

    Args:
        data: a file that ``parsed_yaml`` has read.
    """
    found: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node | None, place: tuple[str | int, ...]) -> None:
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                inner = (*place, index)
                found[inner] = item.start_mark.line + 1
                walk(item, inner)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                inner = (*place, str(key.value))
                found[inner] = key.start_mark.line + 1
                walk(value, inner)

    text = data.decode("utf-8-sig")
    walk(yaml.compose(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), ())
    return found


def check_yaml_depth(text: bytes | str) -> None:
    """Refuse YAML of more than ``DEEPEST`` levels; PyYAML's fast loader ends the process at some thousands.

    Raises:
        RecursionError: it is nested deeper.
        YAMLError: it is no YAML.
    """
    for _ in _yaml_events(text):
        pass


def _yaml_events(text: bytes | str) -> Iterator[yaml.Event]:
    depth = 0
    for event in yaml.parse(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise RecursionError(f"more than {DEEPEST} levels")
        yield event


def json_kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds = {dict: "an object", list: "a list", str: "a text", type(None): "null"}
    return kinds.get(type(value), "a number or a truth value")


def first_problem(error: ValidationError) -> str:
    """The first problem that pydantic found, with its place: ``size.0: Input should be …``."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    return f"{place}: {first['msg']}" if place else str(first["msg"])


def _too_much(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else f"cannot be read: {error}"
