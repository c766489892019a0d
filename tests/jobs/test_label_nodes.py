"""A labelling run on a cluster whose nodes are lost and join: it ends, and no image is lost or doubled."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.faults.clusters import Cluster, running_cluster
from pipeline.cluster import nodes
from pipeline.toyworld import scenes as toyworld

pytestmark = [pytest.mark.cluster, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]


class Job:
    """``maskmill label`` of toy scenes on a cluster."""

    def __init__(self, folder: Path, cluster: Cluster, *, count: int, size: int = 384) -> None:
        self.images = folder / "images"
        self.images.mkdir()
        scenes, _, _ = toyworld.generate(11, count, 64)
        for index, scene in enumerate(scenes):
            Image.fromarray(scene).save(self.images / f"scene_{index:04d}.png")
        self.output = folder / "table"
        self.arguments = [
            "label", "--images", str(self.images), "--ontology", "toyworld", "--output", str(self.output),
            "--recipe", "toy", "--address", cluster.address,
            "--set", f"scale=[1024, {size}]",  # larger than the toy needs: there must be time
        ]  # fmt: skip

    def rows(self) -> Counter[str]:
        """How often each image has a row."""
        return Counter(
            uri
            for part in (self.output / "labels").glob("*.parquet")
            for uri in pq.read_table(part, columns=["uri"])["uri"].to_pylist()
        )

    def expect_the_whole_table(self) -> None:
        rows = self.rows()
        assert sorted(rows) == sorted(map(str, self.images.iterdir()))
        assert set(rows.values()) == {1}


class Process:
    """A job in a process of its own."""

    def __init__(self, job: Job, folder: Path, cluster: Cluster) -> None:
        self._log = folder / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "jobs.cli", *job.arguments],
                cwd=ROOT,
                env=cluster.environment,
                stdout=log,
                stderr=log,
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def wait_for(self, what: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self._process.poll() is None, self.said[-3000:]
            assert time.monotonic() < deadline, self.said[-3000:]
            time.sleep(0.1)

    def expect_success(self) -> None:
        assert self._process.wait(600) == 0, self.said[-3000:]


@pytest.mark.parametrize("kind", ["cpu", "gpu"])
def test_a_lost_node_does_not_stop_the_run(
    kind: str, tmp_path: Path, maskmill_environment: dict[str, str]
) -> None:
    with running_cluster(maskmill_environment) as cluster:
        # Logical GPUs: the actors compute on CPUs, but Ray places them like those of real GPUs.
        # Of CPUs, the actors of both nodes leave less than one on either: no task would find a place.
        numbers = [cluster.add_worker(cpus=3, gpus=int(kind == "gpu")) for _ in range(2)]
        # On GPUs, an actor takes up to 256 images at a time.
        job = Job(tmp_path, cluster, **({"count": 1100, "size": 192} if kind == "gpu" else {"count": 100}))
        process = Process(job, tmp_path, cluster)
        process.wait_for(lambda: job.rows().total() > 5, 300)
        cluster.kill(numbers[0])
        process.expect_success()
        job.expect_the_whole_table()
        assert "joined the Ray at" in process.said
        # On GPUs, the other actor may have all of the work.
        assert kind == "gpu" or "the cluster has lost nodes" in process.said


def test_without_nodes_a_run_says_what_it_waits_for(
    tmp_path: Path, maskmill_environment: dict[str, str]
) -> None:
    with running_cluster(maskmill_environment) as cluster:
        only = cluster.add_worker(cpus=2)
        job = Job(tmp_path, cluster, count=20)
        process = Process(job, tmp_path, cluster)
        process.wait_for(lambda: job.rows().total() > 0, 300)
        cluster.kill(only)
        process.wait_for(lambda: "waiting for the cluster's worker nodes" in process.said, 90)
        cluster.add_worker(cpus=2)
        process.expect_success()
        job.expect_the_whole_table()


def test_nodes_that_join_are_used(
    tmp_path: Path,
    maskmill_environment: dict[str, str],
    maskmill_here: Callable[..., subprocess.CompletedProcess[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "JOIN_S", 1.0)
    with running_cluster(maskmill_environment) as cluster:
        cluster.add_worker(cpus=2)
        job = Job(tmp_path, cluster, count=100)

        def join() -> None:
            while job.rows().total() < 3:
                time.sleep(0.1)
            cluster.add_worker(cpus=4)

        threading.Thread(target=join, daemon=True).start()
        done = maskmill_here(*job.arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "nodes have joined the cluster" in done.stderr
        job.expect_the_whole_table()
