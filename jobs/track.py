"""``maskmill track``: the runs that have not reached their tracking server yet."""

from __future__ import annotations

import time

from rich.console import Console

from jobs.console import duration
from pipeline.tracking.flush import SpooledRun, flush, spooled_runs

EXIT_KEPT = 1


def run(*, send: bool, tracking: str | None = None, console: Console | None = None) -> int:
    """List what waits in the spool, or send it.

    Args:
        send: send (``--flush``); else only list.
        tracking: where to, instead of where each run was meant to go.
        console: where to say so.

    Returns:
        1 if something could not be sent, else 0.

    Raises:
        MaskMillError: ``tracking_uri``.
    """
    console = console or Console()
    if not send:
        waiting = spooled_runs()
        for entry in waiting:
            _say(console, entry)
        if any(entry.state == "waiting" for entry in waiting):
            _print(console, "Send them with: maskmill track --flush")
        elif not waiting:
            _print(console, "Nothing waits to be sent.")
        return 0
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


def _say(console: Console, entry: SpooledRun) -> None:
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
