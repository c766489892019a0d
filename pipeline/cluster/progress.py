"""Progress of a run, and the time that it still takes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW_S = 60.0
"""Recent work that an estimate of the time left is based on."""
WARM_UP_S = 10.0
"""Work before there is an estimate."""
LEAST_REPORTS = 5
"""Reports before there is an estimate, and in its window: work arrives in pieces of different sizes."""


@dataclass(frozen=True)
class Progress:
    """Counts and timings of a run so far.

    Attributes:
        done: rows written, failures included.
        failures: count by error code.
        first_s, last_s: seconds from the start of the flow to the first and the latest rows, if any.
        first_done: rows in the first report; the steady rate excludes them.
        decode_s, label_s, encode_s: seconds of work, summed over all workers of the stage.
        fetch_s: part of ``decode_s`` spent waiting for bytes.
        write_s: part of ``encode_s`` spent on the storage.
        batches: calls of the model.
        written: bytes of the rows.
    """

    done: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    first_s: float | None = None
    last_s: float | None = None
    first_done: int = 0
    decode_s: float = 0.0
    label_s: float = 0.0
    encode_s: float = 0.0
    fetch_s: float = 0.0
    write_s: float = 0.0
    batches: float = 0.0
    written: int = 0

    @property
    def rate(self) -> float | None:
        """Steady-state images per second, excluding start-up; None until it can be measured."""
        if self.first_s is None or self.last_s is None or self.done <= self.first_done:
            return None
        return (self.done - self.first_done) / max(self.last_s - self.first_s, 1e-9)

    def plus(
        self,
        *,
        done: int,
        failures: Mapping[str, int],
        at_s: float,
        decode_s: float,
        label_s: float,
        encode_s: float,
        fetch_s: float = 0.0,
        write_s: float = 0.0,
        batches: float = 0.0,
        written: int = 0,
    ) -> Progress:
        """The progress after ``done`` more rows, written ``at_s`` seconds after the start of the flow."""
        merged = dict(self.failures)
        for code, count in failures.items():
            merged[code] = merged.get(code, 0) + count
        return Progress(
            done=self.done + done,
            failures=merged,
            first_s=at_s if self.first_s is None else self.first_s,
            last_s=at_s,
            first_done=done if self.first_s is None else self.first_done,
            decode_s=self.decode_s + decode_s,
            label_s=self.label_s + label_s,
            encode_s=self.encode_s + encode_s,
            fetch_s=self.fetch_s + fetch_s,
            write_s=self.write_s + write_s,
            batches=self.batches + batches,
            written=self.written + written,
        )


class TimeLeft:
    """Estimates the time left from the work of the last minute, leaving out the start.

    The first report only marks the start of the work: what came before it (loading, compiling, the earlier
    steps of a resumed run) says nothing about the speed.

    Args:
        total: amount of work.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._began: float | None = None
        self._count = 0
        self._reports: deque[tuple[float, int]] = deque()

    def update(self, done: int, at_s: float) -> None:
        """Take note that ``done`` of the work was done at a time, in seconds of any clock."""
        if self._reports and done < self._reports[-1][1]:
            self._began, self._count = None, 0  # work is repeated after a restart
            self._reports.clear()
        if self._reports and done == self._reports[-1][1]:
            return
        if self._began is None:
            self._began = at_s
        self._count += 1
        self._reports.append((at_s, done))
        while len(self._reports) > LEAST_REPORTS and self._reports[1][0] <= at_s - WINDOW_S:
            self._reports.popleft()

    def seconds(self, now_s: float) -> float | None:
        """Seconds left at a time; None during the warm-up and when the work is done."""
        if self._began is None or self._count < LEAST_REPORTS:
            return None
        last_s, last = self._reports[-1]
        rate = self.rate
        if last >= self._total or last_s - self._began < WARM_UP_S or rate is None:
            return None
        return max(0.0, (self._total - last) / rate - (now_s - last_s))

    @property
    def rate(self) -> float | None:
        """Work per second lately; None until there are two reports."""
        if len(self._reports) < 2:
            return None
        (first_s, first), (last_s, last) = self._reports[0], self._reports[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None
