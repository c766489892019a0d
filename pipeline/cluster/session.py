"""A Ray session for one run: join a cluster, or start a local one, and shut it down afterwards."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from models.errors import FailedWork, MaskMillError
from pipeline.cluster.resources import Compute, plan_compute
from pipeline.cluster.signals import handlers_kept, signals_held
from pipeline.table.lease import RUN_ID_VARIABLE, end_orphans

LOCAL_SLOTS = 8
"""Minimum number of logical CPUs of a local Ray. They are scheduling slots, not cores: on a small machine,
one slot per core would be too few, and the stages would deadlock."""

WORKER_MALLOC = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in (("hugetlb", 1), ("mmap_threshold", 1 << 30), ("trim_threshold", 2 << 30))
    )
}
"""Environment of processes that compute on a CPU; the user's own tunables take precedence. By default, glibc
returns the memory of large tensors to the system at once, and the next image faults it in again page by page,
which takes a fifth of the time of a ViT-B/16. See "Memory Allocation Tunables" in the glibc manual;
``hugetlb`` needs glibc 2.35."""

NODES_WAIT_S = 300.0
"""Time for a cluster's worker nodes to join: a cloud machine takes minutes to boot."""

REACH_S = 20.0
"""Timeout for connecting to a cluster."""

P = TypeVar("P", covariant=True)


class Plan(Protocol[P]):
    """How a run divides a cluster; see ``pipeline.cluster.resources.plan_compute``."""

    def __call__(self, nodes: Sequence[tuple[float, float]], *, cores: int | None) -> P:
        """Raises ``cluster_too_small`` if the nodes do not suffice."""
        ...


def joins_cluster(address: str | None) -> bool:
    """Whether ``ray_session`` joins a cluster, given by its argument or by ``RAY_ADDRESS``."""
    return (address or os.environ.get("RAY_ADDRESS")) not in (None, "", "local")


@contextlib.contextmanager
def ray_session(
    run_id: str,
    *,
    address: str | None,
    verbose: bool,
    notice: Callable[[str], None] = lambda _text: None,
    plan: Plan[Any] = plan_compute,
) -> Iterator[Any]:
    """Join or start Ray for one run, and yield the plan for its nodes.

    Args:
        run_id: set in the environment of every process of the run (``pipeline.table.lease.end_orphans``).
        address: of a cluster; None joins the one in ``RAY_ADDRESS`` (set within ``ray job submit``), else
            starts a local one.
        verbose: show Ray's log.
        notice: called with what the run is waiting for.
        plan: makes the yielded plan from the nodes.

    Raises:
        MaskMillError: ``cluster_unreachable``; ``cluster_too_small`` if too few nodes have joined a cluster
            after ``NODES_WAIT_S``.
    """
    # Each prestarted worker process costs a core-second, which is a lot on a laptop.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    for name, value in WORKER_MALLOC.items():
        os.environ.setdefault(name, value)
    if not verbose:
        # At lower levels, every run prints a warning about the arguments of pool actors.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ[RUN_ID_VARIABLE] = run_id
    local = not joins_cluster(address)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    where: dict[str, Any] = (
        {"address": "local", "num_cpus": max(LOCAL_SLOTS, 2 * cores), "include_dashboard": False}
        if local
        else {"address": address or os.environ["RAY_ADDRESS"]}
    )
    with contextlib.ExitStack() as stack:
        with signals_held():
            _begin_ray(where, run_id, local=local, verbose=verbose)
            stack.callback(_end_ray)
        yield plan(_nodes(), cores=cores) if local else _plan_when_joined(plan, notice)


def _reach(address: str) -> None:
    """Fail at once if nothing listens at ``host:port``: Ray itself retries for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()


def _begin_ray(where: dict[str, Any], run_id: str, *, local: bool, verbose: bool) -> None:
    import ray

    level = logging.INFO if verbose else logging.ERROR
    try:
        with contextlib.nullcontext() if verbose else _quiet_stderr(), handlers_kept():
            if not local:
                _reach(where["address"])
            ray.init(**where, logging_level=level, log_to_driver=verbose)
    except BaseException as error:
        if local:
            # An interrupted start may leave processes that Ray does not know of yet.
            end_orphans(run_id)
        if isinstance(error, SystemExit):  # raised by Ray's own SIGTERM handler
            raise KeyboardInterrupt from error
        if not isinstance(error, Exception):
            raise
        # Ray raises a plain Exception when its processes take too long to start.
        at = "" if local else f" at {where['address']}"
        raise FailedWork(
            "cluster_unreachable",
            f"Ray could not be started or reached{at}: {error}",
            "If this machine is busy, try again later."
            if local
            else "Check --address (or RAY_ADDRESS), or leave it out to run on this machine alone.",
        ) from error


def _end_ray() -> None:
    import ray

    with signals_held():
        ray.shutdown()


def _nodes() -> list[tuple[float, float]]:
    """(logical CPUs, GPUs) of each live node."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def _plan_when_joined(plan: Plan[P], notice: Callable[[str], None]) -> P:
    """Wait for the nodes of a cluster that may still be booting, and return the plan for them."""
    import ray

    deadline = time.monotonic() + NODES_WAIT_S
    wanted = None
    while True:
        try:
            planned = plan(_nodes(), cores=None)
            break
        except MaskMillError:
            if time.monotonic() > deadline:
                raise
        if wanted is None:
            notice("waiting for the cluster's worker nodes")
            # A pending task makes an autoscaler start nodes.
            wanted = ray.remote(num_cpus=1)(lambda: None).remote()
        time.sleep(1)
    if wanted is not None:
        ray.cancel(wanted, force=True)
    return planned


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Discard writes to standard error, including those of compiled code."""
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def worker_precision(compute: Compute) -> str:
    """``models.device.native_precision`` of a worker machine, which may differ from this one."""
    import ray

    @ray.remote(num_cpus=compute.task_cpus, num_gpus=compute.gpus, max_retries=3)
    def ask() -> str:
        from models.device import best_device, native_precision

        return native_precision(best_device())

    answer: str = ray.get(ask.remote())
    return answer
