"""Which rows of a table a gallery is to show: of one class, one status, a range of quality."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from models.errors import WrongUse, did_you_mean


@dataclass(frozen=True)
class Only:
    """A filter; what is None or "" does not filter.

    Attributes:
        name: of a class that is in the labels.
        status: of the row.
        quality: smallest quality, and the one below which it must be.
    """

    name: str | None = None
    status: str | None = None
    quality: tuple[float, float] | None = None

    @classmethod
    def of(cls, name: str | None, status: str | None, quality: str | None) -> Only | None:
        """The filter that options ask for; None for none.

        Raises:
            MaskMillError: ``wrong_use`` for a quality that is no range.
        """
        if name is None and status is None and quality is None:
            return None
        return cls(name, status, None if quality is None else _range(quality))

    def check(self, names: tuple[str, ...], statuses: Mapping[str, int]) -> None:
        """Refuse a class and a status that the table does not have.

        Raises:
            MaskMillError: ``wrong_use``.
        """
        for option, asked, known in (("--class", self.name, names), ("--status", self.status, [*statuses])):
            if asked is not None and asked not in known:
                hint = did_you_mean(asked, known)
                raise WrongUse(
                    "wrong_use",
                    f"{option} {asked}: the table has none of that.",
                    f"{hint}It has: {', '.join(known)}.",
                )

    def described(self) -> str:
        """In words."""
        said = [] if self.name is None else [f"with {self.name}"]
        said += [] if self.status is None else [f"status {self.status}"]
        if self.quality is not None:
            said.append(f"quality from {self.quality[0]:g} to below {self.quality[1]:g}")
        return ", ".join(said)

    def keep(
        self, status: NDArray[Any], quality: NDArray[np.floating[Any]], has_class: NDArray[np.bool_]
    ) -> NDArray[np.bool_]:
        """Which rows to show, (N,), by their status, their quality, and whether they have the class."""
        kept = has_class.copy()
        if self.status is not None:
            kept &= status == self.status
        if self.quality is not None:
            kept &= (quality >= self.quality[0]) & (quality < self.quality[1])
        return kept


def has_class(segments: pa.Array, class_id: int) -> NDArray[np.bool_]:
    """Which rows have a class, (N,), by their segments."""
    lengths = segments.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(segments)), lengths)
    found = segments.flatten().field("class_id").to_numpy(zero_copy_only=False) == class_id
    return np.bincount(owner[found], minlength=len(segments)) > 0


def show_command(place: str) -> str:
    """The command that shows others of a table; its filters come after it."""
    return f"maskmill show {shlex.quote(place)}"


def _range(text: str) -> tuple[float, float]:
    low, dash, high = text.partition("-")
    try:
        found = float(low), float(high)
    except ValueError:
        found = (1.0, 0.0)
    if not dash or not found[0] < found[1]:
        raise WrongUse("wrong_use", f"--quality {text} is no range.", "Write --quality 0-0.5.")
    return found
