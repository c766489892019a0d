"""The border of the commands: what stops one is told in words, with a remedy and without secrets."""

from __future__ import annotations

import os
import select
import sys
import traceback

from models.errors import FailedWork
from pipeline.files.faults import explain, one_line
from pipeline.files.redaction import redact

TRACEBACK = "MASKMILL_TRACEBACK"
"""Environment variable that shows the traceback of an error."""


def tell(error: Exception, *, detailed: bool = False) -> int:
    """Say on standard error what stopped a command and what to do about it, without secrets.

    No exception leaves a command as a traceback, unless that is asked for.

    Args:
        error: what the command raised.
        detailed: show the traceback as well, as ``MASKMILL_TRACEBACK`` does.

    Returns:
        The exit status.
    """
    told = explain(error) or FailedWork(
        "internal",
        f"This is a fault of MaskMill: {type(error).__name__}: {one_line(error)}",
        f"Please report it; -v, or {TRACEBACK}=1 in the environment, shows where it happened.",
    )
    if detailed or os.environ.get(TRACEBACK):
        print(redact("".join(traceback.format_exception(error)), assignments=False), file=sys.stderr)
    print(f"maskmill: {redact(str(told), assignments=False)}", file=sys.stderr)
    return told.exit_status


def stdout_closed() -> bool:
    """Whether the reader of standard output is gone (such as ``head``), rather than that of another pipe."""
    poll = select.poll()
    poll.register(sys.stdout, select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
