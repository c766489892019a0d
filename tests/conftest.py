from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

from benchmarks.faults.clusters import standing_ray

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


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Random weights and inputs that a test gives no seed are the same whatever ran before it."""
    if "torch" in sys.modules:  # a test without it does not wait for the import
        sys.modules["torch"].manual_seed(0)


@pytest.fixture(scope="session")
def shared_ray() -> Iterator[str]:
    """Address of a cluster that outlives the jobs joining it, for tests that are not about starting Ray."""
    with standing_ray(os.environ, cpus=CLUSTER_CPUS) as (address, _):
        yield address


@pytest.fixture(scope="session")
def registry_database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of a database for all tests, each with models of its own: making one takes seconds."""
    from mlflow.tracking import MlflowClient

    folder = tmp_path_factory.mktemp("registry")
    uri = f"sqlite:///{folder}/mlruns.db"
    client = MlflowClient(uri, registry_uri=uri)
    client.create_experiment("train", (folder / "artifacts").as_uri())
    return uri


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    from tests.browser import CHROMIUM, Page

    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (Debian: apt install chromium)")
    page = Page(tmp_path_factory.mktemp("chromium"))
    yield page
    page.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that use clusters first, then those with slow tests, so that no process ends with a long one."""
    marked = {
        mark: Counter(item.path for item in items if item.get_closest_marker(mark))
        for mark in ("cluster", "slow")
    }
    items.sort(key=lambda item: (-marked["cluster"][item.path], -marked["slow"][item.path]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int) -> None:
    """A test process that was "not properly terminated" may have been killed for lack of memory."""
    counters = Path("/proc/vmstat")
    if exitstatus and counters.exists():
        killed = dict(line.split() for line in counters.read_text().splitlines()).get("oom_kill", "?")
        terminalreporter.write_line(
            f"{killed} processes were killed for lack of memory since the machine started"
        )
