"""How a labelling run shares out a machine or a cluster among its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import WrongUse

MOST_CALLS = 4
"""Most concurrent calls in one process: beyond that, contention for the interpreter lock and the cost of a
crash outweigh the start-up and memory of another process."""

_UNFUSED = 0.001
"""CPU actors ask for slightly more than their share, because Ray Data fuses stages that ask for the same."""


@dataclass(frozen=True)
class Compute:
    """How a run uses the cluster.

    Attributes:
        actors: CLIP actors, a fixed pool: one a GPU, or on CPUs as many as keep all cores busy.
        calls: parts that an actor labels at a time. Calls in one process share the imports and the model,
            which are most of its start-up time and memory.
        gpus: GPUs of each actor.
        cpus: logical CPUs of each actor.
        threads: CPU threads of each call; actors x calls x threads never exceed the cores.
        decoders: concurrent fetch-and-decode tasks.
        writers: concurrent encode-and-write tasks.
        task_cpus: logical CPUs of each such task.
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
        """The fewest logical CPUs that keep the stages moving: the pool, one decoder and one writer."""
        return self.actors * self.cpus + 2 * self.task_cpus


def plan_compute(nodes: Sequence[tuple[float, float]], *, cores: int | None) -> Compute:
    """Share out what a cluster has.

    Args:
        nodes: (logical CPUs, GPUs) of each live node.
        cores: real cores of this machine if Ray was started here for this run alone, else None: on a
            cluster the logical CPUs stand for cores.

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
    # Decoding is what starves GPUs: it gets the CPUs that the actors leave, but for a quarter, which encodes.
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
    # Single-threaded calls never wait for one another; with many cores, memory asks for fewer and wider ones.
    threads = 4 if cores > 8 else 1
    streams = max(1, cores // threads)
    # As many cores as can be filled, with as few processes as that allows.
    calls = max(range(1, MOST_CALLS + 1), key=lambda count: (streams // count * count, count))
    return _on_cpus(max(1, streams // calls), calls, threads, tasks=max(1, cores // 4), share=share)


def _plan_cluster_cpus(nodes: Sequence[tuple[float, float]], share: float) -> Compute:
    # All that is known of a cluster's nodes is their size: small actors fit in anywhere.
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
