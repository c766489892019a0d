"""One run at a time on one output: a lease with a heartbeat in the output.

Without it two runs would label the same images, and each clean up the files that the other is writing. The
lease is a small JSON file. Its holder refreshes it; a lease whose holder is gone (same host: the process is
dead; elsewhere: no heartbeat for ``LEASE_TTL_S``) may be taken over. The run id in it is the fencing token.
"""

from __future__ import annotations

import contextlib
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

from models.errors import Damaged, FailedWork, MaskMillError
from pipeline.files.storage import Storage

LEASE_FILE = "lease.json"
LEASE_TTL_S = 60.0
RUN_ID_VARIABLE = "MASKMILL_RUN_ID"
"""Set in the environment of every process that a run starts, so that its orphans can be found."""
_RUN_ID = r"^[0-9A-Za-z-]{4,64}$"


@dataclass(frozen=True)
class Holder:
    """Who holds a lease.

    Attributes:
        run_id: unique per run.
        host, pid, started: the process; ``started`` (seconds since the epoch) tells a reused pid from it.
        heartbeat: last sign of life, seconds since the epoch on the holder's clock.
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

    def is_alive(self) -> bool:
        """Whether the holder may still be writing."""
        fresh = time.time() - self.heartbeat < LEASE_TTL_S
        if self.host != socket.gethostname():
            return fresh
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 1.0
        except psutil.NoSuchProcess:
            # A cluster takes a moment to notice that a driver is gone and to end its tasks.
            return self.cluster and fresh


_HOLDER = TypeAdapter(Holder)


class Lease:
    """A held lease: ``with Lease.acquire(storage) as lease``.

    Args:
        storage: the output that the lease guards.
        holder: this run.
        on_lost: called once, from the heartbeat thread, when another run has taken the lease over.
        made_folder: whether the output is a folder that this run has made; it is removed if it stays empty.
    """

    def __init__(
        self, storage: Storage, holder: Holder, on_lost: Callable[[], None], *, made_folder: bool = False
    ) -> None:
        self.run_id = holder.run_id
        self._made_folder = made_folder
        self._storage = storage
        self._holder = holder
        self._on_lost = on_lost
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    @classmethod
    def acquire(cls, storage: Storage, *, on_lost: Callable[[], None], cluster: bool = False) -> Lease:
        """Take the lease of an output.

        A lease left by a dead run is taken over, after its processes on this host have been killed: one of
        them could still finish a write.

        Args:
            storage: the output.
            on_lost: see the class.
            cluster: whether this run works on a Ray cluster that outlives it.

        Raises:
            MaskMillError: ``output_in_use`` while another run holds it.
        """
        holder = Holder.me(uuid.uuid4().hex, cluster=cluster)
        made_folder = storage.is_local and not storage.exists()
        if not storage.create_bytes(LEASE_FILE, json.dumps(vars(holder)).encode()):
            other = _read(storage)
            if other is not None and other.is_alive():
                age = max(0.0, time.time() - other.heartbeat)
                raise FailedWork(
                    "output_in_use",
                    f"Another run is writing to {storage.uri}: process {other.pid} on {other.host}, "
                    f"last seen {age:.0f} s ago.",
                    "Wait for it, or stop it, or name another --output. A run that died on another host or a "
                    f"cluster is given up after {LEASE_TTL_S:.0f} s without a sign of life.",
                )
            if other is not None and other.host == socket.gethostname():
                end_orphans(other.run_id)
            # Two runs may have found the same dead lease: the one that looks last before it writes, and still
            # finds its own lease a moment later, has it.
            if _read(storage) == other:
                storage.write_json(LEASE_FILE, vars(holder))
                time.sleep(0.3)
            if _read(storage) != holder:
                raise FailedWork(
                    "output_in_use",
                    f"Another run has just started to write to {storage.uri}.",
                    "Wait for it, or name another --output.",
                )
        return cls(storage, holder, on_lost, made_folder=made_folder)

    def __enter__(self) -> Lease:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        current = _read(self._storage)
        if current is not None and current.run_id == self.run_id:
            self._storage.delete(LEASE_FILE)
            if self._made_folder:
                with contextlib.suppress(OSError):  # it has files
                    os.rmdir(self._storage.path())

    def _beat(self) -> None:
        last = time.time()
        while not self._stop.wait(LEASE_TTL_S / 6):
            try:
                current = _read(self._storage)
                if current is not None and current.run_id != self.run_id:
                    self._on_lost()
                    return
                holder = vars(self._holder) | {"heartbeat": time.time()}
                self._storage.write_json(LEASE_FILE, holder)
                last = time.time()
            except (OSError, MaskMillError):
                # A passing storage fault must not kill a run of days, but a run whose heartbeat is too old
                # must give up: by now another may have taken over.
                if time.time() - last > LEASE_TTL_S * 0.8:
                    self._on_lost()
                    return


def refuse_other_holder(storage: Storage, run_id: str) -> None:
    """Raise ``output_in_use`` if another run than this one holds the lease: it has been taken over."""
    current = _read(storage)
    if current is not None and current.run_id != run_id:
        raise FailedWork(
            "output_in_use",
            f"The lease of {storage.uri} was taken over by process {current.pid} on {current.host}.",
            "Let that run finish, or stop it and run the same command again.",
        )


def _read(storage: Storage) -> Holder | None:
    """The holder that the lease names; None without a lease, or if it is torn or does not make sense."""
    try:
        return _HOLDER.validate_python(storage.read_json(LEASE_FILE, None))
    except (ValidationError, Damaged):
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
