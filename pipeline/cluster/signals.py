"""Clean shutdown on SIGINT (Ctrl-C) and SIGTERM."""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

PATIENCE_S = 5.0
LONGEST_HOLD_S = 10.0
TERMINATED, INTERRUPTED = "terminated", "interrupted"

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_RETRY_S = 0.05
_holds = 0


def interrupt_on_signals() -> None:
    """Make SIGTERM act like Ctrl-C: the run stops cleanly and can be resumed.

    Stopping takes seconds. An impatient second Ctrl-C would leave processes behind, so signals are ignored
    for ``PATIENCE_S`` after the first. The first is deferred within ``signals_held``, and where it would be
    lost or leave a lock held (``_unsafe``), for at most ``LONGEST_HOLD_S``.
    """
    requested_at: float | None = None
    interrupted_at = -math.inf

    def interrupted(number: int, frame: FrameType | None) -> None:
        nonlocal requested_at, interrupted_at
        now = time.monotonic()
        if now < interrupted_at + PATIENCE_S:
            os.write(2, b"Stopping: this takes a few seconds.\n")
            return
        requested_at = now if requested_at is None else requested_at
        if now < requested_at + LONGEST_HOLD_S and (_holds or _unsafe(frame)):
            threading.Timer(_RETRY_S, os.kill, (os.getpid(), number)).start()
            return
        requested_at, interrupted_at = None, now
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    # A shell starts background jobs with Ctrl-C ignored.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, interrupted)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Defer the signals of ``interrupt_on_signals`` until this context ends. Main thread only.

    For code where an interrupt could be lost (in a callback or destructor) or leave a lock held.
    """
    global _holds
    _holds += 1
    try:
        yield
    finally:
        _holds -= 1


def _unsafe(frame: FrameType | None) -> bool:
    """Whether an exception must not be raised in this frame or one that called it.

    Importlib runs callbacks that swallow exceptions, and so does Python with those of destructors. Logging
    takes a lock of all threads in one statement, and says in the next how to give it back.
    """
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith("<frozen importlib") or code.co_filename == logging.__file__:
            return True
        if code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore this process's signal handlers at the end, for code that installs its own, such as Ray."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def end_process(status: int) -> NoReturn:
    """Exit with a status that later signals cannot change.

    While Python waits for threads, a signal ends the process at once. After that, signals are ignored: they
    would replace the status or interrupt the teardown of libraries.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: os._exit(status))
            atexit.register(signal.signal, number, signal.SIG_IGN)
    sys.exit(status)


def interrupt() -> None:
    """Act like Ctrl-C, from any thread."""
    # With Ctrl-C ignored, as in a background job, the process still heeds SIGTERM.
    ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    os.kill(os.getpid(), signal.SIGTERM if ignored else signal.SIGINT)


class StopRequest:
    """A request to stop this process; ``reason`` is empty until the user or the system asks."""

    def __init__(self) -> None:
        self.reason = ""

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """Signal handler; a second Ctrl-C raises KeyboardInterrupt."""
        if number != signal.SIGINT:
            self.reason = TERMINATED
        elif self.reason == INTERRUPTED:
            raise KeyboardInterrupt
        else:
            self.reason = INTERRUPTED


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take SIGTERM and the first Ctrl-C as a request to stop soon, such as after the next checkpoint.

    Outside the main thread, where Python allows no handlers, signals keep their usual effect.
    """
    request = StopRequest()
    with handlers_kept():
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                signal.signal(number, request.ask)
        yield request
