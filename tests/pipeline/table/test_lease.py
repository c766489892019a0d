from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.table import lease as lease_module
from pipeline.table.lease import LEASE_FILE, LEASE_TTL_S, RUN_ID_VARIABLE, Holder, Lease, end_orphans


def _never() -> None:
    raise AssertionError("the lease was not lost")


def _write(root: Path, holder: Holder) -> None:
    (root / LEASE_FILE).write_text(json.dumps(dataclasses.asdict(holder)))


def test_a_second_run_is_refused_until_the_first_is_done(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with Lease.acquire(storage, on_lost=_never):
        with pytest.raises(MaskMillError, match=f"process {os.getpid()}") as caught:
            Lease.acquire(storage, on_lost=_never)
        assert caught.value.code == "output_in_use"
    assert not (tmp_path / LEASE_FILE).exists()
    with Lease.acquire(storage, on_lost=_never):
        pass


def test_a_run_that_makes_nothing_leaves_no_folder(tmp_path: Path) -> None:
    mine, theirs, used = (open_storage(tmp_path / name) for name in ("mine", "theirs", "used"))
    (tmp_path / "theirs").mkdir()
    for storage in (mine, theirs, used):
        with Lease.acquire(storage, on_lost=_never):
            if storage is used:
                storage.write_bytes("labels/part.parquet", b"")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["theirs", "used"]


@pytest.mark.parametrize(
    ("change", "alive"),
    [
        ({}, True),
        ({"started": 1.0}, False),  # the pid now belongs to another process
        ({"pid": 2**22 + 1}, False),  # no such process
        ({"heartbeat": 0.0}, True),  # here the process counts, not the clock
        ({"pid": 2**22 + 1, "cluster": True}, True),  # its tasks may still be running
        ({"pid": 2**22 + 1, "cluster": True, "heartbeat": time.time() - LEASE_TTL_S - 5}, False),
        ({"host": "elsewhere"}, True),
        ({"host": "elsewhere", "heartbeat": time.time() - LEASE_TTL_S - 5}, False),
    ],
)
def test_who_is_alive(tmp_path: Path, change: dict[str, object], alive: bool) -> None:
    holder = dataclasses.replace(Holder.me("other"), **change)
    assert holder.is_alive() is alive
    _write(tmp_path, holder)
    storage = open_storage(tmp_path)
    if alive:
        with pytest.raises(MaskMillError, match="Another run"):
            Lease.acquire(storage, on_lost=_never)
    else:
        with Lease.acquire(storage, on_lost=_never) as lease:
            assert json.loads((tmp_path / LEASE_FILE).read_text())["run_id"] == lease.run_id


def test_of_two_that_find_a_dead_lease_one_wins(tmp_path: Path) -> None:
    _write(tmp_path, dataclasses.replace(Holder.me("dead"), pid=2**22 + 1))
    outcomes: list[object] = []
    barrier = threading.Barrier(2)

    def take() -> None:
        barrier.wait()
        try:
            outcomes.append(Lease.acquire(open_storage(tmp_path), on_lost=_never))
        except MaskMillError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(isinstance(outcome, Lease) for outcome in outcomes) == [False, True]


@pytest.mark.parametrize(
    "written",
    [
        '{"run_id": "x"}',
        "[]",
        '{"run_id"',
        '{"run_id": null, "host": "HOST", "pid": 4194305, "started": 1.0, "heartbeat": 0.0}',
        '{"run_id": "", "host": "HOST", "pid": 4194305, "started": 1.0, "heartbeat": 0.0}',
        '{"run_id": "dead-run", "host": "HOST", "pid": -1, "started": 1.0, "heartbeat": 0.0}',
        '{"run_id": "dead-run", "host": "HOST", "pid": 4194305, "started": NaN, "heartbeat": 0.0}',
    ],
)
def test_a_torn_or_crafted_lease_neither_locks_nor_kills(tmp_path: Path, written: str) -> None:
    (tmp_path / LEASE_FILE).write_text(written.replace("HOST", socket.gethostname()))
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={name: value for name, value in os.environ.items() if name != RUN_ID_VARIABLE},
    )
    try:
        with Lease.acquire(open_storage(tmp_path), on_lost=_never):
            assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_lease_of_another_host_ends_no_process_here(tmp_path: Path) -> None:
    """A run there may have the id of a process here only if somebody wrote it into the lease."""
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"],
        env=os.environ | {RUN_ID_VARIABLE: "living-run"},
        stdout=subprocess.PIPE,
    ) as here:
        assert here.stdout is not None
        here.stdout.readline()
        _write(tmp_path, dataclasses.replace(Holder.me("living-run"), host="elsewhere", heartbeat=0.0))
        try:
            with Lease.acquire(open_storage(tmp_path), on_lost=_never):
                assert here.poll() is None
        finally:
            here.kill()


@pytest.mark.parametrize("run_id", ["", "x", "../dead", "a" * 65])
def test_what_is_no_run_id_names_no_process(run_id: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); import time; time.sleep(60)"],
        env=os.environ | {RUN_ID_VARIABLE: run_id},
        stdout=subprocess.PIPE,
    ) as marked:
        assert marked.stdout is not None
        marked.stdout.readline()
        try:
            assert end_orphans(run_id) == 0
            assert marked.poll() is None
        finally:
            marked.kill()


def test_heartbeat_and_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "LEASE_TTL_S", 0.6)
    lost = threading.Event()
    with Lease.acquire(open_storage(tmp_path), on_lost=lost.set):
        first = json.loads((tmp_path / LEASE_FILE).read_text())["heartbeat"]
        time.sleep(0.5)
        assert json.loads((tmp_path / LEASE_FILE).read_text())["heartbeat"] > first
        other = Holder.me("other")
        deadline = time.time() + 10
        while not lost.wait(0.2) and time.time() < deadline:
            _write(tmp_path, other)  # again, should a heartbeat have been under way
        assert lost.is_set()
        _write(tmp_path, other)
    # The lease of the run that took over is left alone.
    assert json.loads((tmp_path / LEASE_FILE).read_text())["run_id"] == other.run_id


def test_orphans_are_ended_and_nothing_else() -> None:
    def sleeper(run_id: str) -> subprocess.Popen[bytes]:
        code = "import time; time.sleep(60)"
        return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {RUN_ID_VARIABLE: run_id})

    ours, theirs = sleeper("dead-run"), sleeper("living-run")
    try:
        deadline = time.time() + 10
        while psutil.Process(ours.pid).environ().get(RUN_ID_VARIABLE) is None and time.time() < deadline:
            time.sleep(0.05)  # between fork and exec the environment is still ours
        assert end_orphans("dead-run") == 1
        assert not psutil.pid_exists(ours.pid)
        assert theirs.poll() is None
    finally:
        ours.kill()
        theirs.kill()


def test_children_of_orphans_are_ended_with_them() -> None:
    """Ray's agents write their titles over the environment that would tell whose they are."""
    code = (
        "import os, subprocess, sys, time\n"
        f"del os.environ[{RUN_ID_VARIABLE!r}]\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {RUN_ID_VARIABLE: "dead-run"}, stdout=subprocess.PIPE
    ) as marked:
        assert marked.stdout is not None
        child = psutil.Process(int(marked.stdout.readline()))
        assert end_orphans("dead-run") == 2
        assert not psutil.wait_procs([child], timeout=10)[1]
