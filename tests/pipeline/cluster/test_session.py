from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
import ray

from models.errors import MaskMillError
from pipeline.cluster import session
from pipeline.cluster.session import ray_session
from pipeline.table.lease import RUN_ID_VARIABLE

ROOT = Path(__file__).resolve().parents[3]

# A start that takes too long ends all processes of its run: those of other tests must not have the same id.
HOLDER = """
import sys, uuid
from pipeline.cluster.session import ray_session
with ray_session(uuid.uuid4().hex, address=None, verbose=False):
    import ray
    ray.get(ray.remote(lambda: 1).remote())  # now there is a worker process, too
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""

STRANGER = """
import sys
from pipeline.cluster.session import ray_session
with ray_session("a-stranger", address=sys.argv[1], verbose=False, notice=print):
    print("came in")
"""

LATE_VARIABLES = """
import os, sys, uuid
import numpy  # which makes a variable, and which jobs import first
late = None
def hook(event, arguments):
    if late is not None and event == "os.putenv" and os.fsdecode(arguments[0]) not in os.environ:
        late.append(os.fsdecode(arguments[0]))
sys.addaudithook(hook)
def begin():
    global late
    late = []
from pipeline.cluster.session import ray_session
with ray_session(uuid.uuid4().hex, address=sys.argv[1] or None, verbose=False, begin=begin):
    import open_clip, ray, ray.train.torch
    assert ray.is_initialized()
for name in ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "RAY_CHDIR_TO_TRIAL_DIR", "TORCHINDUCTOR_CACHE_DIR"):
    assert os.environ[name]
print(late)
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    """Of a user without a cluster, whose home folder is empty."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MASKMILL_"))}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT)} | more


@contextlib.contextmanager
def private_ray(**settings: str) -> Iterator[tuple[psutil.Process, str]]:
    """A process that holds a private Ray, and the Ray's address."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        env=settings,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        address = holder.stdout.readline().strip()
        assert address
        yield psutil.Process(holder.pid), address
        holder.stdin.close()
        assert holder.wait(120) == 0


@pytest.mark.slow
@pytest.mark.parametrize("joins", [False, True])
def test_no_variable_is_new_once_threads_may_run(tmp_path: Path, shared_ray: str, joins: bool) -> None:
    """A thread that looks up a variable while a new one moves the environment can crash."""
    given = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")} if joins else {}
    done = subprocess.run(
        [sys.executable, "-c", LATE_VARIABLES, shared_ray if joins else ""],
        env=environment(tmp_path, **given),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


@pytest.mark.slow
def test_a_private_ray_is_closed_to_strangers_and_a_long_tmpdir_does_not_matter(tmp_path: Path) -> None:
    long = tmp_path / ("job-" + "x" * 60)
    long.mkdir()
    # The mode is that of clusters, not of our own.
    mine = environment(tmp_path, RAY_AUTH_MODE="disabled", TMPDIR=str(long))
    with private_ray(**mine) as (holder, address):
        listening = [
            connection.laddr
            for process in [holder, *holder.children(recursive=True)]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) >= 5
        ips = {ipaddress.ip_address(place.ip.removeprefix("::ffff:")) for place in listening}
        assert all(ip.is_loopback for ip in ips), ips

        folder = Path(holder.children()[0].environ()["RAY_TMPDIR"])
        assert folder.stat().st_mode & 0o077 == 0 and any(folder.iterdir())
        assert len(str(folder)) < 40

        for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
            done = subprocess.run(
                [sys.executable, "-c", STRANGER, address],
                # Otherwise Ray would look for the address on another interface.
                env=environment(tmp_path, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0") | token,
                capture_output=True,
                text=True,
                timeout=400,
            )
            assert done.returncode and "came in" not in done.stdout
            assert f"could not be reached at {address}" in done.stderr
    assert not folder.exists()
    assert not (tmp_path / ".ray").exists()  # no token that outlives the run, for all to read


@pytest.mark.parametrize("folder", ["/nowhere", "/" + "x" * 60])
def test_a_folder_without_room_for_sockets_is_told_at_once(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", folder)
    with (
        pytest.raises(MaskMillError, match=folder) as caught,
        ray_session("mine", address=None, verbose=False),
    ):
        pass
    assert caught.value.code == "ray_failed" and "RAY_TMPDIR" in caught.value.remedy


@pytest.mark.long
def test_a_slow_start_is_tried_again_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, Ray's processes take longer than Ray waits for them: the first ones never answer."""
    monkeypatch.setattr(session, "START_TRIES", 2)
    run_id = uuid.uuid4().hex
    stopped: list[psutil.Process] = []

    def stop_the_first() -> None:
        deadline = time.monotonic() + 60
        while not stopped and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if process.name() == "raylet" and process.environ().get(RUN_ID_VARIABLE) == run_id:
                        process.suspend()
                        stopped.append(process)
            time.sleep(0.002)

    threading.Thread(target=stop_the_first, daemon=True).start()
    told: list[str] = []
    with ray_session(run_id, address=None, verbose=False, notice=told.append):
        assert stopped and not stopped[0].is_running()
        assert ray.get(ray.put("it runs")) == "it runs"
        assert told == ["Ray did not start in time; trying again"]
        raylets = [
            one
            for one in psutil.Process().children(recursive=True)
            if one.name() == "raylet" and one.environ().get(RUN_ID_VARIABLE) == run_id
        ]
        assert len(raylets) == 1


@pytest.mark.slow
def test_a_session_leaves_signals_and_the_ray_of_others_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    variables = dict(os.environ)
    with ray_session(uuid.uuid4().hex, address=None, verbose=False):
        assert {number: signal.getsignal(number) for number in before} == before
        with (
            pytest.raises(MaskMillError, match="twice") as refused,
            ray_session("another", address=None, verbose=False),
        ):
            pass
        assert refused.value.code == "cluster_unreachable"
        assert ray.get(ray.put("still there")) == "still there"
    assert not ray.is_initialized()
    assert os.environ.get("RAY_TMPDIR") == variables.get("RAY_TMPDIR")


def test_a_start_that_times_out_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []

    def time_out(*_arguments: Any, **_settings: Any) -> NoReturn:
        tries.append(os.environ["RAY_TMPDIR"])
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", time_out)
    with (
        pytest.raises(MaskMillError, match="timed out during startup") as caught,
        ray_session(uuid.uuid4().hex, address=None, verbose=False),
    ):
        pass
    assert caught.value.code == "cluster_unreachable"
    assert len(tries) == session.START_TRIES
    assert not any(map(os.path.exists, tries))


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    with (
        pytest.raises(MaskMillError, match=r"127\.0\.0\.1:1") as caught,
        ray_session("mine", address="127.0.0.1:1", verbose=False),
    ):
        pass
    assert caught.value.code == "cluster_unreachable" and "--address" in caught.value.remedy


def test_a_cluster_is_joined_with_a_word(shared_ray: str) -> None:
    told: list[str] = []
    with ray_session("mine", address=shared_ray, verbose=False, notice=told.append):
        pass
    assert told == [f"joined the Ray at {shared_ray}"]
