from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from jobs import console as shown
from jobs.console import LabelDisplay, TrainDisplay, counted, time_left, timed
from pipeline.cluster.progress import Progress


def _console(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    said = io.StringIO()
    return Console(file=said, force_terminal=terminal, width=120), said


@pytest.mark.parametrize("terminal", [False, True])
def test_what_takes_time_is_named_and_timed(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    console, said = _console(terminal=terminal)
    monkeypatch.setattr(shown, "WORTH_TELLING_S", 60.0)
    with timed(console, "writing the page"):
        end = time.monotonic() + 30
        while "writing the page" not in said.getvalue():  # a terminal is refreshed ten times a second
            assert time.monotonic() < end
            time.sleep(0.02)
    assert "took" not in said.getvalue()
    monkeypatch.setattr(shown, "WORTH_TELLING_S", 0.01)
    with timed(console, "copying [the] model"):
        time.sleep(0.02)
    assert re.search(r"\d\d:\d\d:\d\d copying \[the\] model took \d+ s\n", said.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (0.2, "a few seconds left"),
        (9.9, "a few seconds left"),
        (14, "about 10 s left"),
        (58, "about 1 min left"),
        (100, "about 1 min 40 s left"),
        (200, "about 3 min left"),
        (3700, "about 1 h 2 min left"),
        (7300, "about 2 h left"),
        (8500, "about 2 h 20 min left"),
    ],
)
def test_estimates_are_no_more_exact_than_they_are(seconds: float | None, text: str) -> None:
    assert time_left(seconds) == text


def test_a_log_of_labelling_ends_without_an_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "LOG_EVERY_S", 0.0)
    clock = iter(range(0, 1000, 4))
    console, said = _console()
    display = LabelDisplay(40, console, clock=lambda: float(next(clock)))
    progress = Progress()
    for part in range(8):
        progress = progress.plus(
            done=5, failures={}, at_s=4.0 * part, decode_s=0.0, label_s=0.0, encode_s=0.0
        )
        display.update(progress)
    lines = said.getvalue().splitlines()
    assert len(lines) == 8 and "about 10 s left" in lines[4]
    assert lines[-1].endswith("labelled 40 of 40, 1.2 images/s")


def test_a_log_of_training_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "LOG_EVERY_S", 0.0)
    clock = iter(range(0, 1000, 30))
    console, said = _console()
    display = TrainDisplay(console, clock=lambda: float(next(clock)))
    display.begin(1200, "starting the workers")
    for step in range(100, 1300, 100):
        display.update({"step": step, "loss": 0.5, "samples_per_second": 3.21})
    lines = said.getvalue().splitlines()[1:]
    assert (
        "left" not in lines[0]
        and "step 600 of 1,200, loss 0.500, 3.2 samples/s, about 3 min left" in lines[5]
    )
    assert lines[-1].endswith("step 1,200 of 1,200, loss 0.500, 3.2 samples/s")


def test_counted_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shown, "LOG_EVERY_S", 0.0)
    console, said = _console()
    with counted(console, "comparing", "images") as report:
        for done in range(1, 2001):
            report(done, 2000)
    assert said.getvalue().splitlines()[-1].endswith("comparing: 2,000 of 2,000 images")
