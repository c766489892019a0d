"""Step metrics of a labelling run."""

from __future__ import annotations

import time

from pipeline.cluster.progress import Progress
from pipeline.tracking.names import key_part
from pipeline.tracking.tracker import Tracker


class ProgressLog:
    """Records the progress of a labelling run every few seconds; call ``update`` with every progress.

    Args:
        tracker: of the run.
        every_s: seconds between records.
    """

    def __init__(self, tracker: Tracker, *, every_s: float = 10.0) -> None:
        self._tracker = tracker
        self._every_s = every_s
        self._next = 0.0
        self._last_done = -1

    def update(self, progress: Progress, *, final: bool = False) -> None:
        """Record the progress, with the number of finished images as the step.

        Args:
            progress: the current progress.
            final: record it even if ``every_s`` has not passed.
        """
        now = time.monotonic()
        if progress.done == self._last_done or (now < self._next and not final) or not progress.done:
            return
        self._next, self._last_done = now + self._every_s, progress.done
        metrics: dict[str, float | None] = {
            "images_done": progress.done,
            "images_failed": sum(progress.failures.values()),
            "images_per_second": progress.rate,
        }
        metrics |= {f"failed/{key_part(code)}": count for code, count in progress.failures.items()}
        self._tracker.log_metrics(metrics, progress.done)
