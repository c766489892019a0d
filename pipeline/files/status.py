"""``status.json``: what a job does now, written beside its output, for whoever looks at it from elsewhere.

A job says what it does (``StatusFile.update``), which costs no more than an assignment. A thread of its own
writes that every few seconds, which is also the job's sign of life, and once more at the end. No fault of the
storage reaches the job: a status that cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Literal

import psutil
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.files.faults import explain, one_line
from pipeline.files.records import find_record, now
from pipeline.files.redaction import redact
from pipeline.files.storage import Storage

STATUS_FILE = "status.json"
STATUS_VERSION = 1
HEARTBEAT_S = 5.0
"""Seconds between two writes."""
DEAD_AFTER_S = 60.0
"""A job on another host that has not written for so long is taken for dead."""
LAST_WRITE_S = 10.0
"""How long the end of a job waits for its last write."""

Outcome = Literal["ok", "failed", "stopped"]
Life = Literal["running", "finished", "dead"]
_LONGEST = 500
"""Characters of a message."""


class Status(BaseModel):
    """What a job does now, or how it ended.

    Attributes:
        schema_version: of this record.
        job: the command: label, train maskclip-plus, export, …
        run_id: of the run; ``lease.json`` and the logs of the run have the same.
        host, pid, process_started: the process; ``process_started`` (seconds since the epoch) tells a reused
            pid from it.
        started, updated: begin and last sign of life, UTC in ISO 8601, on the clock of ``host``.
        stage: what is done now, in words.
        done, total, unit: how much of it is done, in images, steps, files, …
        per_second: units per second lately.
        eta_s: seconds left, estimated when ``updated``.
        failures: number of failed images, by code.
        figures: other figures, such as ``loss``.
        mlflow_run: id of the run in MLflow.
        finished: how the job ended; None while it runs.
        error: code of the error that ended it.
        message: what ended it, or what else there is to say.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    job: str = Field(min_length=1)
    run_id: str = Field(min_length=1)
    host: str
    pid: int = Field(gt=0)
    process_started: float
    started: str
    updated: str
    stage: str = ""
    done: NonNegativeInt | None = None
    total: NonNegativeInt | None = None
    unit: str = ""
    per_second: float | None = None
    eta_s: float | None = None
    failures: dict[str, int] = {}
    figures: dict[str, float | None] = {}
    mlflow_run: str | None = None
    finished: Outcome | None = None
    error: str | None = None
    message: str = ""

    @property
    def age_s(self) -> float:
        """Seconds since the last sign of life; negative if the clock of ``host`` is ahead of this one."""
        then = datetime.fromisoformat(self.updated.replace("Z", "+00:00"))
        return (datetime.now(timezone.utc) - then).total_seconds()

    def life(self) -> Life:
        """Whether the job runs, has ended, or ended without a word.

        On its own host the process tells; elsewhere, ``DEAD_AFTER_S`` without a sign of life do.
        """
        if self.finished is not None:
            return "finished"
        if self.host == socket.gethostname():
            try:
                alive = abs(psutil.Process(self.pid).create_time() - self.process_started) < 1.0
            except psutil.NoSuchProcess:
                alive = False
            return "running" if alive else "dead"
        return "running" if self.age_s < DEAD_AFTER_S else "dead"


def read_status(storage: Storage, name: str = STATUS_FILE) -> Status | None:
    """The status beside an output; None if there is none.

    Raises:
        MaskMillError: ``newer_version``; ``file_damaged`` if the file is no status.
    """
    remedy = "It is written anew by the next run; another program's file must have another name."
    return find_record(Status, storage, name, STATUS_VERSION, remedy=remedy)


