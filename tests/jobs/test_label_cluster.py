"""The label job through a real ``ray job submit`` to a cluster of two node processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks.faults.clusters import RAY, Cluster, running_cluster

pytestmark = [pytest.mark.cluster, pytest.mark.long]

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def cluster(maskmill_environment: dict[str, str]) -> Iterator[Cluster]:
    with running_cluster(maskmill_environment, dashboard=True) as running:
        yield running


def submit(
    cluster: Cluster, *command: object, on_line: Callable[[str], None] = lambda _line: None
) -> tuple[int, str]:
    """Exit status and output of a job; ``on_line`` is told each line as it comes."""
    deadline = time.monotonic() + 300
    while True:
        with subprocess.Popen(
            [RAY, "job", "submit", "--address", cluster.dashboard, "--working-dir", ROOT,
             "--", *map(str, command)],
            env=cluster.environment | {"PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as job:  # fmt: skip
            assert job.stdout is not None
            patience = threading.Timer(900, job.kill)
            patience.start()
            said = ""
            for line in job.stdout:
                said += line
                on_line(line)
            patience.cancel()
        # The dashboard answers some seconds before the head's agent, which starts jobs, has joined it.
        if "No available agent" not in said or time.monotonic() > deadline:
            return job.returncode, said
        time.sleep(1)


def test_the_job_runs_unchanged_on_a_cluster(cluster: Cluster, toy_images: Path, tmp_path: Path) -> None:
    output = tmp_path / "table"
    command = [
        sys.executable, "-m", "jobs.cli", "label", "--images", toy_images, "--ontology", "toyworld",
        "--output", output, "--recipe", "toy",
    ]  # fmt: skip
    joined: list[str] = []

    def join(line: str) -> None:
        # After the job has begun, as machines do that an autoscaler must boot first.
        if "waiting for the cluster's worker nodes" in line and not joined:
            joined.append(line)
            cluster.add_worker(cpus=4)

    status, said = submit(cluster, *command, on_line=join)
    assert joined and status == 0, said
    assert "succeeded" in said
    assert "images are read on any node" in said and "labels are written on any node" in said
    uris = [
        uri
        for part in (output / "labels").glob("*.parquet")
        for uri in pq.read_table(part)["uri"].to_pylist()
    ]
    assert sorted(uris) == sorted(map(str, toy_images.iterdir()))

    status, said = submit(cluster, *command)
    assert status == 0 and "Nothing new" in said, said
