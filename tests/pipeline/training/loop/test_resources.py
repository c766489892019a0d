from __future__ import annotations

import pytest

from models.errors import MaskMillError
from pipeline.training.loop.resources import TrainingCompute, plan_training, room_for_workers


@pytest.mark.parametrize(
    ("nodes", "cores", "asked", "expected"),
    [
        ([(8, 0)], 2, None, TrainingCompute(0, False, 1.0, 2, 1)),  # a laptop: this process
        ([(8, 0)], 2, 2, TrainingCompute(2, False, 1.0, 1, 1)),
        ([(32, 0)], 16, 2, TrainingCompute(2, False, 1.0, 8, 4)),
        ([(16, 1)], 16, None, TrainingCompute(0, True, 1.0, 0, 15)),  # one GPU here: this process
        ([(64, 8)], 64, None, TrainingCompute(8, True, 1.0, 0, 7)),
        ([(0, 0), (16, 4), (16, 4)], None, None, TrainingCompute(8, True, 1.0, 0, 3)),
        ([(0, 0), (16, 1)], None, None, TrainingCompute(1, True, 1.0, 0, 15)),  # a cluster: never the head
        ([(8, 0), (8, 0)], None, None, TrainingCompute(1, False, 1.0, 8, 8)),
    ],
)
def test_plans(
    nodes: list[tuple[float, float]], cores: int | None, asked: int | None, expected: TrainingCompute
) -> None:
    plan = plan_training(nodes, cores=cores, workers=asked)
    assert plan == expected
    assert plan.workers * plan.worker_cpus <= sum(cpus for cpus, _ in nodes)


@pytest.mark.parametrize(
    ("nodes", "asked", "says"),
    [
        ([(16, 1)], 2, "--workers 1"),
        ([(2, 0)], 3, "a CPU each"),
        ([(0, 0)], 1, "add CPUs"),
        ([(8, 0)], 0, "the head"),
    ],
)
def test_a_cluster_too_small_is_refused(nodes: list[tuple[float, float]], asked: int, says: str) -> None:
    with pytest.raises(MaskMillError, match=says) as caught:
        plan_training(nodes, cores=None, workers=asked)
    assert caught.value.code in ("cluster_too_small", "wrong_use")


@pytest.mark.parametrize(
    ("nodes", "gpu", "room"),
    [
        ([(0, 0), (4, 0)], False, 3),
        ([(1, 0), (1, 0)], False, 2),
        ([(0.5, 0), (0.5, 0), (1, 0)], False, 1),  # a worker is on one node
        ([(8, 1), (8, 1), (64, 0)], True, 2),
        ([(0, 4)], True, 0),
        ([], False, 0),
    ],
)
def test_workers_need_room_on_one_node_each(nodes: list[tuple[float, float]], gpu: bool, room: int) -> None:
    assert room_for_workers(nodes, TrainingCompute(3, gpu, 1.0, 1, 1)) == room
