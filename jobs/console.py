"""Progress output of a job: a live bar on a terminal, plain lines in a log, and the time of what follows."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from pipeline.cluster.progress import Progress as LabelProgress
from pipeline.cluster.progress import TimeLeft
from pipeline.cluster.signals import interrupt
from pipeline.files.status import StatusFile

if TYPE_CHECKING:
    from pipeline.datasets.base import Dataset

Progress = Callable[[int, int], None]
"""Callback that takes the work done so far and the total."""
LABELLING = "labelling"
TRAINING = "training"
LOG_EVERY_S = 10.0
WORTH_TELLING_S = 1.0
"""Steps that take longer leave a line with their time."""


class LabelDisplay:
    """Progress of a labelling run.

    Args:
        total: number of images to label.
        console: shows a bar if it is a terminal, else plain lines.
        status: is told the same.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        total: int,
        console: Console,
        status: StatusFile | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._status = status
        self._total = total
        self._console = console
        self._left = TimeLeft(total)
        self._bar: Bar | None = None
        self._last_line = clock()
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("[red]{task.fields[failed]}"),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=total, rate="", failed="", left="")

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the display while the context is open."""
        if self._bar is None:
            yield
            return
        with self._bar:
            yield

    def stage(self, text: str) -> None:
        """Name the current stage."""
        if self._status is not None:
            self._status.update(stage=text)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._line(text)

    def update(self, progress: LabelProgress) -> None:
        """Show new numbers; in a log at most every ``LOG_EVERY_S`` seconds."""
        now = self._clock()
        self._left.update(progress.done, now)
        seconds = self._left.seconds(now)
        left = time_left(seconds)
        if self._status is not None and progress.done:
            self._status.update(
                stage=LABELLING,
                done=progress.done,
                total=self._total,
                unit="images",
                per_second=progress.rate,
                eta_s=seconds,
                failures=dict(progress.failures),
            )
        rate = f"{progress.rate:.1f} images/s" if progress.rate else ""
        failed = sum(progress.failures.values())
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=progress.done,
                rate=rate,
                failed=f"{failed} failed" if failed else "",
                left=left,
            )
            if progress.done:
                self._bar.update(self._task, description=LABELLING)
        elif progress.done and (now - self._last_line >= LOG_EVERY_S or progress.done == self._total):
            self._last_line = now
            parts = [f"labelled {progress.done:,} of {self._total:,}", f"{failed:,} failed" if failed else ""]
            self._line(", ".join(part for part in (*parts, rate, left) if part))

    def say(self, text: str) -> None:
        """Print a permanent line."""
        if self._status is not None:
            self._status.update(message=text)
        self._line(text)

    def _line(self, text: str) -> None:
        self._console.print(
            f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True
        )


class TrainDisplay:
    """Progress of a training run.

    Args:
        console: shows a bar if it is a terminal, else plain lines.
        status: is told the same.
        clock: tells the time in seconds.
    """

    def __init__(
        self,
        console: Console,
        status: StatusFile | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._status = status
        self._console = console
        self._total = 0
        self._left = TimeLeft(0)
        self._last_line = clock()
        self._bar: Bar | None = None
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TextColumn("{task.fields[left]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None, figures="", left="")

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show the display while the context is open."""
        if self._bar is None:
            yield
            return
        with self._bar:
            yield

    def begin(self, total: int, stage: str) -> None:
        """Start counting steps towards ``total``."""
        self._total, self._left = total, TimeLeft(total)
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self.stage(stage)

    def stage(self, text: str) -> None:
        """Name the current stage."""
        if self._status is not None:
            self._status.update(stage=text)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._line(text)

    def say(self, text: str) -> None:
        """Print a permanent line."""
        if self._status is not None:
            self._status.update(message=text)
        self._line(text)

    def _line(self, text: str) -> None:
        stamp = "" if self._bar is not None else f"{time.strftime('%H:%M:%S')} "
        self._console.print(f"{stamp}{text}", highlight=False, markup=False, soft_wrap=True)

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a record of ``metrics.jsonl``; in a log at most every ``LOG_EVERY_S`` seconds."""
        now, step = self._clock(), line["step"]
        self._left.update(step, now)
        seconds = self._left.seconds(now)
        left = time_left(seconds)
        rate = line.get("samples_per_second")
        if self._status is not None:
            shown = ("loss", "learning_rate", "samples_per_second", "data_wait", "failed_samples")
            self._status.update(
                stage=TRAINING,
                done=step,
                total=self._total,
                unit="steps",
                per_second=self._left.rate,
                eta_s=seconds,
                figures={name: line[name] for name in shown if line.get(name) is not None},
            )
        figures = f"loss {line['loss']:.3f}" + (f", {rate:.1f} samples/s" if rate else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=TRAINING, figures=figures, left=left)
        elif now - self._last_line >= LOG_EVERY_S or step == self._total:
            self._last_line = now
            self._line(f"step {step:,} of {self._total:,}, {figures}" + (left and f", {left}"))


@contextmanager
def timed(console: Console, text: str, status: StatusFile | None = None) -> Iterator[None]:
    """Name a step of the work while it runs (``writing the page``), and say its time if that is noticeable.

    Args:
        console: shows a status line if it is a terminal, else a plain line at the beginning.
        text: what is done, as a participle.
        status: is told the same.
    """
    began = time.monotonic()
    if status is not None:
        status.update(stage=text)
    if console.is_terminal:
        with console.status(text):
            yield
    else:
        _stamped(console, text)
        yield
    took = time.monotonic() - began
    if took >= WORTH_TELLING_S:
        _stamped(console, f"{text} took {duration(took)}")


@contextmanager
def counted(console: Console, doing: str, unit: str, status: StatusFile | None = None) -> Iterator[Progress]:
    """Show how much of a piece of work is done, and the time left.

    Args:
        console: shows a status line if it is a terminal, else a line every ``LOG_EVERY_S`` seconds.
        doing: the work.
        unit: its unit, in the plural.
        status: is told the same.
    """
    last = time.monotonic()
    estimate: TimeLeft | None = None
    if status is not None:
        status.update(stage=doing)
    with console.status(doing) as line:

        def report(done: int, total: int) -> None:
            nonlocal last, estimate
            now = time.monotonic()
            estimate = estimate or TimeLeft(total)
            estimate.update(done, now)
            seconds = estimate.seconds(now)
            left = time_left(seconds)
            text = f"{doing}: {done:,} of {total:,} {unit}" + (left and f", {left}")
            line.update(text)
            if status is not None:
                status.update(
                    stage=doing, done=done, total=total, unit=unit, per_second=estimate.rate, eta_s=seconds
                )
            if not console.is_terminal and now - last >= LOG_EVERY_S:
                last = now
                _stamped(console, text)

        yield report


def name_run(console: Console, run_id: str) -> None:
    """Say the id of a run where a log is kept, so that its lines are known among those of others."""
    if not console.is_terminal:
        _stamped(console, f"run {run_id}")


def _stamped(console: Console, text: str) -> None:
    console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, markup=False, soft_wrap=True)


def time_left(seconds: float | None) -> str:
    """An estimate for people, no more exact than it is: ``about 3 min left``; empty for None."""
    if seconds is None:
        return ""
    if seconds < 10:
        return "a few seconds left"
    unit = 10 if seconds < 120 else 60 if seconds < 7200 else 600
    return f"about {duration(unit * round(seconds / unit)).removesuffix(' 0 s').removesuffix(' 0 min')} left"


def duration(seconds: float) -> str:
    """A duration for people: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def say_left_out(console: Console, dataset: Dataset) -> None:
    """Say what a dataset's reader did not take."""
    for entry in dataset.left_out:
        console.print(f"{dataset.name}, not taken: {entry}", highlight=False, soft_wrap=True, markup=False)


def stderr_console() -> Console:
    """The console for progress and messages; standard output is reserved for results."""
    return Console(file=sys.stderr)


def stop_at_once(reason: str) -> None:
    """Stop at once, from any thread: another run owns the output now."""
    print(f"{reason} Stopping.", file=sys.stderr, flush=True)
    interrupt()
