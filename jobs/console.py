"""Progress output of a job: a live bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

if TYPE_CHECKING:
    from pipeline.cluster.progress import Progress

LOG_EVERY_S = 10.0


class LabelDisplay:
    """Progress of a labelling run.

    Args:
        total: number of images to label.
        console: shows a bar if it is a terminal, else plain lines.
    """

    def __init__(self, total: int, console: Console) -> None:
        self._total = total
        self._console = console
        self._bar: Bar | None = None
        self._last_line = time.monotonic()
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TextColumn("[red]{task.fields[failed]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=total, rate="", failed="")

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
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self._say(text)

    def update(self, progress: Progress) -> None:
        """Show new numbers; in a log at most every ``LOG_EVERY_S`` seconds."""
        rate = f"{progress.rate:.1f} images/s" if progress.rate else ""
        failed = sum(progress.failures.values())
        if self._bar is not None:
            self._bar.update(
                self._task,
                completed=progress.done,
                rate=rate,
                failed=f"{failed} failed" if failed else "",
            )
            if progress.done:
                self.stage("labelling")
        elif progress.done and time.monotonic() - self._last_line >= LOG_EVERY_S:
            self._last_line = time.monotonic()
            left = ""
            if progress.rate:
                left = f", about {duration((self._total - progress.done) / progress.rate)} left"
            self._say(
                f"labelled {progress.done}/{self._total}, {failed} failed, {rate or 'rate unknown yet'}{left}"
            )

    def _say(self, text: str) -> None:
        self._console.print(f"{time.strftime('%H:%M:%S')} {text}", highlight=False, soft_wrap=True)


class TrainDisplay:
    """Progress of a training run.

    Args:
        console: shows a bar if it is a terminal, else plain lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._total = 0
        self._last_line = time.monotonic()
        self._bar: Bar | None = None
        if console.is_terminal:
            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=None, figures="")

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
        self._total = total
        if self._bar is not None:
            self._bar.update(self._task, total=total)
        self.stage(stage)

    def stage(self, text: str) -> None:
        """Name the current stage."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.say(text)

    def say(self, text: str) -> None:
        """Print a permanent line."""
        stamp = "" if self._bar is not None else f"{time.strftime('%H:%M:%S')} "
        self._console.print(f"{stamp}{text}", highlight=False, soft_wrap=True)

    def update(self, line: Mapping[str, Any]) -> None:
        """Show a record of ``metrics.jsonl``; in a log at most every ``LOG_EVERY_S`` seconds."""
        rate = line.get("samples_per_second")
        figures = f"loss {line['loss']:.3f}" + (f", {rate:.1f} samples/s" if rate else "")
        if self._bar is not None:
            self._bar.update(self._task, completed=line["step"], description="training", figures=figures)
        elif time.monotonic() - self._last_line >= LOG_EVERY_S or line["step"] == self._total:
            self._last_line = time.monotonic()
            self.say(f"step {line['step']}/{self._total}, {figures}")


def duration(seconds: float) -> str:
    """A duration for people: ``42 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def stderr_console() -> Console:
    """The console for progress and messages; standard output is reserved for results."""
    return Console(file=sys.stderr)
