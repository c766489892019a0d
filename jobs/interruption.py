"""Ending the run of the main thread from another thread."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable


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
