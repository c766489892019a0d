"""``maskmill track``: list or send the runs that have not reached their tracking server."""

from __future__ import annotations

import time
from dataclasses import dataclass

from rich.console import Console

from jobs.console import duration
from jobs.options import Flag, Maybe
from pipeline.tracking.sender import UnsentRun, flush, unsent_runs

EXIT_KEPT = 1


@dataclass(frozen=True, kw_only=True)
class Track:
    """List the runs that did not reach their tracking server, or send them with --flush.

    Attributes:
        flush: send them now.
        tracking: send them to this MLflow URI instead of their own.
    """

    flush: Flag = False
    tracking: Maybe[str] = None

    def run(self, console: Console | None = None) -> int:
        """List the waiting runs, or send them.

        Returns:
            1 if a run could not be sent, else 0.

        Raises:
            MaskMillError: ``wrong_use``.
        """
        console = console or Console()
        return _send(self.tracking, console) if self.flush else _list(console)


def _list(console: Console) -> int:
    waiting = unsent_runs()
    for entry in waiting:
        _say(console, entry)
    if any(entry.state == "waiting" for entry in waiting):
        _print(console, "Send them with: maskmill track --flush")
    elif not waiting:
        _print(console, "Nothing waits to be sent.")
    return 0


def _send(tracking: str | None, console: Console) -> int:
    counts = {"sent": 0, "kept": 0, "gone": 0, "running": 0}
    for entry in flush(tracking):
        counts[entry.state] += 1
        _say(console, entry)
    if not any(counts.values()):
        _print(console, "Nothing waits to be sent.")
    if counts["kept"]:
        _print(console, f"{counts['kept']} could not be sent and are kept; try again later.")
        return EXIT_KEPT
    return 0


def _say(console: Console, entry: UnsentRun) -> None:
    what = f"{entry.experiment}/{entry.name} of {duration(time.time() - entry.started)} ago"
    detail = f": {entry.detail}" if entry.detail else ""
    text = {
        "waiting": f"waiting   {what}, for {entry.uri}, in {entry.folder}",
        "running": f"running   {what}, for {entry.uri}: its process or another flush is at work on it",
        "sent": f"sent      {what} to {entry.uri}{f' (refused there{detail})' if detail else ''}",
        "kept": f"kept      {what}, for {entry.uri}{detail}",
        "gone": f"dropped   {what}{detail}",
    }[entry.state]
    _print(console, text)


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
