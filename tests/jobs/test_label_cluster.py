"""The label job through a real ``ray job submit`` to a cluster of two node processes."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cluster:
    """A head that does no work and one worker node, as cluster.yaml lays them out."""

    def __init__(self, scratch: Path, environment: dict[str, str]) -> None:
        self.environment = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        del self.environment["RAY_ADDRESS"]
        self._scratch = scratch
        self._nodes: list[subprocess.Popen[bytes]] = []
        port, dashboard = _free_port(), _free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self._start(
            "--head", "--num-cpus=0", f"--port={port}", "--include-dashboard=true",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--node-ip-address=127.0.0.1",
        )  # fmt: skip
        self._wait_until_ready()
        self._address = f"127.0.0.1:{port}"

    def add_worker(self) -> None:
        # A session directory of its own: the nodes would unpack the working_dir over each other.
        self._start(f"--address={self._address}", "--num-cpus=4", f"--temp-dir={self._scratch / 'node'}")

    def _start(self, *arguments: str) -> None:
        with (self._scratch / f"node{len(self._nodes)}.log").open("wb") as log:
            self._nodes.append(
                subprocess.Popen(
                    # The agent's port is a fixed number otherwise, and any other Ray on this machine has it.
                    [RAY, "start", *arguments, f"--dashboard-agent-listen-port={_free_port()}", "--block"],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=2)
                return
            except urllib.error.HTTPError:  # it answers, and wants the token
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError((self._scratch / "node0.log").read_text()[-3000:])

    def submit(
        self, *command: object, on_line: Callable[[str], None] = lambda _line: None
    ) -> tuple[int, str]:
        """Exit status and output of a job; ``on_line`` is told each line as it comes."""
        deadline = time.monotonic() + 300
        while True:
            with subprocess.Popen(
                [RAY, "job", "submit", "--address", self.dashboard, "--working-dir", ROOT,
                 "--", *map(str, command)],
                env=self.environment | {"PYTHONUNBUFFERED": "1"},
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

    def close(self) -> None:
        for node in self._nodes:
            if node.poll() is None:
                for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            node.wait()


@pytest.fixture(scope="module")
def cluster(maskmill_environment: dict[str, str]) -> Iterator[Cluster]:
    # Sockets live below the session directory, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        running = Cluster(Path(scratch), {**os.environ, **maskmill_environment})
        try:
            yield running
        finally:
            running.close()


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
            cluster.add_worker()

    status, said = cluster.submit(*command, on_line=join)
    assert joined and status == 0, said
    assert "succeeded" in said
    uris = [
        uri
        for part in (output / "labels").glob("*.parquet")
        for uri in pq.read_table(part)["uri"].to_pylist()
    ]
    assert sorted(uris) == sorted(map(str, toy_images.iterdir()))

    status, said = cluster.submit(*command)
    assert status == 0 and "Nothing new" in said, said
