from __future__ import annotations

import pytest

from models.errors import MaskMillError
from pipeline.cluster.resources import plan_compute
from pipeline.cluster.session import LOCAL_SLOTS


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 5, 6, 8, 16, 20, 24, 28, 64])
def test_local_cpus_are_filled_and_never_oversubscribed(cores: int) -> None:
    slots = max(LOCAL_SLOTS, 2 * cores)
    plan = plan_compute([(slots, 0)], cores=cores)
    assert plan.actors * plan.calls * plan.threads == cores
    assert plan.needed_cpus <= slots
    assert plan.gpus == 0


@pytest.mark.parametrize(
    ("nodes", "cores"),
    [
        ([(8, 1)], 2),
        ([(16, 1)], 16),
        ([(4, 1)], None),
        ([(2, 1)], None),
        ([(64, 8)], None),
        ([(16, 8)], None),
        ([(0, 0), (16, 1), (16, 1), (64, 0)], None),
        ([(16, 1)] * 40, None),
    ],
)
def test_gpus_get_one_actor_each_and_the_rest_decodes(
    nodes: list[tuple[float, float]], cores: int | None
) -> None:
    plan = plan_compute(nodes, cores=cores)
    assert (plan.actors, plan.calls, plan.gpus) == (sum(gpus for _, gpus in nodes), 1, 1.0)
    assert plan.decoders >= 1 and plan.writers >= 1
    assert plan.needed_cpus <= sum(cpus for cpus, _ in nodes)


@pytest.mark.parametrize(
    "nodes",
    [
        [(2, 0)],
        [(3, 0)],
        [(4, 0)],
        [(8, 0)],
        [(100, 0)],
        [(0, 0), (2, 0), (2, 0)],
        [(4, 0)] * 2,
        [(4, 0)] * 10,
        [(2, 0)] * 4,
        [(16, 0)] * 3,
        [(8, 0)] * 10,
        [(32, 0)] * 3,
    ],
)
def test_cpu_clusters_move(nodes: list[tuple[float, float]]) -> None:
    plan = plan_compute(nodes, cores=None)
    cpus = sum(cpus for cpus, _ in nodes)
    assert plan.needed_cpus <= cpus
    assert plan.actors * plan.calls * plan.threads <= cpus
    # Every actor has a place, and a task of each other stage one beside them.
    free = [cpus for cpus, _ in nodes]
    for demand in [plan.cpus] * plan.actors + [plan.task_cpus] * 2:
        place = next(index for index, left in enumerate(free) if left >= demand)
        free[place] -= demand


@pytest.mark.parametrize("nodes", [[(1, 0)], [(0, 0)], [(1, 1)], [(4, 8)], [(64, 0), (0, 1)]])
def test_a_cluster_that_would_wait_forever_is_refused(nodes: list[tuple[float, float]]) -> None:
    with pytest.raises(MaskMillError, match="at once") as caught:
        plan_compute(nodes, cores=None)
    assert caught.value.code == "cluster_too_small"
