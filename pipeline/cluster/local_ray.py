"""A Ray on one machine for one run, without the processes that are for clusters.

Ray starts an autoscaler, a server for jobs and dashboard (for which its start waits), a process that collects
logs, and on every node an agent that serves metrics. Nobody asks them anything in a run that has its Ray for
itself, and on 2 cores they take 3 CPU seconds from it, at its very beginning.

Ray has no settings for this, so names of ``ray==2.60.0`` are replaced; a test tells when another has others.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from pipeline.cluster.replaced import replaced


@contextlib.contextmanager
def few_processes(*, logs: bool) -> Iterator[None]:
    """A ``ray.init`` meanwhile starts what runs tasks and actors, and little else.

    Args:
        logs: collect what workers print.
    """
    from ray._private import node, parameter, utils

    parameters = functools.partial(parameter.RayParams, no_monitor=True, include_log_monitor=logs)
    with (
        replaced(parameter, RayParams=parameters),
        replaced(node.Node, start_api_server=_without_api_server),
        # What the agent is told, and does without.
        replaced(utils, get_dashboard_dependency_error=lambda: ImportError("there is no dashboard")),
    ):
        yield


def _without_api_server(node: Any, **_options: Any) -> None:
    node._webui_url = None
