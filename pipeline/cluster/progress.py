"""Progress of a labelling run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """Counts and timings of a run so far.

    Attributes:
        done: rows written, failures included.
        failures: count by error code.
        first_s, last_s: seconds from the start of the flow to the first and the latest rows, if any.
        first_done: rows in the first report; the steady rate excludes them.
        decode_s, label_s, encode_s: seconds of work, summed over all workers of the stage.
    """

    done: int = 0
    failures: Mapping[str, int] = field(default_factory=dict)
    first_s: float | None = None
    last_s: float | None = None
    first_done: int = 0
    decode_s: float = 0.0
    label_s: float = 0.0
    encode_s: float = 0.0

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
        )
