"""What a kind of input is to the runner."""

from __future__ import annotations

import importlib
import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from models.errors import MaskMillError

KINDS = {
    name: f"benchmarks.fuzz.{name}" for name in ("images", "sources", "coco", "formats", "documents", "http")
}
"""The module of each kind, by name."""
_REPRESENTATIONS = ("<_io.", " object at 0x", "Traceback (most recent")


class Fault(Exception):
    """A wrong outcome that is no exception."""


class Kind(ABC):
    """Makes inputs and tries them.

    Args:
        folder: scratch space.

    Attributes:
        seconds: longest time for an input.
        memory_mb: largest resident memory, in MB.
    """

    seconds: ClassVar[float] = 30.0
    memory_mb: ClassVar[int] = 1024

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    @abstractmethod
    def make(cls, rng: random.Random) -> bytes:
        """An input."""

    @abstractmethod
    def check(self, data: bytes, rng: random.Random) -> str:
        """Try an input; returns the outcome in a word or two.

        Raises:
            MaskMillError: a good outcome too.
            Exception: any other is a fault.
        """

    def peak_mb(self) -> float:
        """Largest resident memory so far of what reads the inputs, in MB.

        Not ``ru_maxrss``: a process that has been started inherits that of its parent.
        """
        status = Path("/proc/self/status").read_text().splitlines()
        return next(float(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))

    def close(self) -> None:  # noqa: B027
        """Free what was started."""


def kind_of(module: str) -> type[Kind]:
    """The kind of a module."""
    kind: type[Kind] = importlib.import_module(module).KIND
    return kind


def outcome_of(kind: Kind, data: bytes, rng: random.Random) -> str:
    """``Kind.check``, with an error of the family as its outcome.

    Raises:
        Fault: the error is not told in words.
    """
    try:
        return kind.check(data, rng)
    except MaskMillError as error:
        text = f"{error.message} {error.remedy}"
        if not error.message.strip() or not error.remedy.strip():
            raise Fault(f"{error.code} has no message or no remedy") from error
        for part in _REPRESENTATIONS:
            if part in text:
                raise Fault(f"{error.code} shows a Python object: {text[:500]}") from error
        return f"{type(error).__name__} {error.code}"
