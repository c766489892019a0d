"""``maskmill runs``: list tracked runs, or compare several side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tyro.conf import arg

from jobs.console import duration, stderr_console, timed
from jobs.options import Maybe
from models.errors import WrongUse
from pipeline.metrics.names import METRICS, is_share, percent
from pipeline.tracking.destination import DEFAULT_URI, URI_VARIABLE, resolve_uri, shown_uri
from pipeline.tracking.runs import TrackedRun, choose_runs, differences, list_runs
from pipeline.tracking.tracker import OFF

KEY_METRICS = (
    *(name for name, metric in METRICS.items() if metric.key),
    "images_done",
    "images_failed",
    "images_per_second",
    "claims_shown",
    "claims_not_shown",
)
"""In order of importance; the list shows the first ``SHOWN_METRICS`` that a run has."""
SHOWN_METRICS = 3
SHORT_ID = 8
READING = "reading the runs from MLflow"
MIN_LAST = 16
"""Least width of the command column; a narrower terminal drops it."""
STYLES = {"FINISHED": "green", "RUNNING": "cyan", "FAILED": "red", "KILLED": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the tracked runs, or compare some of them.

    Attributes:
        tracking: MLflow tracking URI; default: MLFLOW_TRACKING_URI, else SQLite in ./mlruns.db.
        experiment: show only this experiment, or this kind of job: label, evaluate, benchmark, train.
        limit: number of runs to list.
        compare: show how runs differ; ids (or their first letters) or names of at least two.
    """

    tracking: Maybe[str] = None
    experiment: Maybe[str] = None
    limit: int = 20
    compare: Annotated[tuple[str, ...], arg(metavar="RUN RUN ...", help_behavior_hint="")] = ()

    def run(self, console: Console | None = None) -> int:
        """List the newest runs, or show how several differ.

        If standard output is not a terminal, columns are separated by tabs and nothing is shortened. A
        terminal shows the command column only if it is wide enough.

        Raises:
            MaskMillError: ``wrong_use``; the errors of ``pipeline.tracking.runs``.
        """
        console = console or Console()
        if (self.tracking or os.environ.get(URI_VARIABLE)) == OFF:
            raise WrongUse(
                "wrong_use",
                "Tracking is off (--tracking, or MLFLOW_TRACKING_URI), so there is nothing to list.",
                f"Name the runs' place: --tracking {DEFAULT_URI}.",
            )
        if self.compare:
            if len(self.compare) < 2:
                raise WrongUse(
                    "wrong_use", "One run cannot be compared.", "Name two or more: --compare RUN RUN"
                )
            with timed(stderr_console(), READING):
                chosen = choose_runs(self.compare, self.tracking, experiment=self.experiment)
            _compare(chosen, console)
            return 0
        if self.limit < 1:
            raise WrongUse("wrong_use", f"--limit {self.limit} shows nothing.", "Give a number from 1.")
        with timed(stderr_console(), READING):
            found = list_runs(self.tracking, experiment=self.experiment, limit=self.limit)
        if found:
            _list(found, console)
        else:
            console.print(
                f"No runs in {shown_uri(resolve_uri(self.tracking))} yet.",
                soft_wrap=True,
                highlight=False,
                markup=False,
            )
        return 0


def _list(runs: Sequence[TrackedRun], console: Console) -> None:
    now = time.time()
    _print_table(
        console,
        ("id", "kind", "name", "dataset", "key metrics", "status", "age", "command"),
        [
            (
                entry.id[:SHORT_ID] if console.is_terminal else entry.id,
                entry.kind,
                entry.name,
                entry.dataset or "",
                _key_metrics(entry.metrics),
                entry.status,
                duration(now - entry.started),
                entry.command or "",
            )
            for entry in runs
        ],
        cut_last=True,
    )


def _compare(runs: Sequence[TrackedRun], console: Console) -> None:
    head = [entry.id[:SHORT_ID] for entry in runs]
    names = ("run", *(f"{entry.name} ({short})" for entry, short in zip(runs, head, strict=True)))
    two = len(runs) == 2
    about = differences(
        [{"kind": entry.kind, "dataset": entry.dataset, "status": entry.status} for entry in runs]
    )
    params = differences([entry.params for entry in runs])
    metrics = differences([entry.metrics for entry in runs])
    rows = [(key, *map(_text, row)) for key, row in about.items()]
    rows += [(key, *map(_text, row)) for key, row in params.items()]
    table = [(*row, "") for row in rows] if two else rows
    # Overall metrics before those of single classes.
    for key in sorted(metrics, key=lambda name: ("/" in name, name)):
        row = metrics[key]
        known = [value for value in row if value is not None]
        change = (_figure(key, row[1] - row[0], sign=True) if len(known) == 2 else "",) if two else ()
        table.append((key, *(_figure(key, value) for value in row), *change))
    if table:
        _print_table(console, (*names, "difference") if two else names, table)
    num_params = len(set().union(*(entry.params for entry in runs)))
    num_metrics = len(set().union(*(entry.metrics for entry in runs)))
    console.print(
        f"Different: {len(params)} of {num_params} parameters, {len(metrics)} of {num_metrics} metrics.",
        soft_wrap=True,
        highlight=False,
    )


def _key_metrics(metrics: Mapping[str, float]) -> str:
    shown = [f"{key} {_figure(key, metrics[key])}" for key in KEY_METRICS if key in metrics]
    return ", ".join(shown[:SHOWN_METRICS])


def _figure(key: str, value: float | None, *, sign: bool = False) -> str:
    """A metric as people read it: shares, which MLflow has as fractions of 1, in percent."""
    if value is not None and is_share(key):
        return f"{percent(value, sign=sign)} {'points' if sign else '%'}"
    return f"{value:+.4g}" if sign and value is not None else _text(value)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) >= 10 else f"{value:.4g}"
    return str(value)


def _print_table(
    console: Console, head: Sequence[str], rows: Sequence[Sequence[str]], *, cut_last: bool = False
) -> None:
    """Print a table; on a terminal, ``cut_last`` fits the last column to the width left, or drops it."""
    if not console.is_terminal:
        for row in (head, *rows):
            # Not through rich, which would turn tabs into spaces.
            print("\t".join(" ".join(cell.split()) for cell in row), file=console.file)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in head:
        table.add_column(column, overflow="fold")
    if cut_last:
        widths = (max(map(len, column)) for column in list(zip(head, *rows, strict=True))[:-1])
        room = console.width - sum(widths) - 3 * len(head)
        if room < MIN_LAST:
            table.columns.pop()
            rows = [row[:-1] for row in rows]
        else:
            rows = [
                (*row[:-1], row[-1] if len(row[-1]) <= room else row[-1][: room - 1] + "…") for row in rows
            ]
    for row in rows:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console.print(table)
