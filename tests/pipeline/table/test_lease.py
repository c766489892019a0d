from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from models.errors import FailedWork, MaskMillError
from pipeline.files.storage import Storage, open_storage
from pipeline.table import lease as lease_module
from pipeline.table.lease import (
    LEASE_FILE,
    RUN_ID_VARIABLE,
    Holder,
    Lease,
    end_orphans,
    refuse_other_holder,
)


def _never(reason: str) -> None:
    raise AssertionError(reason)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that end after two seconds: heartbeats come after 0.33 s, and a holder gives up after 1.6 s."""
    monkeypatch.setattr(lease_module, "LEASE_TTL_S", 2.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heartbeats come as often, and a holder gives up only after 9.6 s, which no busy machine takes."""
    monkeypatch.setattr(lease_module, "LEASE_TTL_S", 12.0)
    monkeypatch.setattr(lease_module, "BEATS", 36)


def _write(root: Path, holder: Holder) -> None:
    """Write the lease at once: a reader would take half of it for a torn one."""
    (root / "new").write_text(json.dumps(dataclasses.asdict(holder)))
    (root / "new").replace(root / LEASE_FILE)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "alive"),
    [
        ({}, True),
        ({"started": 1.0}, False),  # the pid now belongs to another process
        ({"pid": 2**22 + 1}, False),  # no such process
        ({"heartbeat": 0.0}, True),  # here the process counts, not the clock
        ({"pid": 2**22 + 1, "cluster": True}, None),  # its tasks may still be running
        ({"pid": 2**22 + 1, "cluster": True, "heartbeat": 0.0}, False),
        ({"pid": 2**22 + 1, "cluster": True, "heartbeat": time.time() + 1e6}, False),
        ({"host": "elsewhere"}, None),
        ({"host": "elsewhere", "heartbeat": time.time() + 1e6}, None),  # a clock that is ahead
        ({"host": "elsewhere", "heartbeat": 0.0}, None),
    ],
)
@pytest.mark.usefixtures("quick")
def test_who_is_alive(tmp_path: Path, change: dict[str, object], alive: bool | None) -> None:
    """What is not known from the process is known from its heartbeats, whatever its clock says."""
    holder = dataclasses.replace(Holder.me("other"), **change)
    assert holder.is_alive() is alive
    _write(tmp_path, holder)
    storage = open_storage(tmp_path)
    said: list[str] = []
    if alive:
        with pytest.raises(MaskMillError, match="Another run"):
            Lease.acquire(storage, on_lost=_never, notice=said.append)
    else:
        with Lease.acquire(storage, on_lost=_never, notice=said.append) as lease:
            assert json.loads((tmp_path / LEASE_FILE).read_text())["run_id"] == lease.run_id
    assert bool(said) is (alive is None)
    assert all("waiting up to" in line and holder.host in line for line in said)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("skew", [-1e6, 0, 1e6])
def test_a_run_elsewhere_that_gives_signs_of_life_keeps_others_off(tmp_path: Path, skew: float) -> None:
    other = dataclasses.replace(Holder.me("other"), host="elsewhere")
    _write(tmp_path, other)
    done = threading.Event()

    def beat() -> None:
        while not done.wait(0.2):
            _write(tmp_path, dataclasses.replace(other, heartbeat=time.time() + skew))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(MaskMillError, match=r"Another run .* on elsewhere"):
            Lease.acquire(open_storage(tmp_path), on_lost=_never)
    finally:
        done.set()
        thread.join()


@pytest.mark.usefixtures("quick")
def test_a_lease_that_is_released_while_another_run_watches_is_free(tmp_path: Path) -> None:
    _write(tmp_path, dataclasses.replace(Holder.me("other"), host="elsewhere"))
    threading.Timer(0.3, (tmp_path / LEASE_FILE).unlink).start()
    with Lease.acquire(open_storage(tmp_path), on_lost=_never):
        pass


