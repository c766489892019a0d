"""Sending what runs have left in the spool."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.tracking.destination import FLUSH_TIMEOUT_S, set_limits, shown_uri, with_credentials
from pipeline.tracking.sender import Gone, Sender, reason
from pipeline.tracking.spool import Event, Journal, opening, pending

State = Literal["waiting", "running", "sent", "kept", "gone"]
PAUSES_S = (0.5, 1.5)
"""Between the attempts at one server."""


@dataclass(frozen=True)
class SpooledRun:
    """A run in the spool.

    Attributes:
        name: of the run.
        experiment: of the run.
        uri: where it goes, without secrets.
        folder: where it is kept.
        started: seconds since the epoch.
        state: ``waiting`` to be sent; ``running``: its process or another flush holds it; ``sent``;
            ``kept``: could not be sent; ``gone``: it was deleted in MLflow, so its rest was dropped.
        detail: why it was kept, or what was refused.
    """

    name: str
    experiment: str
    uri: str
    folder: Path
    started: float
    state: State
    detail: str = ""


def spooled_runs() -> list[SpooledRun]:
    """What lies in the spool, oldest first; sends nothing."""
    runs = []
    for folder in pending():
        event = opening(folder)
        if event is None:
            continue
        journal = Journal.take(folder)
        if journal is not None:
            journal.close()
        runs.append(_describe(folder, event, "running" if journal is None else "waiting"))
    return runs


def flush(uri: str | None = None) -> Iterator[SpooledRun]:
    """Send every run of the spool whose process has ended; yields each with what became of it.

    Can be cut off and repeated at any time: nothing arrives twice.

    Args:
        uri: where to send, instead of where each run was meant to go.

    Raises:
        MaskMillError: ``tracking_uri``.
    """
    set_limits(FLUSH_TIMEOUT_S)
    unreachable: dict[tuple[str, str], str] = {}
    for folder in pending():
        event = opening(folder)
        if event is None:
            continue
        target = with_credentials(event["uri"], uri)
        place = (target, event["experiment"])
        journal = Journal.take(folder)
        if journal is None:
            yield _describe(folder, event, "running")
            continue
        try:
            if place in unreachable:
                yield _describe(folder, event, "kept", unreachable[place])
                continue
            sender = Sender(journal, target)
            try:
                _send(sender)
            except Gone as error:
                journal.discard()
                yield _describe(folder, event, "gone", str(error))
            except Exception as error:  # every way in which a server can be away
                unreachable[place] = reason(error)
                yield _describe(folder, event, "kept", reason(error))
            else:
                journal.discard()
                yield _describe(folder, event, "sent", "; ".join(sender.refused))
        finally:
            journal.close()


def _send(sender: Sender) -> None:
    for pause in (*PAUSES_S, None):
        try:
            sender.send(died=True)
            return
        except Gone:
            raise
        except Exception:
            if pause is None:
                raise
            time.sleep(pause)


def _describe(folder: Path, event: Event, state: State, detail: str = "") -> SpooledRun:
    return SpooledRun(
        event["name"],
        event["experiment"],
        shown_uri(event["uri"]),
        folder,
        event["time"] / 1000,
        state,
        detail,
    )
