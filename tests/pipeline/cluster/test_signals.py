from __future__ import annotations

import importlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster import signals as interruption
from pipeline.cluster.signals import (
    INTERRUPTED,
    TERMINATED,
    handlers_kept,
    interrupt,
    interrupt_on_signals,
    signals_held,
    stop_on_signals,
)


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
    first: signal.Signals,
    again: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    handlers_restored: None,
) -> None:
    monkeypatch.setattr(interruption, "PATIENCE_S", 1000.0)
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), first)
        wait_for_the_end()
    for _ in range(3):
        os.kill(os.getpid(), again)
        time.sleep(0.01)
    assert capfd.readouterr().err.count("Stopping") == 3
    # Much later: the clearing up hangs.
    monkeypatch.setattr(interruption, "PATIENCE_S", 0.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), again)
        wait_for_the_end()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_while_they_are_held(number: signal.Signals, handlers_restored: None) -> None:
    interrupt_on_signals()
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        with signals_held():
            with signals_held():
                os.kill(os.getpid(), number)
                time.sleep(0.2)
            time.sleep(0.2)
            done.append("work")
        wait_for_the_end()
    assert done == ["work"]


def test_one_signal_is_not_held_forever(monkeypatch: pytest.MonkeyPatch, handlers_restored: None) -> None:
    monkeypatch.setattr(interruption, "LONGEST_HOLD_S", 0.3)
    monkeypatch.setattr(interruption, "PATIENCE_S", 0.0)
    interrupt_on_signals()
    for _ in range(2):  # the next is held as long
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt), signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for_the_end()
        assert time.monotonic() - began >= 0.3


def test_signals_wait_while_python_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handlers_restored: None
) -> None:
    (tmp_path / "interrupted_module.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nwhole = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        importlib.import_module("interrupted_module")
        wait_for_the_end()
    assert sys.modules.pop("interrupted_module").whole


def test_signals_wait_for_destructors(handlers_restored: None) -> None:
    whole = []

    class Destroyed:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            whole.append(True)

    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        Destroyed()
        wait_for_the_end()
    assert whole


def test_signals_wait_for_logging(handlers_restored: None) -> None:
    whole = []

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
            whole.append(record.getMessage())

    log = logging.Logger("interrupted")
    log.addHandler(Slow())
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        log.warning("said")
        wait_for_the_end()
    assert whole == ["said"]


def test_ctrl_c_stays_ignored_in_the_background(handlers_restored: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt_on_signals()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for_the_end()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("before", "late"),
    [
        # At exit what is registered last comes first.
        ("atexit.register(time.sleep, 0.2); atexit.register(kill)", ""),
        # A thread that does not end is no longer waited for.
        ("threading.Thread(target=time.sleep, args=(60,)).start()", "threading.Timer(1, kill).start()"),
    ],
)
def test_late_signals_do_not_change_the_status(number: signal.Signals, before: str, late: str) -> None:
    code = f"""
import atexit, os, signal, threading, time
from pipeline.cluster.signals import end_process, interrupt_on_signals
kill = lambda: os.kill(os.getpid(), {int(number)})
interrupt_on_signals()
{before}
{late}
end_process(3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (3, "")


def test_where_ctrl_c_is_ignored_the_run_still_ends(handlers_restored: None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    interrupt_on_signals()
    with pytest.raises(KeyboardInterrupt):
        in_another_thread(interrupt)
        wait_for_the_end()


def test_handlers_of_libraries_do_not_stay(handlers_restored: None) -> None:
    interrupt_on_signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with handlers_kept():
        for number in before:
            signal.signal(number, lambda *_: None)
    assert {number: signal.getsignal(number) for number in before} == before
    in_another_thread(handlers_kept().__enter__)


def test_a_stop_is_asked_for_once_and_then_insisted_on() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(KeyboardInterrupt), stop_on_signals() as request:
        assert not request.reason
        for number, reason in ((signal.SIGTERM, TERMINATED), (signal.SIGINT, INTERRUPTED)):
            os.kill(os.getpid(), number)
            assert request.reason == reason
        os.kill(os.getpid(), signal.SIGINT)
        wait_for_the_end()
    assert {number: signal.getsignal(number) for number in before} == before
