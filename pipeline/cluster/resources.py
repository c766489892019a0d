"""How a labelling run divides a machine or a cluster among its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import WrongUse

MOST_CALLS = 4
"""Most concurrent calls in one process. With more, GIL contention and the cost of a crash outweigh the
start-up time and memory of another process."""

_UNFUSED = 0.001
"""CPU actors request slightly more than their share: Ray Data would fuse stages with equal requests."""


@dataclass(frozen=True)
class Compute:
    """How a run uses the cluster.

    Attributes:
        actors: size of the pool of CLIP actors: one per GPU, or on CPUs enough to keep all cores busy.
        calls: parts that an actor labels concurrently. Calls in one process share the imports and the model,
            which account for most of its start-up time and memory.
        gpus: GPUs of each actor.
        cpus: logical CPUs of each actor.
        threads: CPU threads of each call; actors x calls x threads never exceeds the number of cores.
        decoders: concurrent fetch-and-decode tasks.
        writers: concurrent encode-and-write tasks.
        task_cpus: logical CPUs of each decoder or writer task.
    """

    actors: int
    calls: int
    gpus: float
    cpus: float
    threads: int
    decoders: int
    writers: int
    task_cpus: float

    @property
    def needed_cpus(self) -> float:
        """Minimum logical CPUs to make progress: the pool, one decoder and one writer."""
        return self.actors * self.cpus + 2 * self.task_cpus


def plan_compute(nodes: Sequence[tuple[float, float]], *, cores: int | None) -> Compute:
    """Divide the CPUs and GPUs of a cluster among the stages.

    Args:
        nodes: (logical CPUs, GPUs) of each live node.
        cores: physical cores of this machine if this run started its own Ray, else None: on a cluster,
            logical CPUs count as cores.

    Raises:
        MaskMillError: ``cluster_too_small`` if the stages would wait forever for CPUs.
    """
    cpus, gpus = sum(node[0] for node in nodes), int(sum(node[1] for node in nodes))
    share = 1.0 if cores is None and cpus >= gpus + 4 else 0.5
    if gpus:
        plan = _plan_gpus(gpus, cores or cpus, share)
    elif cores is not None:
        plan = _plan_local_cpus(cores, share)
    else:
        plan = _plan_cluster_cpus(nodes, share)
    too_large = not gpus and plan.cpus > max((node[0] for node in nodes), default=0)
    stranded = sum(1 for node in nodes if node[0] < node[1] * plan.cpus) if gpus else 0
    if plan.needed_cpus > cpus or too_large or stranded:
        idle = f", and {stranded} node(s) have GPUs without CPUs to drive them" if stranded else ""
        raise WrongUse(
            "cluster_too_small",
            f"The stages need {plan.needed_cpus:g} CPUs at once ({plan.actors} CLIP actors, one decoder, one "
            f"writer); the cluster has {cpus:g} on {len(nodes)} node(s){idle}.",
            "Add CPUs: 4 to 16 for each GPU are sensible.",
        )
    return plan


def _plan_gpus(gpus: int, cpus: float, share: float) -> Compute:
    # Slow decoding starves GPUs: it gets three quarters of the remaining CPUs, encoding a quarter.
    left = max(2, int(cpus - gpus * share))
    writers = max(1, left // 4)
    return Compute(
        actors=gpus,
        calls=1,
        gpus=1.0,
        cpus=share,
        threads=1,
        decoders=max(1, left - writers),
        writers=writers,
        task_cpus=share,
    )


def _plan_local_cpus(cores: int, share: float) -> Compute:
    # Single-threaded calls never wait for each other; on many cores, fewer but wider calls save memory.
    threads = 4 if cores > 8 else 1
    streams = max(1, cores // threads)
    # Fill as many cores as possible, with as few processes as possible.
    calls = max(range(1, MOST_CALLS + 1), key=lambda count: (streams // count * count, count))
    return _on_cpus(max(1, streams // calls), calls, threads, tasks=max(1, cores // 4), share=share)


def _plan_cluster_cpus(nodes: Sequence[tuple[float, float]], share: float) -> Compute:
    # Only the nodes' sizes are known, and small actors fit on any node.
    cpus = sum(node[0] for node in nodes)
    usable = [node[0] for node in nodes if node[0] >= 1]
    threads = 4 if min(usable, default=0) > 8 else 1
    room = sum(int((size - share) // (share * threads + _UNFUSED)) for size in usable)
    actors = max(1, min(int((cpus - 2 * share) * 0.9) // threads, room))
    return _on_cpus(actors, 1, threads, tasks=max(1, int(cpus) // 4), share=share)


def _on_cpus(actors: int, calls: int, threads: int, *, tasks: int, share: float) -> Compute:
    return Compute(
        actors=actors,
        calls=calls,
        gpus=0.0,
        cpus=share * threads * calls + _UNFUSED,
        threads=threads,
        decoders=tasks,
        writers=tasks,
        task_cpus=share,
    )
