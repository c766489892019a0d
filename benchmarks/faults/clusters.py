"""Ray clusters of several node processes on this machine, started with ``ray start`` as on real machines."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from benchmarks.faults.disks import refuse_without_mounts

RAY = Path(sys.executable).with_name("ray")
_EMPTY_DISKS = """
count=$1; shift
while [ "$count" -gt 0 ]; do mount -t tmpfs tmpfs "$1"; shift; count=$((count - 1)); done
exec "$@"
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cluster:
    """A head that does no work, and workers, as cluster.yaml lays them out.

    Attributes:
        address: of the head, for ``--address``.
        dashboard: of the head, for ``ray job submit``.
        environment: what processes need to join it: its token.
    """

    def __init__(self, scratch: Path, environment: Mapping[str, str], *, dashboard: bool) -> None:
        # A process that joins several clusters reads its token once.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        # Ray takes a node for lost after five times this period, 15 s by default.
        self.environment = {**token, **environment, "RAY_health_check_period_ms": "1000"}
        self.environment.pop("RAY_ADDRESS", None)
        self._scratch = scratch
        self._nodes: list[subprocess.Popen[bytes]] = []
        port, page = free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{page}"
        self._start(
            "--head", "--num-cpus=0", "--num-gpus=0", f"--port={port}", f"--include-dashboard={dashboard}",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={page}", "--node-ip-address=127.0.0.1",
            f"--temp-dir={scratch / 'head'}",
        )  # fmt: skip
        self._wait_until_ready(port, page if dashboard else None)

    def add_worker(self, *, cpus: int, gpus: int = 0, blind: Sequence[Path] = ()) -> int:
        """Start a node and wait until it has joined.

        Args:
            cpus, gpus: logical ones.
            blind: folders that the node does not see: it has an empty disk of its own in their places, as a
                machine without a shared disk. Only root may mount.

        Returns:
            Its number, for ``kill``.

        Raises:
            NoDisk: no disk can be mounted here.
        """
        # A session directory of its own: the nodes would unpack the working_dir over each other.
        folder = self._scratch / f"node{len(self._nodes)}"
        number = self._start(
            f"--address={self.address}", f"--num-cpus={cpus}", f"--num-gpus={gpus}", f"--temp-dir={folder}",
            blind=blind,
        )  # fmt: skip
        log = self._scratch / f"node{number}.log"
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        return number

    def seen_by(self, number: int, place: Path) -> Path:
        """A path as a node sees it, for tests that look into its own disk."""
        return Path(f"/proc/{self._nodes[number].pid}/root") / place.relative_to("/")

    def works(self, number: int, title: str) -> bool:
        """Whether a node has a process whose title begins like this."""
        for process in psutil.Process(self._nodes[number].pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "".join(process.cmdline()[:1]).startswith(title):
                    return True
        return False

    def kill(self, number: int) -> None:
        """Lose a node: SIGKILL to all of its processes at once."""
        node = psutil.Process(self._nodes[number].pid)
        for process in [node, *node.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._nodes[number].wait()

    def close(self) -> None:
        for number, node in enumerate(self._nodes):
            if node.poll() is None:
                self.kill(number)

    def _start(self, *arguments: str, blind: Sequence[Path] = ()) -> int:
        if blind:
            refuse_without_mounts()
        # A mount namespace of its own; Ray's processes inherit it.
        apart = ["unshare", "--mount", "sh", "-ec", _EMPTY_DISKS, "sh", str(len(blind)), *map(str, blind)]
        with (self._scratch / f"node{len(self._nodes)}.log").open("wb") as log:
            self._nodes.append(
                subprocess.Popen(
                    # The agent's port is a fixed number otherwise, and any other Ray on this machine has it.
                    [
                        *(apart if blind else ()),
                        RAY,
                        "start",
                        *arguments,
                        f"--dashboard-agent-listen-port={free_port()}",
                        "--block",
                    ],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return len(self._nodes) - 1

    def _wait_until_ready(self, port: int, page: int | None) -> None:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            try:
                if page is None:
                    socket.create_connection(("127.0.0.1", port), timeout=2).close()
                else:
                    urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=2)
                return
            except urllib.error.HTTPError:  # it answers, and wants the token
                return
            except OSError:
                time.sleep(0.5)
        raise AssertionError((self._scratch / "node0.log").read_text()[-3000:])


@contextlib.contextmanager
def running_cluster(environment: Mapping[str, str], *, dashboard: bool = False) -> Iterator[Cluster]:
    """A head; ended with its workers at the end."""
    # Sockets live below the session directory, and their paths may not be long.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        cluster = None
        try:
            cluster = Cluster(Path(scratch), {**os.environ, **environment}, dashboard=dashboard)
            yield cluster
        finally:
            if cluster is not None:
                cluster.close()


_TRIES = 3
"""How often a Ray is started: it gives its processes half a minute, too little for a busy machine."""
_HOLDER = """
import sys
import ray
ray.init("local", num_cpus=int(sys.argv[1]), include_dashboard=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def standing_ray(environment: Mapping[str, str], *, cpus: int) -> Iterator[tuple[str, psutil.Process]]:
    """A Ray of one node that outlives the jobs joining it; its address, and the process that holds it.

    A subprocess holds it, and ends it when this process is gone, even if it was killed.

    Args:
        environment: of the holder, and so of all workers; with the token that joins it.
        cpus: logical CPUs.
    """
    own = {
        **environment,
        "PYTHONPATH": environment.get("PYTHONPATH") or str(Path(__file__).resolve().parents[2]),
        "MLFLOW_TRACKING_URI": "off",
        "RAY_BACKEND_LOG_LEVEL": "fatal",
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    for name in ("MASKMILL_RUN_ID", "RAY_ADDRESS"):
        own.pop(name, None)
    for _ in range(_TRIES):
        with subprocess.Popen(
            [sys.executable, "-c", _HOLDER, str(cpus)],
            cwd=Path(__file__).resolve().parents[2],
            env=own,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            address = holder.stdout.readline().strip()
            if not address:
                continue
            try:
                yield address, psutil.Process(holder.pid)
            finally:
                holder.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    holder.wait(30)
                holder.kill()
            return
    raise AssertionError("Ray did not start")
