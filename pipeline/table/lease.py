"""One run at a time on one output: a lease with a heartbeat in the output.

Without it two runs would label the same images, and each clean up the files that the other is writing. The
lease is a small JSON file that is only ever changed by compare-and-swap (``Storage.swap_bytes``), so that of
two runs that want it one has it. Its holder refreshes it. A lease whose holder is gone may be taken over: on
this host, when the process is dead; elsewhere, when the lease has not changed for ``LEASE_TTL_S`` while this
run watched it, so that the clocks of hosts need not agree. The run id in it is the fencing token that every
commit checks (``refuse_other_holder``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Annotated

import psutil
from pydantic import Field, FiniteFloat, StringConstraints, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from models.errors import FailedWork
from pipeline.files.storage import Storage

LEASE_FILE = "lease.json"
LEASE_TTL_S = 60.0
"""How long a lease is valid without a heartbeat."""
GIVE_UP_AFTER = 0.8
"""Share of that time after which a holder that cannot reach its lease stops, before another takes over."""
BEATS = 6
"""Heartbeats in that time."""
RUN_ID_VARIABLE = "MASKMILL_RUN_ID"
"""Set in the environment of every process that a run starts, so that its orphans can be found."""
_RUN_ID = r"^[0-9A-Za-z-]{4,64}$"


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        run_id: unique per run.
        host, pid, started: the process; ``started`` (seconds since the epoch) tells a reused pid from it.
        heartbeat: last sign of life, seconds since the epoch on the holder's clock: for people to read, and
            so that each heartbeat changes the file. It is never compared with the clock of another host.
        cluster: whether it works on a Ray cluster that outlives it.
    """

    run_id: Annotated[str, StringConstraints(pattern=_RUN_ID)]
    host: Annotated[str, StringConstraints(min_length=1)]
    pid: Annotated[int, Field(gt=0)]
    started: FiniteFloat
    heartbeat: FiniteFloat
    cluster: bool = False

    @classmethod
    def me(cls, run_id: str, *, cluster: bool = False) -> Holder:
        """This process, alive now."""
        started = psutil.Process().create_time()
        return cls(run_id, socket.gethostname(), os.getpid(), started, time.time(), cluster)

    def is_alive(self) -> bool | None:
        """Whether the holder may still be writing; None if only its heartbeat can tell."""
        if self.host != socket.gethostname():
            return None
        try:
            if abs(psutil.Process(self.pid).create_time() - self.started) < 1.0:
                return True
        except psutil.NoSuchProcess:
            pass
        # A cluster takes a moment to notice that a driver is gone and to end its tasks. Here, clocks agree.
        return None if self.cluster and abs(time.time() - self.heartbeat) < LEASE_TTL_S else False

    def encoded(self) -> bytes:
        """As the content of the lease file."""
        return json.dumps(vars(self), indent=2).encode()


_HOLDER = TypeAdapter(Holder)


