"""Store a benchmark's figures in its folder as they are measured, so that the same command resumes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.console import Progress, counted
from models.errors import Damaged, WrongUse
from models.files import write_file
from pipeline.evaluation.results import ROWS
from pipeline.files.recipes import changed_fields


def measure_once(
    folder: Path,
    console: Console,
    name: str,
    identity: Mapping[str, Any],
    unit: str,
    run: Callable[[Progress], dict[str, Any]],
) -> dict[str, Any]:
    """Call ``run``, or return its stored result if an earlier run left one in the same folder.

    Args:
        folder: result folder.
        console: for progress.
        name: name of the measurement, unique in the folder.
        identity: everything that the result depends on, by name, as JSON.
        unit: unit of progress, in the plural.
        run: does the work; its values are JSON or NaN.

    Raises:
        WrongUse: ``output_differs`` if the stored result has another identity.
    """
    found = measure_parts_once(
        folder, console, name, [""], identity, unit, lambda progress, _absent: {"": run(progress)}
    )
    return found[""]


def measure_parts_once(
    folder: Path,
    console: Console,
    name: str,
    parts: Sequence[str],
    identity: Mapping[str, Any],
    unit: str,
    run: Callable[[Progress, Sequence[str]], Mapping[str, dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """``measure_once`` for parts that are measured together but stored separately.

    Args:
        folder: result folder.
        console: for progress.
        name: name of the whole measurement, unique in the folder.
        parts: parts to return; a later run may request others.
        identity: everything that every part depends on, by name, as JSON.
        unit: unit of progress, in the plural.
        run: measures the parts that are not stored yet.

    Returns:
        The values from ``run``, by part.

    Raises:
        WrongUse: ``output_differs`` if a stored part has another identity.
        Damaged: ``file_damaged`` if a stored part cannot be read.
    """
    files = {part: folder / ROWS / f"{slug(f'{name} {part}')}.json" for part in parts}
    found = {part: _earlier(file, identity) for part, file in files.items() if file.exists()}
    absent = [part for part in parts if part not in found]
    if absent:
        with shown_progress(console, name, unit) as progress:
            measured = run(progress, absent)
        for part in absent:
            found[part] = {metric: _or_none(value) for metric, value in measured[part].items()}
            record = {"identity": dict(identity), "found": found[part]}
            write_file(files[part], json.dumps(record).encode() + b"\n")
    return {
        part: {metric: math.nan if value is None else value for metric, value in found[part].items()}
        for part in parts
    }


def _earlier(file: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    try:
        earlier = json.loads(file.read_bytes())
        found = dict(earlier["found"])
        recorded = earlier.get("identity")
        if recorded is None:  # older versions wrote the values alone
            recorded = dict(zip(identity, earlier["key"], strict=True))
        differing = changed_fields(recorded, json.loads(json.dumps(identity)))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise Damaged(
            "file_damaged",
            f"{file} is damaged: {type(error).__name__}: {error}.",
            "Delete it and run the same command again: it is measured anew, and the other rows are kept.",
        ) from error
    if differing:
        raise WrongUse(
            "output_differs",
            f"{file} was measured otherwise: {'; '.join(differing)}.",
            "Name another --output, or delete it.",
        )
    return found


@contextmanager
def shown_progress(console: Console, name: str, unit: str) -> Iterator[Progress]:
    """Name a measurement, and show its progress."""
    console.print(f"[bold]{name}[/bold]", highlight=False)
    with counted(console, name, unit) as report:
        yield report


def slug(text: str) -> str:
    """Turn a text into a file name."""
    spelled = text.lower().replace("+", " plus ")  # PC and PC+ are different rows
    return "-".join("".join(letter if letter.isalnum() else " " for letter in spelled).split())


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
