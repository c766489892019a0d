from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs import apart
from jobs.apart import Apart
from models.errors import MaskMillError

ROOT = Path(__file__).resolve().parents[2]


def count(to: int) -> Iterator[tuple[int, int, str | None]]:
    for number in range(to):
        print("what is printed is not what is said")
        yield number, os.getpid(), os.environ.get("SAID")


def refuse() -> Iterator[int]:
    yield 1
    raise MaskMillError("refused", "No.", "Ask again.")


def break_down(error: type[Exception]) -> Iterator[int]:
    yield 1
    raise error("it", "broke")


def die(how: signal.Signals) -> Iterator[int]:
    yield 1
    os.kill(os.getpid(), how)


def sleep(seconds: float) -> Iterator[int]:
    yield os.getpid()
    time.sleep(seconds)
    yield 0


def talk() -> Iterator[int]:
    while True:
        yield 1
        time.sleep(0.1)


class Unpicklable(Exception):
    """Its reduction gives one argument, and it takes two."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def test_what_is_yielded_comes_from_a_process_of_its_own() -> None:
    with Apart(count, 3, environment={"SAID": "hello"}) as other:
        told = list(other)
    assert [number for number, _, _ in told] == [0, 1, 2]
    assert {said for _, _, said in told} == {"hello"}
    (process,) = {process for _, process, _ in told}
    assert process != os.getpid() and not psutil.pid_exists(process)


@pytest.mark.parametrize(
    ("work", "arguments", "kind", "says"),
    [
        (refuse, (), MaskMillError, "No."),
        (break_down, (OSError,), OSError, "broke"),
        (break_down, (ConnectionResetError,), ConnectionResetError, "broke"),  # another connection's
        (break_down, (Unpicklable,), RuntimeError, "Unpicklable: itbroke"),
        (die, (signal.SIGKILL,), MaskMillError, "was killed.\nIf this machine"),
        (die, (signal.SIGTERM,), MaskMillError, "with status -15.\nSee"),
    ],
)
def test_what_goes_wrong_there_is_raised_here(
    work: Any, arguments: tuple[Any, ...], kind: type[Exception], says: str
) -> None:
    with Apart(work, *arguments) as other:
        told = iter(other)
        assert next(told) == 1
        with pytest.raises(kind, match=says) as caught:
            next(told)
    if kind is not MaskMillError:
        assert "in break_down" in str(caught.value.__cause__), "where it was"


def test_more_than_a_pipe_holds_goes_to_a_process_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_PROGRAM", "raise SystemExit(3)")
    with Apart(count, "x" * 10_000_000) as never, pytest.raises(MaskMillError, match="with status 3"):
        next(iter(never))


def test_the_working_directory_is_no_place_for_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("models.py", "random.py"):
        (tmp_path / name).write_text("raise SystemExit(4)")
    monkeypatch.chdir(tmp_path)
    with Apart(count, 1) as other:
        assert next(iter(other))[0] == 0


def test_leaving_ends_the_process_and_the_iteration() -> None:
    began = time.monotonic()
    with Apart(sleep, 600) as other:
        told = iter(other)
        process = next(told)
    assert list(told) == []
    assert not psutil.pid_exists(process)
    assert time.monotonic() - began < 300


def test_ctrl_c_is_for_the_one_who_waits() -> None:
    """A terminal interrupts all processes of its foreground group."""
    program = """
import os, signal, sys
from jobs.apart import Apart
from tests.jobs.test_apart import sleep
with Apart(sleep, 0.5) as other:
    told = iter(other)
    process = next(told)
    signal.signal(signal.SIGINT, lambda *_: None)
    os.killpg(0, signal.SIGINT)
    print(os.getpgid(process) != os.getpgid(0), next(told), list(told))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False, start_new_session=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split("\n")[0]) == (0, "True 0 []"), done.stderr


def test_it_does_not_outlive_who_asked() -> None:
    program = """
import os, signal
from jobs.apart import Apart
from tests.jobs.test_apart import talk
with Apart(talk) as other:
    next(iter(other))
    os.kill(os.getpid(), signal.SIGKILL)
"""
    # It has the pipes as well: as long as it lives, the call does not come back.
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