class Lease:
    """A held lease: ``with Lease.acquire(storage) as lease``.

    Leaving it after it was lost raises ``output_in_use`` in place of the interrupt that ``on_lost`` caused.

    Args:
        storage: the output that the lease guards.
        holder: this run.
        on_lost: called once, from another thread, with the reason, when another run has taken the lease over
            or may do so soon because the storage cannot be reached.
        made_folder: whether the output is a folder that this run has made; it is removed if it stays empty.
    """

    def __init__(
        self,
        storage: Storage,
        holder: Holder,
        on_lost: Callable[[str], None],
        *,
        made_folder: bool = False,
    ) -> None:
        self.run_id = holder.run_id
        self._made_folder = made_folder
        self._storage = storage
        self._holder = holder
        self._on_lost = on_lost
        self._fault = ""
        self._last = time.monotonic()
        self._lost = ""
        self._losing = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name="lease", daemon=True) for work in (self._beat, self._watch)
        ]

    @classmethod
    def acquire(
        cls,
        storage: Storage,
        *,
        on_lost: Callable[[str], None],
        cluster: bool = False,
        notice: Callable[[str], None] = lambda _text: None,
    ) -> Lease:
        """Take the lease of an output.

        A lease left by a dead run is taken over, after its processes on this host have been killed: one of
        them could still finish a write. Whether a run elsewhere is dead is seen after ``LEASE_TTL_S``.

        Args:
            storage: the output.
            on_lost: see the class.
            cluster: whether this run works on a Ray cluster that outlives it.
            notice: called with what this run waits for.

        Raises:
            MaskMillError: ``output_in_use`` while another run holds it.
        """
        made_folder = storage.is_local and not storage.exists()
        holder = Holder.me(uuid.uuid4().hex, cluster=cluster)
        while not storage.create_bytes(LEASE_FILE, holder.encoded()):
            found = _content(storage)
            if found == holder.encoded():  # the answer was lost on the way, and the request sent again
                break
            if found is None:  # just released
                continue
            other = _parsed(found)
            alive = other is not None and other.is_alive()
            if other is not None and alive is None:
                notice(
                    f"Process {other.pid} on {other.host} was writing to {storage.uri}: waiting up to "
                    f"{LEASE_TTL_S:.0f} s for a sign of life."
                )
                alive = _changes(storage, found)
                if alive and _content(storage) is None:
                    continue
            if other is not None and alive:
                raise FailedWork(
                    "output_in_use",
                    f"Another run is writing to {storage.uri}: process {other.pid} on {other.host}.",
                    "Wait for it, or stop it, or name another --output. A run that died elsewhere is noticed "
                    f"after {LEASE_TTL_S:.0f} s without a sign of life.",
                )
            if other is not None and other.host == socket.gethostname():
                end_orphans(other.run_id)
            holder = Holder.me(holder.run_id, cluster=cluster)
            if storage.swap_bytes(LEASE_FILE, found, holder.encoded()):
                break
            if _content(storage) is not None:
                raise FailedWork(
                    "output_in_use",
                    f"Another run has just started to write to {storage.uri}.",
                    "Wait for it, or name another --output.",
                )
        return cls(storage, holder, on_lost, made_folder=made_folder)

    def __enter__(self) -> Lease:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(LEASE_TTL_S / BEATS)  # a storage that hangs must not hang the end of a run
        if self._lost:
            if isinstance(error, KeyboardInterrupt):
                raise lost_lease(self._lost) from None
            return
        # If the storage is out of reach, the lease stays, and is taken over in time.
        with contextlib.suppress(Exception):
            current = _content(self._storage)
            if (
                self._is_mine(current)
                and self._storage.swap_bytes(LEASE_FILE, current or b"", None)
                and self._made_folder
            ):
                os.rmdir(self._storage.path())  # it fails if there are files

    def _beat(self) -> None:
        while not self._stop.wait(LEASE_TTL_S / BEATS):
            try:
                current = _content(self._storage)
                if not self._is_mine(current):
                    self._lose(_taken_over(self._storage))
                    return
                assert current is not None
                now = dataclasses.replace(self._holder, heartbeat=time.time())
                if self._storage.swap_bytes(LEASE_FILE, current, now.encoded()):
                    self._last, self._fault = time.monotonic(), ""
            except Exception as fault:
                # Whatever it is, a passing fault of the storage must end neither a run of days nor this
                # thread.
                self._fault = " ".join(str(fault).split()) or type(fault).__name__

    def _watch(self) -> None:
        """A request that hangs must not keep this run from stopping before another one takes over."""
        every = LEASE_TTL_S / BEATS / 4
        looked = time.monotonic()
        while not self._stop.wait(every):
            now = time.monotonic()
            if now - looked > LEASE_TTL_S / BEATS:
                # This process was stopped for a while: its next heartbeat tells whose the lease is now.
                self._last = now
            looked = now
            if now - self._last > LEASE_TTL_S * GIVE_UP_AFTER:
                why = f": {self._fault}" if self._fault else ""
                silent = f"{now - self._last:.0f} s"
                self._lose(f"The lease of {self._storage.uri} could not be renewed for {silent}{why}.")
                return

    def _is_mine(self, content: bytes | None) -> bool:
        holder = _parsed(content)
        return holder is not None and holder.run_id == self.run_id

    def _lose(self, reason: str) -> None:
        with self._losing:
            if self._lost or self._stop.is_set():
                return
            self._lost = reason
        self._on_lost(reason)


def lost_lease(reason: str) -> FailedWork:
    """The error of a run that stopped because its lease was lost."""
    return FailedWork(
        "output_in_use",
        reason,
        "This run has stopped, and finished work is kept. Run the same command again; if another run has the "
        "output, wait for it or stop it first.",
    )


def refuse_other_holder(storage: Storage, run_id: str) -> None:
    """Raise ``output_in_use`` unless this run holds the lease: call it before every commit."""
    current = _parsed(_content(storage))
    if current is None or current.run_id != run_id:
        raise FailedWork(
            "output_in_use",
            _taken_over(storage),
            "Let that run finish, or stop it and run the same command again.",
        )


def read_holder(storage: Storage) -> Holder | None:
    """Who holds the lease of an output, dead or alive; None if nobody does."""
    return _parsed(_content(storage))


def _taken_over(storage: Storage) -> str:
    content = _content(storage)
    if content is None:
        return f"Somebody has removed {LEASE_FILE} from {storage.uri}, or the whole of it."
    current = _parsed(content)
    by = f"process {current.pid} on {current.host}" if current else "another run"
    return f"The lease of {storage.uri} was taken over by {by}."


def _changes(storage: Storage, content: bytes) -> bool:
    """Whether somebody changes the lease within ``LEASE_TTL_S``."""
    end = time.monotonic() + LEASE_TTL_S
    while time.monotonic() < end:
        time.sleep(LEASE_TTL_S / BEATS / 4)
        if _content(storage) != content:
            return True
    return False


def _content(storage: Storage) -> bytes | None:
    try:
        return storage.read_bytes(LEASE_FILE)
    except FileNotFoundError:
        return None


def _parsed(content: bytes | None) -> Holder | None:
    """The holder that a lease names; None without a lease, or if it is torn or does not make sense."""
    try:
        return None if content is None else _HOLDER.validate_json(content)
    except ValidationError:
        return None


def end_orphans(run_id: str, *, timeout_s: float = 20.0) -> int:
    """Kill the processes that a dead run left on this host, and wait until they are gone.

    Only processes of this user count, and only those that carry the run's id.

    Args:
        run_id: of the dead run. Its processes have it in their environment, or are children of those that
            do: Ray's agents overwrite their environment with their titles. Anything that is no run id names
            no process.
        timeout_s: how long to wait for them.

    Returns:
        How many there were.
    """
    if not re.match(_RUN_ID, run_id):
        return 0
    me = psutil.Process()
    orphans = []
    for process in psutil.process_iter():
        try:
            if process == me or process.uids().real != me.uids().real:
                continue
            if process.environ().get(RUN_ID_VARIABLE) == run_id:
                for member in (*process.children(recursive=True), process):
                    if member == me:
                        continue
                    orphans.append(member)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.kill()
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    psutil.wait_procs(orphans, timeout=timeout_s)
    return len(orphans)
