"""The nodes of a Ray cluster: which there are, what a run plans for them, and what changes meanwhile."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

from models.errors import MaskMillError, WrongUse
from pipeline.cluster.resources import Compute, plan_compute

NODES_WAIT_S = 300.0
"""Time for a cluster's worker nodes to join: a cloud machine takes minutes to boot."""

LOOK_S = 5.0
"""How often a run looks at the nodes."""

STALL_S = 30.0
"""A run that lost nodes continues as it is while something is finished within this time."""

JOIN_S = 60.0
"""Nodes that join are used once they have been there for this time: others may follow them."""

WORTH = 1.25
"""Starting all workers anew pays if there are this many times as many."""

SILENCE_S = 60.0
"""After this time without a finished part, the user is told."""

P = TypeVar("P", covariant=True)


class Plan(Protocol[P]):
    """How a run divides a cluster; see ``pipeline.cluster.resources.plan_compute``."""

    def __call__(self, nodes: Sequence[tuple[float, float]], *, cores: int | None) -> P:
        """Raises ``cluster_too_small`` if the nodes do not suffice."""
        ...


def live_nodes() -> list[tuple[float, float]]:
    """(logical CPUs, GPUs) of each live node."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def plan_when_joined(plan: Plan[P], notice: Callable[[str], None]) -> P:
    """Wait for the nodes of a cluster that may still be booting, and return the plan for them.

    Raises:
        MaskMillError: ``cluster_too_small`` after ``NODES_WAIT_S``; what else the plan raises, at once.
    """
    import ray

    deadline = time.monotonic() + NODES_WAIT_S
    wanted = None
    while True:
        try:
            planned = plan(live_nodes(), cores=None)
            break
        except MaskMillError as error:
            if error.code != "cluster_too_small" or time.monotonic() > deadline:
                raise
        if wanted is None:
            notice("waiting for the cluster's worker nodes")
            # A pending task makes an autoscaler start nodes.
            wanted = ray.remote(num_cpus=1)(lambda: None).remote()
        time.sleep(1)
    if wanted is not None:
        ray.cancel(wanted, force=True)
    return planned


def plan_like(planned: Compute) -> Plan[Compute]:
    """Plans like ``plan_compute`` for the kind of hardware that a run began with, on which masks depend."""

    def plan(nodes: Sequence[tuple[float, float]], *, cores: int | None) -> Compute:
        if not planned.gpus:
            return plan_compute([(cpus, 0) for cpus, _ in nodes], cores=cores)
        best = plan_compute(nodes, cores=cores)
        if not best.gpus:
            raise WrongUse(
                "cluster_too_small",
                f"The run began on GPUs, and the cluster has none left on {len(nodes)} node(s).",
                "Add GPU nodes, and run the same command again: finished work is kept.",
            )
        return best

    return plan


class NodesChanged(Exception):
    """The nodes are no longer those that a run was planned for."""


class NodeWatch:
    """Watches, in a thread, whether a cluster is still the one that a run was planned for.

    Ray Data places actors and tasks by a plan that is made once: after the loss of a node, what is left may
    be too little for all of them, and everything would wait forever.

    Args:
        planned: the plan of the run.
        notice: called with what the user should know.

    Attributes:
        reasons: empty until the run should be planned anew.
    """

    def __init__(self, planned: Compute, notice: Callable[[str], None]) -> None:
        self.reasons: list[str] = []
        self._planned = planned
        self._notice = notice
        self._finished_at = time.monotonic()
        self._grown_at: float | None = None
        self._told = False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="nodes", daemon=True)

    def __enter__(self) -> NodeWatch:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def part_finished(self) -> None:
        """Record that the run moves."""
        self._finished_at = time.monotonic()
        self._told = False

    def _run(self) -> None:
        while not self._end.wait(LOOK_S) and not self.reasons:
            self.look(live_nodes(), time.monotonic())

    def look(self, nodes: Sequence[tuple[float, float]], now: float) -> None:
        """Compare the plan with the one for these nodes, at a time of ``time.monotonic``."""
        try:
            best: Compute | None = plan_like(self._planned)(nodes, cores=None)
        except MaskMillError:
            best = None
        idle = now - self._finished_at
        planned = self._planned
        lost = best is None or _streams(best) < _streams(planned) or best.decoders < planned.decoders
        grown = best is not None and _streams(best) >= WORTH * _streams(planned)
        if not grown:
            self._grown_at = None
        elif self._grown_at is None:
            self._grown_at = now
        if self._grown_at is not None and now - self._grown_at >= JOIN_S:
            self.reasons.append("nodes have joined the cluster")
        elif lost and idle >= STALL_S:
            self.reasons.append("the cluster has lost nodes")
        elif idle >= SILENCE_S and not self._told:
            self._told = True
            self._notice(f"nothing was finished in the last {idle:.0f} s; {_free(nodes)}")


def _streams(compute: Compute) -> int:
    return compute.actors * compute.calls


def _free(nodes: Sequence[tuple[float, float]]) -> str:
    import ray

    free: dict[str, Any] = ray.available_resources()
    kinds = {"CPU": sum(cpus for cpus, _ in nodes), "GPU": sum(gpus for _, gpus in nodes)}
    parts = [f"{free.get(kind, 0.0):.3g} of {total:g} {kind}s" for kind, total in kinds.items() if total]
    return f"free: {' and '.join(parts) or 'nothing'}, on {len(nodes)} node(s)"


def stop_when_changed(reasons: list[str]) -> type:
    """Return a class for ``DataContext.custom_execution_callback_classes``: ends an execution of Ray Data.

    Ray Data calls it at each step of its scheduling loop, which runs even if no task can.

    Args:
        reasons: of a ``NodeWatch``.
    """

    # Ray Data makes deep copies of its context. They share a class, but would not share an object.
    class StopWhenChanged:
        """Raises ``NodesChanged`` once there is a reason. The other methods are part of Ray's interface."""

        def before_execution_starts(self, executor: Any) -> None: ...

        def on_execution_step(self, executor: Any) -> None:
            if reasons:
                raise NodesChanged(reasons[0])

        def after_execution_succeeds(self, executor: Any) -> None: ...

        def after_execution_fails(self, executor: Any, error: Exception) -> None: ...

    return StopWhenChanged
