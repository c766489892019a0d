"""Ray Data in a Ray that a run has for itself, without the processes that are for clusters.

Beside every flow Ray Data starts an actor that shares nodes out and asks for more, and one that gathers
statistics for the dashboard. A Ray on one machine has no more nodes, and none of ours a dashboard; but each
actor is a process that imports Ray Data, and work waits for the first: 1 to 2 s on 2 cores.

Ray has no setting for this, so names of ``ray==2.60.0`` are replaced; a test tells when another has others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
from ray.data._internal.execution import streaming_executor
from ray.data._internal.execution.interfaces import ExecutionResources

from pipeline.cluster.replaced import replaced


class FixedCluster(ClusterAutoscaler):
    """All that there is belongs to the one flow, and no more will come."""

    def __init__(self) -> None:
        self._total = ExecutionResources.from_resource_dict(ray.cluster_resources())

    def try_trigger_scaling(self) -> None:
        """There is nothing to ask."""

    def on_executor_shutdown(self) -> None:
        """There is nothing to give back."""

    def get_total_resources(self) -> ExecutionResources:
        return self._total


class _NoStatistics:
    """In place of Ray Data's ``_StatsManager``."""

    @staticmethod
    def register_dataset_to_stats_actor(*_args: Any, **_kwargs: Any) -> None:
        """Nobody looks."""

    @staticmethod
    def update_execution_metrics(*_args: Any, **_kwargs: Any) -> None:
        """Nobody looks."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Flows of this process that run meanwhile have the whole Ray, and start no such processes."""
    with replaced(
        streaming_executor,
        create_cluster_autoscaler=lambda *_args, **_kwargs: FixedCluster(),
        _StatsManager=_NoStatistics,
    ):
        yield
