"""Figures that a benchmark measured, kept in its folder, so that the same command again goes on."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.console import LOG_EVERY_S, duration
from models.errors import MaskMillError
from pipeline.results import ROWS

Progress = Callable[[int, int], None]
"""Is told how much is done, and of how much."""


def kept(
    folder: Path,
    console: Console,
    name: str,
    identity: Sequence[Any],
    unit: str,
    run: Callable[[Progress], dict[str, Any]],
) -> dict[str, Any]:
    """What ``run`` finds, or found in an earlier run into the same folder.

    Args:
        folder: of the result.
        console: for progress.
        name: of what is measured, unique in the folder.
        identity: everything that it depends on, as JSON has it.
        unit: what is counted meanwhile.
        run: does the work; its values are JSON, or NaN.

    Raises:
        MaskMillError: ``output_differs`` if the earlier run was of something else.
    """
    file = folder / ROWS / f"{slug(name)}.json"
    if file.exists():
        earlier = json.loads(file.read_text())
        if earlier["key"] != list(identity):
            raise MaskMillError(
                "output_differs",
                f"{file} was measured on other data, with other weights or another --limit.",
                "Name another --output.",
            )
        found = earlier["found"]
    else:
        with shown_progress(console, name, unit) as progress:
            found = {metric: _or_none(value) for metric, value in run(progress).items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps({"key": list(identity), "found": found}) + "\n")
        os.replace(temporary, file)
    return {metric: math.nan if value is None else value for metric, value in found.items()}


@contextmanager
def shown_progress(console: Console, name: str, unit: str) -> Iterator[Progress]:
    """A line on a terminal, or one every so often in a log, that says how far the work is."""
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
