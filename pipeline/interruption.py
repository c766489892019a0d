"""Ending the run of the main thread: on a signal, and from another thread."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

PATIENCE_S = 5.0
LONGEST_HOLD_S = 10.0

_holds = 0
_held: int | None = None


def stop_on_signals() -> None:
    """Let SIGTERM, a polite request to end, do what Ctrl-C does: the run stops cleanly and can be taken up.

    That takes seconds. An impatient second Ctrl-C meanwhile would leave processes behind that no one ends,
    so for ``PATIENCE_S`` none is heeded. While ``signals_held``, or while Python imports, the first waits.
    """
    asked: float | None = None
    heeded = -math.inf

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal asked, heeded
        global _held
        now = time.monotonic()
        if now < heeded + PATIENCE_S:
            return
        asked = asked or now
        if now < asked + LONGEST_HOLD_S:
            if _holds:
                _held = number
                return
            if _imports(frame):
                threading.Timer(0.02, os.kill, (os.getpid(), number)).start()
                return
        asked, heeded, _held = None, now, None
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    # A shell starts what it puts in the background with Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait until this is over, but no longer than ``LONGEST_HOLD_S``.

    For the main thread, while much begins at once. An interruption that is raised somewhere in it may be lost
    (in a callback, a destructor), or leave a lock behind that others wait for: of imports, of logging.
    """
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1
        if _held is not None and not _holds:
            signal.raise_signal(_held)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def ignore_signals() -> None:
    """For a process that is about to end with a status of its own: late signals would end it with theirs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


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