class StatusFile:
    """Keeps ``status.json`` of a running job: ``with StatusFile(storage, "label", run_id) as status``.

    Nothing is written before ``begin``. A command that is refused (``WrongUse``), or that fails before it has
    made anything, leaves what was there before. A file of that name that is no status is somebody else's, and
    left alone.

    Args:
        storage: the output, which this run owns while the context is open.
        job: the command.
        run_id: of the run.
        fence: called before every write; what it raises keeps the file as it is (``refuse_other_holder``).
        notice: called with what the user should know.
        every_s: seconds between two writes.
    """

    def __init__(
        self,
        storage: Storage,
        job: str,
        run_id: str,
        *,
        fence: Callable[[], None] = lambda: None,
        notice: Callable[[str], None] = lambda _text: None,
        every_s: float = HEARTBEAT_S,
    ) -> None:
        self._storage = storage
        self._fence = fence
        self._notice = notice
        self._every_s = every_s
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._refused = self._failed = False
        self._status = Status(
            job=job,
            run_id=run_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            process_started=psutil.Process().create_time(),
            started=now(),
            updated=now(),
        )

    def __enter__(self) -> StatusFile:
        return self

    def begin(self) -> None:
        """Start to write: what the job needs is there, and its work begins."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._write_on, name="status", daemon=True)
            self._thread.start()

    def update(self, *, stage: str | None = None, **values: Any) -> None:
        """Say what the job does now; never blocks, never fails on account of the storage.

        Args:
            stage: what is done now. The count, rate and estimate of the stage before are forgotten.
            values: fields of ``Status``: ``done``, ``total``, ``unit``, ``per_second``, ``eta_s``,
                ``failures``, ``figures``, ``mlflow_run``, ``message``.
        """
        if stage is not None and stage != self._status.stage:
            values = {"done": None, "total": None, "unit": "", "per_second": None, "eta_s": None} | values
            values["stage"] = _public(stage)
        if "message" in values:
            values["message"] = _public(values["message"])
        self._set(values)

    def finish(self, outcome: Outcome, message: str = "", *, error: str | None = None) -> None:
        """Say how the job ends, where leaving the context does not tell.

        Args:
            outcome: how it ended.
            message: for people.
            error: code of the error.
        """
        self._set({"finished": outcome, "message": _public(message), "error": error, "eta_s": None})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._refused, self._failed = isinstance(error, WrongUse), error is not None
        if self._status.finished is None or error is not None:
            self.finish(*_end(error), error=_code(error))
        self._over.set()
        if self._thread is not None:
            # A storage that hangs must not hang the end of a job.
            self._thread.join(LAST_WRITE_S)

    def _set(self, values: Mapping[str, Any]) -> None:
        with self._lock:
            self._status = self._status.model_copy(update=values)

    def _write_on(self) -> None:
        before: Status | None = None
        known = False
        while True:
            over = self._over.is_set()
            try:
                if not known:
                    before, known = read_status(self._storage), True
                    self._tidy()
                self._fence()
                with self._lock:
                    status = self._status
                if not (self._refused or (over and before is None and self._made_nothing())):
                    _write(self._storage, status)
                elif before is None:
                    self._storage.delete(STATUS_FILE)
                else:
                    _write(self._storage, before, updated=before.updated)
            except Exception as error:  # another process owns the output, or it is out of reach
                if isinstance(error, MaskMillError) and error.code in ("file_damaged", "newer_version"):
                    place = self._storage.uri_of(STATUS_FILE)
                    self._notice(f"{place} is not MaskMill's: no status is written.")
                    return
            if over:
                return
            self._over.wait(self._every_s)

    def _made_nothing(self) -> bool:
        """Whether a job that failed leaves nothing but this file, and its lease, which goes."""
        there = {name.rstrip("/") for name in self._storage.glob("*")}
        return self._failed and there <= {STATUS_FILE, "lease.json"}

    def _tidy(self) -> None:
        """Remove what a kill in the middle of a write left; objects appear whole."""
        if self._storage.is_local:
            for name in self._storage.list():
                if name.startswith(f".{STATUS_FILE}.") and name.endswith(".tmp"):
                    self._storage.delete(name)


def settle_status(storage: Storage) -> None:
    """Mark the status of a run that was killed as done, once its work has turned out to be complete.

    Call it while holding the lease of the output; a storage that cannot be written leaves it as it is.
    """
    with contextlib.suppress(Exception):
        status = read_status(storage)
        if status is not None and status.finished is None:
            ended = {"finished": "ok", "eta_s": None, "message": "nothing was left to do"}
            _write(storage, status.model_copy(update=ended))


def _write(storage: Storage, status: Status, *, updated: str | None = None) -> None:
    text = status.model_copy(update={"updated": updated or now()}).model_dump_json(indent=2)
    storage.write_bytes(STATUS_FILE, text.encode() + b"\n")


def _end(error: BaseException | None) -> tuple[Outcome, str]:
    if error is None:
        return "ok", ""
    if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
        return "stopped", "It was stopped; finished work is kept."
    if isinstance(error, SystemExit):
        return ("failed" if error.code else "ok"), ""
    told = explain(error) if isinstance(error, Exception) else None
    return "failed", one_line(error) if told is None else told.message


def _code(error: BaseException | None) -> str | None:
    if not isinstance(error, Exception):
        return None
    told = explain(error) or FailedWork("internal", "", "")
    return told.code


def _public(text: str) -> str:
    """One line without secrets, and not too long."""
    return redact(" ".join(str(text).split()), assignments=False)[:_LONGEST]
