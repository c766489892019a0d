"""Ending the run of the main thread: on a signal, and from another thread."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

PATIENCE_S = 5.0


def stop_on_signals() -> None:
    """Let SIGTERM, a polite request to end, do what Ctrl-C does: the run stops cleanly and can be taken up.

    That takes seconds. An impatient second Ctrl-C meanwhile would leave processes behind that no one ends,
    so for ``PATIENCE_S`` none is heeded.
    """
    heeded: list[float] = []

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if heeded and now < heeded[-1] + PATIENCE_S:
            return
        heeded.append(now)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    # A shell starts what it puts in the background with Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)


def interrupt() -> None:
    """Do what Ctrl-C does."""
    # A shell starts what it puts in the background with Ctrl-C ignored; the command heeds SIGTERM then.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)


class Running:
    """A run of the main thread, for the threads that work for it. A context that lasts as long as it goes on.

    Attributes:
        failure: what another thread ended the run with; None as long as none did.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._over = False
        self.failure: BaseException | None = None

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_error: object) -> None:
        self.end()

    def do(self, work: Callable[[], None]) -> None:
        """For other threads: do something that only a run that goes on may do, such as asking Ray."""
        with self._lock:
            if not self._over:
                work()

    def fail(self, failure: BaseException) -> None:
        """For other threads: end the run, unless it has ended."""
        with self._lock:
            if not self._over and self.failure is None:
                self.failure = failure
                interrupt()

    def end(self) -> None:
        """Let no other thread do more for the run; waits for what one is doing."""
        with self._lock:
            self._over = True
