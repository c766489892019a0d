"""Resources of a training run: its workers, and the loader processes that feed them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from models.errors import WrongUse


@dataclass(frozen=True)
class TrainingCompute:
    """Resources of a training run.

    Attributes:
        workers: training processes; 0 trains in the driver's process.
        gpu: whether each of them has its own GPU.
        worker_cpus: logical CPUs per worker.
        threads: CPU threads per worker; 0 leaves the choice to torch.
        loaders: loader processes per worker; Ray does not account for them.
    """

    workers: int
    gpu: bool
    worker_cpus: float
    threads: int
    loaders: int


def plan_training(
    nodes: Sequence[tuple[float, float]], *, cores: int | None, workers: int | None
) -> TrainingCompute:
    """Divide the resources of a cluster, or of this machine, among workers.

    Args:
        nodes: (logical CPUs, GPUs) of each live node.
        cores: CPUs available to this process if Ray was started here for this run alone, else None.
        workers: number the user asks for; None takes one per GPU, and without GPUs the driver's process on
            this machine, or one worker on a cluster.

    Raises:
        MaskMillError: ``cluster_too_small``.
    """
    cpus, gpus = sum(node[0] for node in nodes), int(sum(node[1] for node in nodes))
    gpu = gpus > 0
    if workers == 0 and cores is None:
        raise WrongUse(
            "wrong_use",
            "--workers 0 trains in this process, which on a cluster runs on the head node.",
            "Ask for 1 worker or more, or leave --workers out.",
        )
    if workers is None:
        workers = gpus if gpus > 1 else (0 if cores is not None else 1)
    if gpu and workers > gpus:
        raise WrongUse(
            "cluster_too_small",
            f"{workers} workers need as many GPUs; the cluster has {gpus}.",
            f"Ask for --workers {gpus}, or add GPUs.",
        )
    share = max(1, workers)
    if not gpu:
        whole = sum(int(node[0]) for node in nodes)
        if workers > whole or not cpus:
            raise WrongUse(
                "cluster_too_small",
                f"{max(1, workers)} workers need a CPU each; the cluster has {cpus:g} on {len(nodes)} "
                "node(s).",
                "Ask for fewer --workers, or add CPUs.",
            )
    real = float(cores if cores is not None else cpus)
    widest = cores if cores is not None else max((node[0] for node in nodes), default=1)
    threads = 0 if gpu else max(1, min(int(real) // share, int(widest)))
    # Decoding limits GPUs, so all CPUs but one per worker load. On CPUs, training is the bottleneck.
    loaders = max(1, int((real - share) / share)) if gpu else max(1, int(real) // (2 * share))
    return TrainingCompute(
        workers, gpu, 1.0 if not gpu or cpus > 2 * share else 0.5, threads, min(loaders, 16)
    )


def room_for_workers(nodes: Sequence[tuple[float, float]], compute: TrainingCompute) -> int:
    """How many of a run's workers fit on (logical CPUs, GPUs) of each node, at most ``compute.workers``."""
    room = 0
    for cpus, gpus in nodes:
        by_cpu = int(cpus / compute.worker_cpus)
        room += min(by_cpu, int(gpus)) if compute.gpu else by_cpu
    return min(room, compute.workers)


def plan_in_process(workers: int | None) -> TrainingCompute | None:
    """Plan training in this process, without Ray; None if ``workers`` or several GPUs call for more.

    Args:
        workers: see ``plan_training``.
    """
    import torch

    gpus = torch.cuda.device_count()
    if workers or (workers is None and gpus > 1):
        return None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return plan_training([(cores, gpus)], cores=cores, workers=0)
