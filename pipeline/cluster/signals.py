"""Ending the run of the main thread: on a signal, and from another thread."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

PATIENCE_S = 5.0
LONGEST_HOLD_S = 10.0

_AGAIN_S = 0.05
_holds = 0


def interrupt_on_signals() -> None:
    """Let SIGTERM, a polite request to end, do what Ctrl-C does: the run stops cleanly and can be taken up.

    That takes seconds. An impatient second Ctrl-C meanwhile would leave processes behind that no one ends,
    so for ``PATIENCE_S`` none is heeded. The first waits while ``signals_held``, and while Python imports,
    but no longer than ``LONGEST_HOLD_S``.
    """
    asked: float | None = None
    heeded = -math.inf

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal asked, heeded
        now = time.monotonic()
        if now < heeded + PATIENCE_S:
            os.write(2, b"Stopping: that takes some seconds.\n")
            return
        asked = now if asked is None else asked
        if now < asked + LONGEST_HOLD_S and (_holds or _imports(frame)):
            threading.Timer(_AGAIN_S, os.kill, (os.getpid(), number)).start()
            return
        asked, heeded = None, now
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    # A shell starts what it puts in the background with Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let the signals of ``interrupt_on_signals`` wait until this is over.

    For the main thread, while much begins at once. An interruption that is raised somewhere in it may be lost
    (in a callback, a destructor), or leave a lock behind that others wait for: of imports, of logging.
    """
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def end_process(status: int) -> NoReturn:
    """End this process with a status, whatever signals still come.

    While threads are waited for, a signal ends it at once. Later none is heeded: it would put its own number
    in place of the status, or break what libraries do at the end.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(status))
            atexit.register(signal.signal, number, signal.SIG_IGN)
    sys.exit(status)


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