@pytest.mark.parametrize("where", ["local", "s3"])
def test_of_many_that_find_a_dead_lease_one_wins(
    tmp_path: Path, where: str, request: pytest.FixtureRequest
) -> None:
    root = str(tmp_path) if where == "local" else request.getfixturevalue("bucket")
    dead = dataclasses.replace(Holder.me("dead"), pid=2**22 + 1)
    open_storage(root).write_bytes(LEASE_FILE, dead.encoded())
    outcomes: list[object] = []
    barrier = threading.Barrier(6)

    def take() -> None:
        storage = open_storage(root)
        barrier.wait()
        try:
            outcomes.append(Lease.acquire(storage, on_lost=_never))
        except MaskMillError as error:
            outcomes.append(error.code)

    threads = [threading.Thread(target=take) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = (outcome for outcome in outcomes if isinstance(outcome, Lease))
    assert outcomes.count("output_in_use") == 5
    refuse_other_holder(open_storage(root), winner.run_id)


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


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
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


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("where", ["local", "s3"])
def test_heartbeat_and_loss(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    storage = open_storage(tmp_path if where == "local" else request.getfixturevalue("bucket"))
    lost = threading.Event()
    other = Holder.me("other")
    with Lease.acquire(storage, on_lost=lambda _reason: lost.set()) as lease:
        first = storage.read_json(LEASE_FILE)["heartbeat"]
        _wait_until(lambda: storage.read_json(LEASE_FILE)["heartbeat"] > first)
        refuse_other_holder(storage, lease.run_id)
        storage.write_bytes(LEASE_FILE, other.encoded())
        assert lost.wait(30)
        with pytest.raises(MaskMillError, match=f"taken over by process {other.pid}"):
            refuse_other_holder(storage, lease.run_id)
    # The lease of the run that took over is left alone.
    assert storage.read_json(LEASE_FILE)["run_id"] == other.run_id


def test_without_a_lease_nothing_may_be_committed(tmp_path: Path) -> None:
    """Another run may have come and gone."""
    with pytest.raises(MaskMillError, match=f"removed {LEASE_FILE} from"):
        refuse_other_holder(open_storage(tmp_path), "a-run")


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


class _Fault:
    """A storage whose changes to the lease fail, hang, or succeed without an answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.raises: Exception | None = None
        self.hangs = False
        self.calls = 0
        real = Storage.swap_bytes

        def swap(storage: Storage, name: str, old: bytes, new: bytes | None) -> bool:
            self.calls += 1
            while self.hangs:
                time.sleep(0.02)
            if self.raises is not None:
                raise self.raises
            return real(storage, name, old, new)

        monkeypatch.setattr(Storage, "swap_bytes", swap)


class EndpointConnectionError(Exception):
    """Called as botocore's, which storage turns into a MaskMillError."""


FAULTS = [
    OSError("connection reset by peer"),
    FailedWork("storage_unreachable", "cannot reach s3://bucket", "Wait."),
    EndpointConnectionError("could not connect"),
    ValueError("nonsense"),
]


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: type(fault).__name__)
def test_a_fault_shorter_than_the_lease_is_survived(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    storage, faulty = open_storage(tmp_path), _Fault(monkeypatch)
    with Lease.acquire(storage, on_lost=_never) as lease:
        faulty.raises = fault
        _wait_until(lambda: faulty.calls >= 2)  # the thread lives
        faulty.raises = None
        before = storage.read_json(LEASE_FILE)["heartbeat"]
        _wait_until(lambda: storage.read_json(LEASE_FILE)["heartbeat"] > before)
        refuse_other_holder(storage, lease.run_id)
    assert not (tmp_path / LEASE_FILE).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("fault", [*FAULTS, None], ids=lambda fault: type(fault).__name__)
def test_a_run_that_cannot_renew_its_lease_stops_in_words_before_another_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Exception | None
) -> None:
    storage, faulty = open_storage(tmp_path), _Fault(monkeypatch)
    reasons: list[str] = []
    lost = threading.Event()
    began = time.monotonic()

    def stop(reason: str) -> None:
        reasons.append(reason)
        lost.set()

    lease = Lease.acquire(storage, on_lost=stop)
    with pytest.raises(MaskMillError, match="could not be renewed") as caught, lease:
        faulty.raises, faulty.hangs = fault, fault is None
        assert lost.wait(30) and time.monotonic() - began > 1.6
        faulty.hangs = False
        raise KeyboardInterrupt  # what on_lost does to a run
    assert caught.value.code == "output_in_use" and len(reasons) == 1
    if fault is not None:
        assert str(fault).splitlines()[0] in reasons[0]


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_a_heartbeat_whose_answer_was_lost_is_no_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(tmp_path)
    real, calls = Storage.swap_bytes, []

    def swap(self: Storage, name: str, old: bytes, new: bytes | None) -> bool:
        calls.append(real(self, name, old, new))
        if len(calls) == 2:
            raise OSError("the answer was lost")
        return calls[-1]

    with Lease.acquire(storage, on_lost=_never):
        monkeypatch.setattr(Storage, "swap_bytes", swap)
        _wait_until(lambda: len(calls) > 4)
    assert all(calls) and not (tmp_path / LEASE_FILE).exists()


STOPPED = """
import sys, time
from pipeline.files.storage import open_storage
from pipeline.table import lease
lease.LEASE_TTL_S = 2.0
with lease.Lease.acquire(open_storage(sys.argv[1]), on_lost=lambda reason: print(reason, flush=True)) as held:
    print("held", flush=True)
    sys.stdin.read(1)
    try:
        lease.refuse_other_holder(open_storage(sys.argv[1]), held.run_id)
        print("still held", flush=True)
    except lease.FailedWork as error:
        print("fenced", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("taken", [False, True])
def test_a_run_that_was_stopped_goes_on_unless_its_lease_was_taken(tmp_path: Path, taken: bool) -> None:
    """SIGSTOP, or Ctrl-Z, for longer than a lease lives."""
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path)],
        cwd=Path(__file__).parents[3],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        limit = threading.Timer(120, process.kill)
        limit.start()
        try:
            assert process.stdout.readline() == "held\n"
            process.send_signal(signal.SIGSTOP)
            time.sleep(3)
            if taken:
                _write(tmp_path, dataclasses.replace(Holder.me("other"), host="elsewhere"))
            before = (tmp_path / LEASE_FILE).read_bytes()
            process.send_signal(signal.SIGCONT)
            if taken:
                said = process.stdout.readline()  # by its next heartbeat
            else:
                said = ""
                _wait_until(lambda: (tmp_path / LEASE_FILE).read_bytes() != before)
            process.stdin.write("x")
            process.stdin.close()
            said += process.stdout.read()
        finally:
            limit.cancel()
            process.kill()
    assert said.splitlines()[-1] == ("fenced" if taken else "still held")
    assert ("taken over by process" in said) is taken and "could not be renewed" not in said


def test_orphans_are_ended_and_nothing_else() -> None:
    dead = uuid.uuid4().hex  # another process may run this test as well

    def sleeper(run_id: str) -> subprocess.Popen[bytes]:
        code = "import time; time.sleep(60)"
        return subprocess.Popen([sys.executable, "-c", code], env=os.environ | {RUN_ID_VARIABLE: run_id})

    ours, theirs = sleeper(dead), sleeper(uuid.uuid4().hex)
    try:
        deadline = time.time() + 30
        while psutil.Process(ours.pid).environ().get(RUN_ID_VARIABLE) is None and time.time() < deadline:
            time.sleep(0.05)  # between fork and exec the environment is still ours
        assert end_orphans(dead) == 1
        assert not psutil.pid_exists(ours.pid)
        assert theirs.poll() is None
    finally:
        ours.kill()
        theirs.kill()


def test_children_of_orphans_are_ended_with_them() -> None:
    """Ray's agents write their titles over the environment that would tell whose they are."""
    dead = uuid.uuid4().hex
    code = (
        "import os, subprocess, sys, time\n"
        f"del os.environ[{RUN_ID_VARIABLE!r}]\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {RUN_ID_VARIABLE: dead}, stdout=subprocess.PIPE
    ) as marked:
        assert marked.stdout is not None
        child = psutil.Process(int(marked.stdout.readline()))
        assert end_orphans(dead) == 2
        assert not psutil.wait_procs([child], timeout=30)[1]
