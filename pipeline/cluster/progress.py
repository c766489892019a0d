"""How far a labelling run has come, and the board between the driver and its stages."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """What a run has done so far.

    Attributes:
        done: rows encoded, failures included.
        failures: count by error code.
        first_s, last_s: seconds from the start of the flow to the first and the latest rows; None before.
        first_done: rows in the first report; the steady rate leaves them out.
        decode_s, label_s, encode_s: seconds of work, summed over all workers of the stage.
    """

    done: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    first_s: float | None = None
    last_s: float | None = None
    first_done: int = 0
    decode_s: float = 0.0
    label_s: float = 0.0
    encode_s: float = 0.0

    @property
    def rate(self) -> float | None:
        """Images per second in the steady state, start-up left out; None while too little is known."""
        if self.first_s is None or self.last_s is None or self.done <= self.first_done:
            return None
        return (self.done - self.first_done) / max(self.last_s - self.first_s, 1e-9)


class Board:
    """Where the stages report to, and where the words wait that are embedded while the stages start.

    A crash of it costs the display; before the words have come it ends the run. It never costs a row.
    """

    def __init__(self) -> None:
        self._words: bytes | None = None
        self._words_have_come = threading.Event()
        self._progress = Progress()
        self._origin = time.monotonic()

    def hand_over_words(self, words: bytes) -> None:
        """The words, which were still to come."""
        self._words = words
        self._words_have_come.set()

    def words(self) -> bytes:
        """The words; blocks until they are handed over, so it needs a thread of its own."""
        self._words_have_come.wait()
        assert self._words is not None
        return self._words

    def begin(self, origin: float) -> None:
        """The flow began at ``origin``: ``time.monotonic()``, which all processes of a machine share."""
        self._origin = origin

    def add(
        self,
        *,
        done: int = 0,
        failures: dict[str, int] | None = None,
        decode_s: float = 0.0,
        label_s: float = 0.0,
        encode_s: float = 0.0,
    ) -> None:
        old = self._progress
        merged = dict(old.failures)
        for code, count in (failures or {}).items():
            merged[code] = merged.get(code, 0) + count
        now = time.monotonic() - self._origin
        first = done > 0 and old.first_s is None
        self._progress = Progress(
            done=old.done + done,
            failures=merged,
            first_s=now if first else old.first_s,
            last_s=now if done else old.last_s,
            first_done=done if first else old.first_done,
            decode_s=old.decode_s + decode_s,
            label_s=old.label_s + label_s,
            encode_s=old.encode_s + encode_s,
        )

    def snapshot(self) -> Progress:
        return self._progress
