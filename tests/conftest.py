from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from tests.browser import Page

ROOT = Path(__file__).resolve().parents[1]

# Ray runs its workers at niceness 15, where they would starve beside the tests of another process.
os.environ.setdefault("RAY_worker_niceness", "5")
# Tests join a cluster (shared_ray) by this token.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

# A shell starts background jobs with Ctrl-C ignored, which the processes that tests start would inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if "PYTEST_XDIST_WORKER" in os.environ:

    def _unexpected(number: int, frame: object) -> None:
        raise AssertionError("SIGTERM reached a test process while no command handled it")

    # A test that sends it too late would end this process, without a word of which test it was.
    signal.signal(signal.SIGTERM, _unexpected)

# A user's own cache would answer instead of the code that is tested.
_CACHE = tempfile.TemporaryDirectory(prefix="maskmill-tests-")
os.environ["MASKMILL_CACHE"] = _CACHE.name

# Machines are shared, if only with other tests: how long an example takes shows nothing.
hypothesis.settings.register_profile(
    "shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared")

CLUSTER_CPUS = 3
"""CPUs of the cluster that tests share: enough for the stages of a job, and for two training workers."""

CLUSTER = f"""
import sys
import ray
ray.init("local", num_cpus={CLUSTER_CPUS}, include_dashboard=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """Address of a cluster that outlives the jobs joining it, for tests that are not about starting Ray.

    A subprocess holds it, and ends it when this process is gone, even if it was killed.
    """
    environment = os.environ | {
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


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    from tests.browser import CHROMIUM, Page

    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    page = Page(tmp_path_factory.mktemp("chromium"))
    yield page
    page.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first, so that no process is left with a long one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])
