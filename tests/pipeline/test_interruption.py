from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import interruption
from pipeline.interruption import Running, interrupt, signals_held, stop_on_signals


def wait_for_the_end() -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        time.sleep(0.01)
    raise AssertionError("nothing ended the run")


def in_another_thread(work: Any, *arguments: Any) -> None:
    thread = threading.Thread(target=work, args=arguments)
    thread.start()
    thread.join()


@pytest.fixture
def handlers_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("again", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_does_not_cut_short_what_the_first_began(
    first: signal.Signals, again: signal.Signals, monkeypatch: pytest.MonkeyPatch, handlers_restored: None
) -> None:
    monkeypatch.setattr(interruption, "PATIENCE_S", 0.5)
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), first)
        wait_for_the_end()
    for _ in range(3):
        os.kill(os.getpid(), again)
        time.sleep(0.01)
    time.sleep(0.6)  # long: who presses it then finds that the clearing up hangs
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), again)
        wait_for_the_end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_while_they_are_held(number: signal.Signals, handlers_restored: None) -> None:
    stop_on_signals()
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        with signals_held():
            with signals_held():
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            done.append("work")
        done.append("more")
    assert done == ["work"]
    with signals_held():
        time.sleep(0.05)  # the next hold knows nothing of it


def test_signals_are_not_held_for_ever(monkeypatch: pytest.MonkeyPatch, handlers_restored: None) -> None:
    monkeypatch.setattr(interruption, "LONGEST_HOLD_S", 0.3)
    monkeypatch.setattr(interruption, "PATIENCE_S", 0.0)
    stop_on_signals()
    for _ in range(2):  # the next run is as patient
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), signals_held():
            while True:  # somebody presses it again and again
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        assert time.monotonic() - began >= 0.3


def test_signals_wait_while_python_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers_restored: None
) -> None:
    (tmp_path / "interrupted_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("interrupted_module")
        wait_for_the_end()
    assert sys.modules.pop("interrupted_module").whole


def test_ctrl_c_stays_ignored_in_the_background(handlers_restored: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop_on_signals()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.05)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_the_end()


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


def test_where_ctrl_c_is_ignored_the_run_still_ends(handlers_restored: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop_on_signals()
    with pytest.raises(KeyboardInterrupt):
        in_another_thread(interrupt)
        wait_for_the_end()
