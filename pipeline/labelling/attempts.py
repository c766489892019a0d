"""Which images kill the process that works on them, by a segmentation fault or for lack of memory.

Ray repeats the work of a process that died, without end. So each stage tells a common book when it begins and
ends a part. After ``PART_DEATHS`` beginnings without an end, it takes the images of the part one by one, and
after ``IMAGE_DEATHS`` more an image becomes a row with the code ``crashed_worker``. A part with such an image
stays in the book: its rows may be lost with the process, when another part kills it, and nothing is to die of
it again. Imports no Ray.
"""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from pipeline.table.committed import part_name

PART_DEATHS = 2
IMAGE_DEATHS = 2
"""An image is not to blame for the first: a process also dies because of others, as with its node."""

CRASHED = "crashed_worker"


class Attempts(Protocol):
    """A book of beginnings without an end, common to all processes of a run."""

    def begin(self, key: str) -> int:
        """Note that work begins; returns how often it had begun before without an end."""
        ...

    def end(self, key: str) -> None:
        """Note that work has ended."""
        ...


class AttemptBook:
    """The book itself, for one process or as an actor."""

    def __init__(self) -> None:
        self._open: Counter[str] = Counter()

    def begin(self, key: str) -> int:
        """See ``Attempts``."""
        self._open[key] += 1
        return self._open[key] - 1

    def end(self, key: str) -> None:
        """See ``Attempts``."""
        self._open.pop(key, None)


def part_key(stage: str, ids: np.ndarray) -> str:
    """Key of a stage's work on images with these ids, int64 (n,)."""
    return f"{stage} {part_name(ids)}"


def crashed_row(stage: str) -> dict[str, str]:
    """Status and error of an image that kills processes."""
    return {
        "status": CRASHED,
        "error": f"The process that had to {stage} this image alone died {IMAGE_DEATHS} times: it crashed "
        "or used more memory than there is.",
    }


class Turns:
    """Lets several threads work at once, or one of them alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._working = 0
        self._wanting = 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Work beside others, after those who want to work alone."""
        with self._changed:
            self._changed.wait_for(lambda: self._wanting == 0)
            self._working += 1
        try:
            yield
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Work while nobody else does."""
        with self._changed:
            self._wanting += 1
            try:
                self._changed.wait_for(lambda: self._working == 0)
                yield  # with the lock, so that nobody begins
            finally:
                self._wanting -= 1
                self._changed.notify_all()
