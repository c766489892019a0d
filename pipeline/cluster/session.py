"""Ray for a run: start or join a cluster, and share its processors out among the stages."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.cluster.local_ray import few_processes
from pipeline.cluster.replaced import replaced
from pipeline.cluster.signals import signals_held
from pipeline.table.lease import RUN_ID_VARIABLE, end_orphans

LOCAL_SLOTS = 8
"""Logical CPUs of a local Ray at least. They are scheduling slots, not cores: with as many as a small
machine has cores, the stages' minimum needs more than there is, and Ray Data waits for ever in silence."""

MOST_CALLS = 4
"""Calls in one process at most: beyond that Python's lock and a crash would cost more than a process."""

_UNFUSED = 0.001
"""What CPU actors ask for beyond their share. Ray Data would run stages of equal demands in one process."""

WORKER_MALLOC = {
    "GLIBC_TUNABLES": ":".join(
        f"glibc.malloc.{name}={value}"
        for name, value in (("hugetlb", 1), ("mmap_threshold", 1 << 30), ("trim_threshold", 2 << 30))
    )
}
"""For processes that compute on a CPU. glibc would give large tensors back to the system at once and get them
anew page by page for the next image: a fifth of a ViT-B/16's time, and more with larger images. From 2.35 on
it asks for large pages (``hugetlb``), of which there are few to get. Tunables that are set stay."""

NODES_WAIT_S = 300.0
"""How long a run waits for a cluster's worker nodes to join: booting a cloud machine takes minutes."""


@dataclass(frozen=True)
class Compute:
    """How a run uses the cluster.

    Attributes:
        actors: CLIP actors, a fixed pool: one a GPU, or on CPUs as many as keep all cores busy.
        calls: parts that an actor labels at a time. Several calls in one process share one import and one
            model, which is what start-up and memory consist of.
        gpus: GPUs of each actor.
        cpus: logical CPUs of each actor.
        threads: CPU threads of each call; actors x calls x threads never exceed the cores.
        decoders: concurrent fetch-and-decode tasks.
        writers: concurrent encode-and-write tasks.
        task_cpus: logical CPUs of each such task.
        local: whether the run has a Ray of its own on this machine.
    """

    actors: int
    calls: int
    gpus: float
    cpus: float
    threads: int
    decoders: int
    writers: int
    task_cpus: float
    local: bool

    @property
    def needed_cpus(self) -> float:
        """Logical CPUs without which the pipeline cannot move: the pool, and one task of each other stage."""
        return self.actors * self.cpus + 2 * self.task_cpus


