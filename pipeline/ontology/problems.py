"""What is wrong with an ontology, in words, with file and line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError
from pydantic_core import PydanticCustomError

from models.errors import WrongUse

Location = tuple[int | str, ...]

_REMEDY = (
    "Correct the ontology; docs and examples: pipeline/ontology/ontology.py and pipeline/ontology/builtin/."
)
_MAX_SHOWN = 5

# What was expected, by pydantic's type of error.
_WORD = "a word"
_EXPECTED: Final = {
    "string_type": _WORD,
    "model_type": _WORD,
    "model_attributes_type": _WORD,
    "dict_type": _WORD,
    "tuple_type": "a list",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
}


def located(where: Location, text: str) -> PydanticCustomError:
    """An error for pydantic to raise, of a place other than the one that is validated."""
    return PydanticCustomError("ontology", "{text}", {"text": text, "where": where})


def invalid(origin: str, line: int | None, text: str) -> WrongUse:
    """An error of a document, with file and line."""
    place = f"{origin}:{line}" if line is not None else origin
    return WrongUse("ontology_invalid", f"{place}: {text}", _REMEDY)


def told(
    error: ValidationError,
    *,
    origin: str,
    lines: Mapping[Location, int],
    known_keys: Callable[[Location], Iterable[str]],
) -> WrongUse:
    """What pydantic found, in words.

    Args:
        error: its error.
        origin: name of the source.
        lines: the line of every key and item, as far as they are known.
        known_keys: the keys that the mapping around a location may have.
    """
    problems = [_describe(problem, origin, lines, known_keys) for problem in error.errors(include_url=False)]
    shown = list(dict.fromkeys(problems))
    if len(shown) > _MAX_SHOWN:
        shown = [*shown[:_MAX_SHOWN], f"… and {len(shown) - _MAX_SHOWN} more"]
    return WrongUse("ontology_invalid", "\n".join(shown), _REMEDY)


def _describe(
    problem: Any,
    origin: str,
    lines: Mapping[Location, int],
    known_keys: Callable[[Location], Iterable[str]],
) -> str:
    where: Location = problem.get("ctx", {}).get("where") or problem["loc"]
    line = next((lines[place] for place in _outwards(where) if place in lines), None)
    if problem["type"] == "extra_forbidden":
        known = tuple(known_keys(where))
        close = difflib.get_close_matches(str(where[-1]), known, n=1)
        text = f"unknown key '{where[-1]}'" + (f"; did you mean '{close[0]}'?" if close else "")
        text += f" (known: {', '.join(known)})"
    elif problem["type"] == "missing":
        text = f"the key '{where[-1]}' is missing"
    elif problem["type"] in _EXPECTED:
        text = f"{_dotted(where)}: {_not_expected(problem['input'], _EXPECTED[problem['type']])}"
    elif problem["msg"].startswith("Input should be "):
        wanted = problem["msg"].removeprefix("Input should be ")
        text = f"{_dotted(where)}: {_shown(problem['input'])} is not {wanted}"
    elif problem["type"] == "string_pattern_mismatch":
        text = f"{_dotted(where)}: '{problem['input']}' is not a colour of the form \"#rrggbb\""
    else:
        text = f"{_dotted(where)}: {problem['msg']}" if where else problem["msg"]
    return f"{origin}:{line}: {text}" if line is not None else f"{origin}: {text}"


def _not_expected(given: Any, expected: str) -> str:
    """Why a value is not what an ontology has in this place."""
    if given is None:
        return f"there is nothing here, where {expected} is expected (YAML reads null and ~ as nothing)"
    if expected == _WORD and not isinstance(given, str | list | tuple | dict):
        read = str(given).lower() if isinstance(given, bool) else given
        return f"YAML reads this as {read}, not as a word; put it in quotes"
    if expected == "a list" and isinstance(given, str):
        return f"{_shown(given)} is a word, where a list is expected; write [{given}]"
    return f"{_shown(given)} is not {expected}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _outwards(where: Location) -> Iterable[Location]:
    return (where[:end] for end in range(len(where), -1, -1))


def _dotted(where: Location) -> str:
    return ".".join(map(str, where))
