"""Figures that a benchmark has measured are stored in its folder, so that the same command resumes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.console import LOG_EVERY_S, duration
from models.errors import WrongUse
from pipeline.evaluation.results import ROWS

Progress = Callable[[int, int], None]
"""Callback with the work done so far and the total."""


def measure_once(
    folder: Path,
    console: Console,
    name: str,
    identity: Sequence[Any],
    unit: str,
    run: Callable[[Progress], dict[str, Any]],
) -> dict[str, Any]:
    """Measure something, unless an earlier run into the same folder did.

    Args:
        folder: of the result.
        console: for progress.
        name: of what is measured, unique in the folder.
        identity: everything that it depends on, as JSON.
        unit: what progress counts.
        run: does the work; its values are JSON or NaN.

    Raises:
        WrongUse: ``output_differs`` if the earlier run measured something else.
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
    identity: Sequence[Any],
    unit: str,
    run: Callable[[Progress, Sequence[str]], Mapping[str, dict[str, Any]]],
) -> dict[str, dict[str, Any]]:
    """Like ``measure_once``, for parts that are measured together but stored one by one.

    Args:
        folder: of the result.
        console: for progress.
        name: of the whole, unique in the folder.
        parts: the parts to measure; a later run may ask for others.
        identity: everything that each of them depends on, as JSON.
        unit: what progress counts.
        run: measures the parts that it is given, which no earlier run has measured.

    Returns:
        What ``run`` found, by part.

    Raises:
        WrongUse: ``output_differs`` if the earlier run measured something else.
    """
    files = {part: folder / ROWS / f"{slug(f'{name} {part}')}.json" for part in parts}
    found = {part: _earlier(file, identity) for part, file in files.items() if file.exists()}
    absent = [part for part in parts if part not in found]
    if absent:
        with shown_progress(console, name, unit) as progress:
            measured = run(progress, absent)
        for part in absent:
            found[part] = {metric: _or_none(value) for metric, value in measured[part].items()}
            file = files[part]
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{os.getpid()}")
            temporary.write_text(json.dumps({"key": list(identity), "found": found[part]}) + "\n")
            os.replace(temporary, file)
    return {
        part: {metric: math.nan if value is None else value for metric, value in found[part].items()}
        for part in parts
    }


def _earlier(file: Path, identity: Sequence[Any]) -> dict[str, Any]:
    earlier: dict[str, Any] = json.loads(file.read_text())
    if earlier["key"] != list(identity):
        raise WrongUse(
            "output_differs",
            f"{file} was measured on other data, with other weights or another --limit.",
            "Name another --output.",
        )
    found: dict[str, Any] = earlier["found"]
    return found


@contextmanager
def shown_progress(console: Console, name: str, unit: str) -> Iterator[Progress]:
    """Show progress: a status line on a terminal, in a log a line every ``LOG_EVERY_S``."""
    console.print(f"[bold]{name}[/bold]", highlight=False)
    began = last = time.monotonic()
    with console.status(name) as status:

        def report(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            left = duration((now - began) / done * (total - done))
            text = f"{name}: {done:,} of {total:,} {unit}, about {left} left"
            status.update(text)
            if not console.is_terminal and now - last >= LOG_EVERY_S:
                last = now
                console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)

        yield report


def slug(text: str) -> str:
    """Words of a text as a file name."""
    spelled = text.lower().replace("+", " plus ")  # PC and PC+ are different rows
    return "-".join("".join(letter if letter.isalnum() else " " for letter in spelled).split())


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