def plan_compute(nodes: Sequence[tuple[float, float]], *, cores: int | None) -> Compute:
    """Share out what a cluster has.

    Args:
        nodes: (logical CPUs, GPUs) of each node that is alive.
        cores: real cores of this machine if Ray was started here for this run alone, else None: on a
            cluster the logical CPUs stand for cores.

    Raises:
        MaskMillError: ``cluster_too_small`` if the stages' minimum exceeds the cluster, which would wait
            for ever.
    """
    cpus, gpus = sum(node[0] for node in nodes), int(sum(node[1] for node in nodes))
    share = 1.0 if cores is None and cpus >= gpus + 4 else 0.5
    if gpus:
        # Decoding is what starves GPUs: all CPUs that the actors leave, a quarter of them for encoding.
        left = max(2, int((cores or cpus) - gpus * share))
        writers = max(1, left // 4)
        plan = Compute(gpus, 1, 1.0, share, 1, max(1, left - writers), writers, share, cores is not None)
    else:
        # Single-threaded calls never wait for one another; with many cores memory asks for fewer and wider.
        smallest = min((node[0] for node in nodes if node[0] >= 1), default=0)
        threads = 4 if smallest > 8 and (cores is None or cores > 8) else 1
        tasks = max(1, int(cores or cpus) // 4)
        if cores is not None:
            streams = max(1, cores // threads)
            # As many cores as can be filled, with as few processes as that allows.
            calls = max(range(1, MOST_CALLS + 1), key=lambda c: (streams // c * c, c))
            actors = max(1, streams // calls)
        else:
            # Of a foreign cluster's nodes only the sizes are known: small actors fit in anywhere.
            calls = 1
            room = sum(
                int((node[0] - share) // (share * threads + _UNFUSED)) for node in nodes if node[0] >= 1
            )
            actors = max(1, min(int((cpus - 2 * share) * 0.9) // threads, room))
        plan = Compute(
            actors,
            calls,
            0.0,
            share * threads * calls + _UNFUSED,
            threads,
            tasks,
            tasks,
            share,
            cores is not None,
        )
    homeless = not gpus and plan.cpus > max((node[0] for node in nodes), default=0)
    stranded = sum(1 for node in nodes if node[0] < node[1] * plan.cpus)
    if plan.needed_cpus > cpus or homeless or (gpus and stranded):
        raise WrongUse(
            "cluster_too_small",
            f"The stages need {plan.needed_cpus:g} CPUs at once ({plan.actors} CLIP actors, one decoder, one "
            f"writer); the cluster has {cpus:g} on {len(nodes)} node(s)"
            + (
                f", and {stranded} node(s) have GPUs without CPUs to drive them."
                if gpus and stranded
                else "."
            ),
            "Add CPUs: 4 to 16 for each GPU are sensible.",
        )
    return plan


P = TypeVar("P", covariant=True)


class Plan(Protocol[P]):
    """How a run shares out what a cluster has; see ``plan_compute``."""

    def __call__(self, nodes: Sequence[tuple[float, float]], *, cores: int | None) -> P:
        """Raises ``cluster_too_small`` where more nodes are needed."""
        ...


def joins_cluster(address: str | None) -> bool:
    """Whether ``ray_session`` joins a cluster, by its argument or the environment, and starts no Ray here."""
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
    """Ray for the time of one run: the cluster that the environment names, or one of its own.

    Args:
        run_id: marks every process of the run in its environment (``pipeline.table.lease.end_orphans``).
        address: of a cluster; None joins the one that ``RAY_ADDRESS`` names (as within ``ray job submit``),
            and starts a local one otherwise.
        verbose: let Ray talk.
        notice: told what is being waited for.
        plan: what is made of the nodes, and yielded.

    Raises:
        MaskMillError: ``cluster_unreachable``, or ``cluster_too_small`` if not enough nodes have joined a
            cluster after ``NODES_WAIT_S``.
    """
    # Worker processes started ahead of need cost a core-second each, which counts on a laptop.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    os.environ.setdefault("RAY_enable_worker_prestart", "0")
    for name, value in WORKER_MALLOC.items():
        os.environ.setdefault(name, value)
    if not verbose:
        # Among what it prints below "fatal" is, in every run, a warning about the arguments of pool actors.
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ[RUN_ID_VARIABLE] = run_id
    address = address or os.environ.get("RAY_ADDRESS")
    local = not joins_cluster(address)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        with signals_held():
            _begin_ray(None if local else address, run_id, slots=max(LOCAL_SLOTS, 2 * cores), verbose=verbose)
            stack.callback(_end_ray)
        yield plan(_nodes(), cores=cores) if local else _plan_when_joined(plan, notice)


def _begin_ray(address: str | None, run_id: str, *, slots: int, verbose: bool) -> None:
    """Join the cluster at an address, or start a Ray of this machine's own."""
    import ray

    talk: dict[str, Any] = {
        "logging_level": logging.INFO if verbose else logging.ERROR,
        "log_to_driver": verbose,
    }
    try:
        with contextlib.nullcontext() if verbose else _quiet_stderr(), _own_signals():
            if address is not None:
                ray.init(address, **talk)
                return
            try:
                with few_processes(logs=verbose):
                    ray.init("local", num_cpus=slots, include_dashboard=False, **talk)
            except BaseException:
                # There may be processes that Ray has yet to hear of.
                end_orphans(run_id)
                raise
    except (RuntimeError, ValueError, OSError) as error:
        raise FailedWork(
            "cluster_unreachable",
            f"Ray could not be started or reached{f' at {address}' if address else ''}: {error}",
            "Check --address (or RAY_ADDRESS), or leave it out to run on this machine alone.",
        ) from error


def _end_ray() -> None:
    import ray

    with signals_held():
        ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep Ray from taking SIGTERM: its handler ends the process wherever it is, without a word.

    Ray has no setting for this, so a name of ``ray==2.60.0`` is replaced; a test tells when it has another.
    """
    from ray._private import utils

    with replaced(utils, set_sigterm_handler=lambda _handler: None):
        yield


def _nodes() -> list[tuple[float, float]]:
    """(logical CPUs, GPUs) of each node that is alive."""
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive]


def _plan_when_joined(plan: Plan[P], notice: Callable[[str], None]) -> P:
    """The plan of a cluster, whose nodes may still be booting: a head alone has no CPUs for work."""
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
            # A task that waits for a processor is what an autoscaler starts nodes for.
            wanted = ray.remote(num_cpus=1)(lambda: None).remote()
        time.sleep(1)
    if wanted is not None:
        ray.cancel(wanted, force=True)
    return planned


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drop what is written to standard error meanwhile, by compiled code as well; exceptions still rise."""
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
    """``models.device.native_precision`` of a machine that will do the work; that need not be this one."""
    import ray

    @ray.remote(num_cpus=compute.task_cpus, num_gpus=compute.gpus, max_retries=3)
    def ask() -> str:
        from models.device import best_device, native_precision

        return native_precision(best_device())

    answer: str = ray.get(ask.remote())
    return answer
