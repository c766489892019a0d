"""The tracker that a job uses to log its run. Calls never wait for the network and never fail.

A call writes an event to the journal (``pipeline.tracking.journal``) and returns. A daemon thread sends the
journal to MLflow (``pipeline.tracking.sender``), retries with growing pauses while the server is unreachable,
and leaves the rest to ``maskmill track --flush``. Only that thread imports MLflow, and only once the run has
data, so that it does not compete with the imports and downloads at the start of a run.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pipeline.files.redaction import command_line, redact
from pipeline.tracking.destination import (
    EXPERIMENT_PREFIX,
    LIVE_TIMEOUT_S,
    URI_VARIABLE,
    reason,
    resolve_uri,
    set_limits,
    shown_uri,
    sqlite_file,
)
from pipeline.tracking.journal import Journal, copy_without_secrets
from pipeline.tracking.names import flatten
from pipeline.tracking.sender import Deleted, Sender

Kind = Literal["label", "evaluate", "benchmark", "train"]
Status = Literal["FINISHED", "FAILED", "KILLED"]
Waiting = Callable[[str], contextlib.AbstractContextManager[Any]]

OFF = "off"
FLUSH_COMMAND = "maskmill track --flush"
SEND_EVERY_S = 2.0
LONGEST_PAUSE_S = 60.0
WAIT_S, WAIT_SQLITE_S = 15.0, 60.0
"""How long ``close`` waits; longer for SQLite, where only a slow disk can delay it."""
LAST_ATTEMPTS = 3
"""Attempts after the end of the run, so that an unreachable server does not delay the exit."""
MAX_VALUE = 5_800
"""MLflow accepts 6,000 characters per parameter; longer ones are attached as files."""


@dataclass(frozen=True)
class TrackedDataset:
    """The images of a run.

    Attributes:
        name: shown in MLflow.
        fingerprint: hash of the content; MLflow shows the first 36 characters as the digest.
        source: path or URI; None if there is no single one.
        profile: facts shown with it, such as the number of images.
        context: its use.
    """

    name: str
    fingerprint: str
    source: str | None = None
    profile: Mapping[str, Any] = field(default_factory=dict)
    context: Literal["labelling", "evaluation", "training"] = "evaluation"


def open_tracker(
    uri: str | None = None,
    *,
    system_metrics: bool = False,
    wait_s: float | None = None,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    waiting: Waiting = contextlib.nullcontext,
) -> Tracker:
    """Create a tracker; imports and contacts nothing.

    Args:
        uri: tracking URI of MLflow; None is MLFLOW_TRACKING_URI, else SQLite in the working directory;
            "off", in either place, records nothing.
        system_metrics: also record the load of this machine.
        wait_s: how long ``close`` may wait; None is ``WAIT_S`` or ``WAIT_SQLITE_S``.
        say: called with the one-line message of ``close``.
        waiting: context in which ``close`` waits, given what for; shows and times it.

    Raises:
        WrongUse: ``wrong_use``.
    """
    if (uri or os.environ.get(URI_VARIABLE)) == OFF:
        return Tracker(None)
    resolved = resolve_uri(uri)
    if wait_s is None:
        wait_s = WAIT_S if sqlite_file(resolved) is None else WAIT_SQLITE_S
    return Tracker(resolved, system_metrics=system_metrics, wait_s=wait_s, say=say, waiting=waiting)


class Tracker:
    """Records one run: call ``start`` once and ``close`` once, or use it as a context manager.

    Args:
        uri: resolved tracking URI; None records nothing.
        system_metrics: see ``open_tracker``.
        wait_s: see ``open_tracker``.
        say: see ``open_tracker``.
        waiting: see ``open_tracker``.
    """

    def __init__(
        self,
        uri: str | None,
        *,
        system_metrics: bool = False,
        wait_s: float = WAIT_S,
        say: Callable[[str], None] = lambda line: None,
        waiting: Waiting = contextlib.nullcontext,
    ) -> None:
        self._uri = uri
        self._system_metrics = system_metrics
        self._wait_s = wait_s
        self._say = say
        self._waiting = waiting
        self._journal: Journal | None = None
        self._sender: Sender | None = None
        self._thread: threading.Thread | None = None
        self._params: set[str] = set()
        self._problems: list[str] = []
        self._ready, self._closing, self._leave = threading.Event(), threading.Event(), threading.Event()
        self._outcome: Literal["sent", "deleted"] | None = None
        self._trouble = "no answer in time"
        self._name = self._experiment = ""

    @property
    def on(self) -> bool:
        """Whether runs are recorded at all."""
        return self._uri is not None

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run, once the server has assigned it."""
        return None if self._sender is None else self._sender.run_id

    def start(
        self,
        kind: Kind,
        name: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        dataset: TrackedDataset | None = None,
    ) -> None:
        """Open the run in the experiment ``maskmill-KIND``.

        Args:
            kind: kind of job.
            name: name of the run.
            params: see ``log_params``.
            tags: further tags.
            dataset: see ``log_dataset``.
        """
        if self._uri is None:
            return
        assert self._journal is None and not self._closing.is_set(), "a tracker starts once"
        self._name, self._experiment = name, f"{EXPERIMENT_PREFIX}{kind}"
        command = command_line()
        with contextlib.suppress(Exception):  # in some containers the user id has no name
            tags = {"mlflow.user": getpass.getuser(), **(tags or {})}
        opening = {
            "do": "open",
            "time": _now(),
            "uri": self._uri,
            "experiment": self._experiment,
            "name": name,
            "key": uuid.uuid4().hex,
            "tags": {
                "maskmill.kind": kind,
                "maskmill.command": command[:MAX_VALUE],
                "mlflow.source.type": "LOCAL",
                "mlflow.source.name": f"maskmill {kind}",
                **(tags or {}),
            },
        }
        try:
            self._journal = Journal.create(opening)
        except OSError as error:
            self._problems.append(f"nothing can be recorded: {reason(error)}")
            return
        set_limits(LIVE_TIMEOUT_S)
        self._sender = Sender(self._journal, self._uri, stop=self._leave.is_set)
        self.log_params({"command": command, **(params or {})})
        if dataset is not None:
            self.log_dataset(dataset)
        self._thread = threading.Thread(
            target=self._send, args=(self._journal, self._sender), name="tracking", daemon=True
        )
        self._thread.start()

    def wait_for_run(self, timeout_s: float) -> str | None:
        """Wait until the server has assigned an id to the run; None if that takes too long."""
        self._ready.set()
        deadline = time.monotonic() + timeout_s
        while self.run_id is None and self._thread is not None and time.monotonic() < deadline:
            time.sleep(0.1)
        return self.run_id

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested ones get dotted names. The first value of a name wins."""
        new = {key: value for key, value in flatten(params).items() if key not in self._params}
        self._params |= new.keys()
        for key, value in new.items():
            if len(value) > MAX_VALUE:
                file = f"{key.replace('/', '_')}.txt"
                self._attach(file, partial(_write, name=file, text=redact(value)), "params")
                new[key] = f"{value[:MAX_VALUE]}… (whole: params/{file})"
        if new:
            self._record("params", values=new)

    def log_metrics(self, metrics: Mapping[str, float | None], step: int | None = None) -> None:
        """Record metrics; None is skipped. Use ``names.key_part`` for valid names."""
        values = {key: float(value) for key, value in metrics.items() if value is not None}
        if values:
            self._record("metrics", values=values, step=step or 0)
            self._ready.set()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a new value replaces the old one."""
        self._record("tags", values={key: str(value)[:MAX_VALUE] for key, value in tags.items()})

    def log_dataset(self, dataset: TrackedDataset) -> None:
        """Record the images of the run, as parameters and as an input of the run."""
        facts = {"name": dataset.name, "fingerprint": dataset.fingerprint}
        self.log_params({"dataset": {**facts, **dataset.profile}})
        rest = {"source": dataset.source, "profile": dict(dataset.profile), "context": dataset.context}
        self._record("dataset", **facts, **rest)

    def log_artifact(self, path: str | os.PathLike[str], folder: str | None = None) -> None:
        """Attach a copy of a local file or folder.

        Args:
            path: the file or folder.
            folder: artifact folder; None is the root.
        """
        source = Path(path)
        self._attach(source.name, partial(copy_without_secrets, source), folder)
        self._ready.set()

    def close(self, status: Status = "FINISHED") -> None:
        """End the run, wait briefly for unsent events, and say in one line where the run is."""
        if self._closing.is_set():
            return
        self._record("end", status=status)
        self._closing.set()
        self._ready.set()
        if self._thread is not None:
            with self._waiting("sending the run to MLflow"):
                self._thread.join(self._wait_s)
        self._leave.set()
        if self._journal is not None or self._problems:
            self._say(self._line())

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stopped = kind is not None and not issubclass(kind, Exception)
        self.close("FINISHED" if kind is None else "KILLED" if stopped else "FAILED")

    def _attach(self, name: str, fill: Callable[[Path], object], folder: str | None) -> None:
        if self._journal is None or self._leave.is_set():
            return
        try:
            files = self._journal.keep(fill)
        except OSError as error:
            self._problems.append(f"{name} could not be attached: {reason(error)}")
            return
        self._record("artifact", files=files, folder=folder)

    def _record(self, do: str, **content: Any) -> None:
        if self._journal is None or self._leave.is_set():
            return
        try:
            self._journal.append({"do": do, "time": _now(), **content})
        except OSError as error:
            problem = f"not all of it could be recorded: {reason(error)}"
            if problem not in self._problems:
                self._problems.append(problem)

    def _send(self, journal: Journal, sender: Sender) -> None:
        """Send until the run is closed and fully delivered; runs in the thread."""
        self._note_git()
        self._ready.wait()
        done = self._watch_load()
        failures, last_attempts = 0, LAST_ATTEMPTS
        try:
            while self._outcome is None and not self._leave.is_set():
                closing = self._closing.is_set()
                try:
                    if sender.send():
                        self._outcome = "sent"
                    elif closing:
                        self._trouble = "the end of the run could not be recorded"
                        break
                    failures = 0
                except Deleted:
                    self._outcome = "deleted"
                except Exception as error:  # nothing that fails here may harm the run
                    self._trouble = reason(error)
                    failures += 1
                    last_attempts -= closing
                    if not last_attempts:
                        break
                if self._outcome is None:
                    pause = min(0.25 * 2**failures, LONGEST_PAUSE_S) if failures else SEND_EVERY_S
                    # The end of the run cuts a pause short; after that, only the timeout of ``close`` does.
                    (self._leave if closing else self._closing).wait(pause)
            if self._outcome is not None:
                journal.discard()
        finally:
            done.set()
            journal.close()

    def _line(self) -> str:
        """One line on where the run is, or what happened to it."""
        uri = shown_uri(self._uri or "")
        where = f"run {self._name} in {self._experiment}, {uri}"
        extra = [*self._problems, *(self._sender.refused if self._sender else [])]
        notes = f" ({len(extra)} problem(s), first: {extra[0]})" if extra else ""
        if self._journal is None or self._sender is None:
            return f"Not tracked{notes}"
        if self._outcome == "deleted":
            return f"Not tracked: the {where} was deleted in MLflow meanwhile{notes}"
        if self._outcome is None:
            return (
                f"Not all of the run reached {uri} ({self._trouble}); it is kept in "
                f"{self._journal.folder}. Send it with: {FLUSH_COMMAND}{notes}"
            )
        look = "maskmill runs"
        if uri.startswith(("http://", "https://")):
            server = uri.replace("***@", "").rstrip("/")
            look = f"{server}/#/experiments/{self._sender.experiment_id}/runs/{self._sender.run_id}"
        elif sqlite_file(self._uri or "") is not None:
            look = f"mlflow ui --backend-store-uri {uri}"
        return f"Tracked: {where}. Look at it: {look}{notes}"

    def _note_git(self) -> None:
        """Record the git state of the working directory, if there is one."""
        commit = _git("rev-parse", "HEAD")
        if commit is None:
            return
        branch = _git("rev-parse", "--abbrev-ref", "HEAD") or ""
        changes = _git("status", "--porcelain", "--untracked-files=no")
        dirty = "unknown" if changes is None else str(bool(changes)).lower()
        git = {"commit": commit, "branch": branch, "dirty": dirty}
        self.set_tags({f"mlflow.source.git.{key}": value for key, value in git.items()})
        self.log_params({"git": git})

    def _watch_load(self) -> threading.Event:
        """Record the load of this machine until the returned event is set, if enabled."""
        done = threading.Event()
        if self._system_metrics:
            from pipeline.tracking.load import watch_load

            threading.Thread(
                target=watch_load, args=(self.log_metrics, done), name="tracking-load", daemon=True
            ).start()
        return done


def _write(folder: Path, *, name: str, text: str) -> None:
    (folder / name).write_text(text, encoding="utf-8", errors="replace")


def _now() -> int:
    """Milliseconds since the epoch."""
    return int(time.time() * 1000)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
