"""What was injected and what it cost: a line of JSON each, so that a stopped benchmark goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

LOSSES = ("lost", "doubled", "wrong", "hung")
"""Fields of an entry that a table sums."""


@dataclass(frozen=True)
class Entry:
    """Faults of one kind that hit one or a few runs.

    Attributes:
        kind: of the faults.
        seed: of the benchmark.
        first: number of the first of them.
        times: how many were injected.
        lost, doubled, wrong, hung: see the package.
        seconds: wall clock, including what came before and after the faults.
        notes: what went wrong.
    """

    kind: str
    seed: int
    first: int
    times: int
    lost: int
    doubled: int
    wrong: int
    hung: int
    seconds: float
    notes: list[str] = field(default_factory=list)


AnyEntry = TypeVar("AnyEntry", bound=Entry)


class Ledger(Generic[AnyEntry]):
    """The entries of a benchmark, in a file.

    Args:
        path: of the file.
        kind: of the entries.
    """

    def __init__(self, path: Path, kind: type[AnyEntry]) -> None:
        self._path = path
        self._kind = kind

    def entries(self) -> list[AnyEntry]:
        """All so far; a line that a kill cut off does not count."""
        if not self._path.exists():
            return []
        found = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(self._kind(**json.loads(line)))
        return found

    def add(self, entry: AnyEntry) -> None:
        """Save an entry."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole = not self._path.exists() or self._path.read_bytes()[-1:] in (b"", b"\n")
        with self._path.open("a", encoding="utf-8") as file:
            file.write(("" if whole else "\n") + json.dumps(asdict(entry)) + "\n")


def table(entries: Sequence[Entry], kinds: Sequence[str], losses: Sequence[str] = LOSSES) -> str:
    """Markdown: a row for each kind and one for all."""
    headings = ["kind", "times", *losses, "seconds each"]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    for kind in [*kinds, "all"]:
        chosen = [entry for entry in entries if kind in (entry.kind, "all")]
        times = sum(entry.times for entry in chosen)
        sums = [sum(getattr(entry, name) for entry in chosen) for name in losses]
        each = sum(entry.seconds for entry in chosen) / max(times, 1)
        cells = [kind.replace("_", " "), *map(str, [times, *sums]), f"{each:.1f}"]
        lines.append(f"| {' | '.join(cells if kind != 'all' else [f'**{cell}**' for cell in cells])} |")
    return "\n".join(lines)
