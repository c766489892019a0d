from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest

from jobs.interruption import Running, interrupt


def wait_for_the_end() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.01)
    raise AssertionError("nothing ended the run")


def in_another_thread(work: Any, *arguments: Any) -> None:
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    thread.join()


def test_a_failure_elsewhere_ends_the_run_once() -> None:
    first = OSError("first")
    with pytest.raises(KeyboardInterrupt), Running() as running:
        in_another_thread(running.fail, first)
        wait_for_the_end()
    assert running.failure is first
    # It has ended: nothing is interrupted any more, and nothing done.
    in_another_thread(running.fail, OSError("second"))
    done: list[int] = []
    running.do(lambda: done.append(1))
    time.sleep(0.1)
    assert running.failure is first and not done


def test_work_for_a_run_ends_before_the_run() -> None:
    done: list[str] = []

    def slowly() -> None:
        began.set()
        time.sleep(0.3)
        done.append("work")

    began = threading.Event()
    running = Running()
    thread = threading.Thread(target=running.do, args=(slowly,))
    thread.start()
    began.wait()
    running.end()
    done.append("end")
    thread.join()
    assert done == ["work", "end"]


def test_where_ctrl_c_is_ignored_the_run_still_ends() -> None:
    def as_ctrl_c(_signal: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, as_ctrl_c)
    try:
        with pytest.raises(KeyboardInterrupt):
            in_another_thread(interrupt)
            wait_for_the_end()
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])
