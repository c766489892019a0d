"""A training on a cluster that loses a node: it says what it waits for, and goes on once there is room."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from benchmarks.faults.clusters import running_cluster
from pipeline.cluster.session import ray_session
from tests.pipeline.training.loop.test_driver import Plan, run


@pytest.mark.cluster
@pytest.mark.long
def test_a_training_says_that_it_waits_for_a_lost_node(tmp_path: Path) -> None:
    with running_cluster({}) as cluster:
        nodes = [cluster.add_worker(cpus=1) for _ in range(2)]
        checkpoints = tmp_path / "run" / "checkpoints"
        waited: list[float] = []

        def lose_and_replace() -> None:
            while not list(checkpoints.glob("step-*")):
                time.sleep(0.1)
            began = time.monotonic()
            cluster.kill(nodes[1])
            while not any("Waiting for nodes" in text for text in told):
                time.sleep(0.1)
            waited.append(time.monotonic() - began)
            cluster.add_worker(cpus=1)

        told: list[str] = []
        threading.Thread(target=lose_and_replace, daemon=True).start()
        with ray_session("nodes", address=cluster.address, verbose=False):
            trained = run(tmp_path / "run", workers=2, plan=Plan(pause_s=0.5), notices=told)
        assert trained.outcome.finished and trained.outcome.step == 12
        assert [line["step"] for line in trained.lines] == list(range(1, 13))
        assert waited and waited[0] < 60
        assert "2 workers need a CPU each, and the cluster has room for 1" in " ".join(told)
        assert any("room for all workers again" in text for text in told)
