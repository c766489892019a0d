from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Ray's workers usually stand far back (15) behind all else on a machine. Here that is other tests, beside
# which they would get nothing; but a Ray that starts goes first, as it gives up after some seconds.
os.environ.setdefault("RAY_worker_niceness", "5")
# As every Ray that is started here has it by itself; who joins one (shared_ray) must be told.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# Machines are shared, if only by the tests that run side by side: how long an example takes shows nothing.
hypothesis.settings.register_profile(
    "shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared")

LONGEST = (
    "test_label_kills.py",
    "test_train.py",
    "test_loop.py",
    "test_train_clipseg.py",
    "test_label.py",
    "test_prompts.py",
)
"""Files that take minutes, those that take most first."""

CLUSTER_CPUS = 3
"""Of the cluster that tests share: enough for a job's stages, and one thread for each of two workers."""

CLUSTER = f"""
import sys
import ray
ray.init("local", num_cpus={CLUSTER_CPUS}, include_dashboard=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """Address of a cluster that outlives the jobs that join it, for tests that are not about its start.

    A process of its own holds it, and ends it when this one is gone, however that came about.
    """
    with tempfile.TemporaryDirectory(prefix="cache-") as cache:
        environment = os.environ | {
            "MASKMILL_CACHE": cache,
            "MLFLOW_TRACKING_URI": "off",
            "PYTHONPATH": str(ROOT),
            "RAY_BACKEND_LOG_LEVEL": "fatal",
            "RAY_enable_worker_prestart": "0",
            "RAY_prestart_worker_first_driver": "0",
        }
        for name in ("MASKMILL_RUN_ID", "RAY_ADDRESS"):
            environment.pop(name, None)
        with subprocess.Popen(
            [sys.executable, "-c", CLUSTER],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            address = holder.stdout.readline().strip()
            assert address, "Ray did not start"
            try:
                yield address
            finally:
                holder.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    holder.wait(30)
                holder.kill()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that at the end no process works on one while the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONGEST:
            return LONGEST.index(item.path.name)
        return len(LONGEST) + (item.path not in slow)

    items.sort(key=rank)
