"""What a labelling run will take, told once, after its first minute."""

from __future__ import annotations

from collections.abc import Callable

from jobs.console import duration
from pipeline.cluster.progress import Progress

AFTER_S = 60.0
"""Seconds of labelling before the estimate, start-up left out."""
_UNITS = ("bytes", "KB", "MB", "GB", "TB", "PB")


class Estimate:
    """Tells the time, the size on disk and, on a cluster, the machine-hours of a run.

    Args:
        total: number of images to label.
        say: is told the estimate.
        nodes: returns the number of machines of a cluster; None on one machine.
    """

    def __init__(
        self, total: int, say: Callable[[str], object], nodes: Callable[[], int] | None = None
    ) -> None:
        self._total = total
        self._say = say
        self._nodes = nodes
        self._told = False

    def update(self, progress: Progress) -> None:
        """Take note of the progress, and tell the estimate if it is time."""
        rate = progress.rate
        if self._told or rate is None or progress.first_s is None or progress.last_s is None:
            return
        if progress.last_s - progress.first_s < AFTER_S:
            return
        self._told = True
        if progress.done >= self._total:
            return
        left = (self._total - progress.done) / rate
        each = progress.written / progress.done
        parts = [
            f"{duration(left)} more at {rate:.1f} images/s",
            f"{size(each * self._total)} on disk ({size(each)} an image)",
        ]
        if self._nodes is not None:
            nodes = self._nodes()
            hours = nodes * (progress.last_s + left) / 3600
            parts.append(f"{hours:.1f} machine-hours on {nodes} node(s)")
        self._say(f"Estimate for {self._total:,} images: {', '.join(parts)}")


def size(count: float) -> str:
    """Bytes for people: ``17.3 MB``.

    >>> size(17_300_000)
    '17.3 MB'
    """
    at = 0
    while count >= 1000 and at < len(_UNITS) - 1:
        count, at = count / 1000, at + 1
    return f"{count:.0f} bytes" if at == 0 else f"{count:.3g} {_UNITS[at]}"
