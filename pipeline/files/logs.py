"""Lines in the logs of worker processes that say which run they belong to."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s run %(run)s %(message)s"


def run_log(run_id: str) -> logging.LoggerAdapter[logging.Logger]:
    """The log of a run in this process: to standard error, which Ray keeps in a file for each worker.

    Several runs may use a process, one after the other, or a worker of a cluster that is shared: so the id is
    in every line, as the first line of the command, ``status.json`` and ``lease.json`` have it.
    """
    logger = logging.getLogger("maskmill.run")
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logging.LoggerAdapter(logger, {"run": run_id})
