"""Signals that end a run in good order."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

TERMINATED, INTERRUPTED = "terminated", "interrupted"


class StopRequest:
    """Whether the user or the system has asked this process to end."""

    def __init__(self) -> None:
        self.reason = ""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self.reason == INTERRUPTED:
                raise KeyboardInterrupt  # asked twice: at once
            self.reason = INTERRUPTED
        else:
            self.reason = TERMINATED


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take SIGTERM and the first Ctrl-C as the wish to stop soon; a second Ctrl-C interrupts as usual.

    Outside the main thread, where Python allows no handlers, signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request._handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
