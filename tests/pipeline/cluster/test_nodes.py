"""When a run is planned anew; the whole of it, on real nodes, is in tests/jobs/test_label_nodes.py."""

from __future__ import annotations

import copy
import functools
import time

import pytest
import ray

from models.errors import MaskMillError
from pipeline.cluster import nodes as cluster_nodes
from pipeline.cluster.nodes import NodesChanged, NodeWatch, plan_like, plan_when_joined, stop_when_changed
from pipeline.cluster.resources import plan_compute
from pipeline.training.loop.resources import plan_training

CPUS = [(0.0, 0.0), (4.0, 0.0), (4.0, 0.0), (4.0, 0.0)]
GPUS = [(0.0, 0.0), (8.0, 1.0), (8.0, 1.0), (8.0, 1.0)]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.9976})
    return []


def watch(nodes: list[tuple[float, float]], told: list[str]) -> tuple[NodeWatch, float]:
    """A watch of a run planned for nodes, and the time at which it was made."""
    return NodeWatch(plan_compute(nodes, cores=None), told.append), time.monotonic()


@pytest.mark.parametrize("nodes", [CPUS, GPUS])
def test_a_run_that_lost_nodes_is_planned_anew_once_nothing_moves(
    nodes: list[tuple[float, float]], told: list[str]
) -> None:
    watched, now = watch(nodes, told)
    watched.look(nodes[:-1], now + cluster_nodes.STALL_S - 1)
    assert not watched.reasons  # the others still finish parts
    watched.part_finished()
    watched.look(nodes[:-1], time.monotonic() + cluster_nodes.STALL_S - 1)
    assert not watched.reasons
    watched.look(nodes[:-1], time.monotonic() + cluster_nodes.STALL_S + 1)
    assert watched.reasons == ["the cluster has lost nodes"]


@pytest.mark.parametrize("left", [[], [(0.0, 0.0)], [(0.0, 0.0), (8.0, 0.0)]])
def test_too_few_nodes_count_as_lost(left: list[tuple[float, float]], told: list[str]) -> None:
    watched, now = watch(GPUS, told)
    watched.look(left, now + cluster_nodes.STALL_S + 1)
    assert watched.reasons


def test_a_node_that_was_replaced_changes_nothing(told: list[str]) -> None:
    watched, now = watch(CPUS, told)
    watched.look(CPUS[::-1], now + 1000)
    assert not watched.reasons


def test_a_slow_part_on_the_same_nodes_is_told_once_and_not_stopped(told: list[str]) -> None:
    watched, now = watch(CPUS, told)
    for seconds in (30, 59, 61, 500):
        watched.look(CPUS, now + seconds)
    assert not watched.reasons
    assert len(told) == 1 and "0.998 of 12 CPUs" in told[0] and "4 node(s)" in told[0]
    watched.part_finished()
    watched.look(CPUS, time.monotonic() + 100)
    assert len(told) == 2


@pytest.mark.parametrize("nodes", [CPUS, GPUS])
def test_nodes_that_join_are_used_once_they_stay(nodes: list[tuple[float, float]], told: list[str]) -> None:
    watched, now = watch(nodes, told)
    grown = [*nodes, nodes[-1]]
    watched.look(grown, now + 1)
    watched.look(nodes, now + 30)  # gone again
    watched.look(grown, now + 40)
    watched.part_finished()
    watched.look(grown, now + 40 + cluster_nodes.JOIN_S - 1)
    assert not watched.reasons
    watched.look(grown, now + 40 + cluster_nodes.JOIN_S)
    assert watched.reasons == ["nodes have joined the cluster"]


def test_a_few_more_nodes_are_not_worth_new_workers(told: list[str]) -> None:
    watched, now = watch([(0.0, 0.0)] + [(8.0, 1.0)] * 10, told)
    for seconds in range(0, 600, 50):
        watched.part_finished()
        watched.look([(0.0, 0.0)] + [(8.0, 1.0)] * 12, now + seconds)
    assert not watched.reasons


def test_a_run_keeps_its_kind_of_hardware() -> None:
    on_cpus, on_gpus = plan_compute(CPUS, cores=None), plan_compute(GPUS, cores=None)
    assert plan_like(on_cpus)(GPUS, cores=None).gpus == 0
    assert plan_like(on_gpus)(GPUS[:2], cores=None).actors == 1
    with pytest.raises(MaskMillError, match="began on GPUs") as caught:
        plan_like(on_gpus)(CPUS, cores=None)
    assert caught.value.code == "cluster_too_small"


def test_an_execution_ends_once_there_is_a_reason() -> None:
    reasons: list[str] = []
    callback = copy.deepcopy(stop_when_changed(reasons))()  # Ray Data copies its context
    callback.on_execution_step(None)
    reasons.append("gone")
    with pytest.raises(NodesChanged, match="gone"):
        callback.on_execution_step(None)


def test_what_more_nodes_would_not_change_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "nodes", list)
    told: list[str] = []
    with pytest.raises(MaskMillError, match="--workers 0 trains in this process"):
        plan_when_joined(functools.partial(plan_training, workers=0), told.append)
    assert not told
