"""Send journals to MLflow, for a running job and for ``maskmill track --flush``.

A journal may be sent again from its start until it is confirmed, so sending must be idempotent:

- A run is identified by a tag with a random key from its journal (``maskmill.key``), and searched for before
  it is created. A create request that timed out may still be executed later. Of several runs with the key,
  the one with data stays, and the others are deleted at the end.
- A metric carries the time and step of its event; MLflow stores the same (key, value, time, step) once.
- Parameters, tags, inputs and files overwrite themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pipeline.tracking.destination import (
    FLUSH_TIMEOUT_S,
    artifact_location,
    connect,
    reason,
    set_limits,
    shown_uri,
    with_credentials,
)
from pipeline.tracking.journal import Event, Journal, pending

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

KEY_TAG = "maskmill.key"
BATCH = {"params": 20, "tags": 20, "metrics": 500}
"""Items per request: MLflow accepts 1 MB, and a parameter or tag may have 6,000 characters."""
MAX_DIGEST = 36
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"})
REFUSED_HTTP = frozenset({400, 413, 415, 422})
PAUSES_S = (0.5, 1.5)
"""Pauses between the attempts of a flush."""

State = Literal["waiting", "running", "sent", "kept", "gone"]
T = TypeVar("T")


class Deleted(Exception):
    """The run was deleted in MLflow."""


class Sender:
    """Sends one journal.

    Args:
        journal: locked by this process.
        uri: resolved tracking URI, including any credentials.
        stop: called between requests; True ends ``send``.
    """

    def __init__(self, journal: Journal, uri: str, *, stop: Callable[[], bool] = lambda: False) -> None:
        self.refused: list[str] = []
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._journal = journal
        self._uri = uri
        self._stop = stop
        self._offset = 0
        self._end: Event | None = None
        self._last_time = 0
        self._client: MlflowClient | None = None

    def send(self, *, died: bool = False) -> bool:
        """Send the events that have not been confirmed yet.

        Args:
            died: the run's process is gone, so a journal without an end gets the status ``KILLED``.

        Returns:
            Whether the run is closed and fully delivered.

        Raises:
            Deleted: the run was deleted in MLflow.
            Exception: whatever MLflow raises when unreachable; retry later.
        """
        from mlflow.exceptions import MlflowException

        try:
            client = self._client = self._client or connect(self._uri)
            if self.run_id is None:
                self._choose_run(client, create=True)
            self._send_events(client, str(self.run_id))
            if self._stop() or not (self._end or died):
                return False
            self._choose_run(client, create=False)
            end = self._end or {"status": "KILLED", "time": self._last_time}
            client.set_terminated(self.run_id, end["status"], end["time"])
            return True
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":  # the server has another database now
                self.run_id, self._offset = None, 0
            raise

    def _send_events(self, client: MlflowClient, run_id: str) -> None:
        batch: list[Event] = []
        for event, position in self._journal.read(self._offset):
            if self._stop():
                return
            if event["do"] in BATCH:
                batch.append(event)
            if event["do"] not in BATCH or len(batch) == BATCH["metrics"]:
                self._send_batch(client, run_id, batch)
                batch = []
            if event["do"] == "artifact":
                folder = str(self._journal.kept(event["files"]))
                self._deliver([folder], partial(_log_artifacts, client, run_id, event["folder"]))
            elif event["do"] == "dataset":
                self._deliver([_dataset_input(event)], partial(client.log_inputs, run_id))
            elif event["do"] == "end":
                self._end = event
            self._last_time = event["time"]
            if not batch:
                self._offset = position
        if batch:
            self._send_batch(client, run_id, batch)
            self._offset = position

    def _send_batch(self, client: MlflowClient, run_id: str, events: list[Event]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        items: dict[str, list[Any]] = {"params": [], "tags": [], "metrics": []}
        for event in events:
            for key, value in event["values"].items():
                if event["do"] == "metrics":
                    items["metrics"].append(Metric(key, value, event["time"], event["step"]))
                else:
                    items[event["do"]].append((Param if event["do"] == "params" else RunTag)(key, value))
        for kind, size in BATCH.items():
            for start in range(0, len(items[kind]), size):
                self._deliver(items[kind][start : start + size], partial(_log_batch, client, run_id, kind))

    def _deliver(self, items: list[T], call: Callable[[list[T]], Any]) -> None:
        """Send items. Those that MLflow will never accept are noted as refused and do not block others."""
        try:
            call(items)
        except Exception as error:
            if not _is_refusal(error):
                raise
            assert self._client is not None
            if self._client.get_run(self.run_id).info.lifecycle_stage != "active":
                raise Deleted("the run was deleted in MLflow") from None
            if len(items) == 1:
                self.refused.append(f"{getattr(items[0], 'key', items[0])}: {reason(error)}")
                return
            middle = len(items) // 2
            self._deliver(items[:middle], call)
            self._deliver(items[middle:], call)

    def _choose_run(self, client: MlflowClient, *, create: bool) -> None:
        """Find the run by its key, or create it; deletes duplicates."""
        from mlflow.entities import ViewType

        event, _ = next(self._journal.read())
        self.experiment_id = self._experiment(client, event["experiment"])
        query = f"tags.`{KEY_TAG}` = '{event['key']}'"
        found = client.search_runs([self.experiment_id], query, ViewType.ALL)
        if not found and create:
            tags = event["tags"] | {KEY_TAG: event["key"]}
            client.create_run(self.experiment_id, event["time"], tags, event["name"])
            found = client.search_runs([self.experiment_id], query, ViewType.ALL)
        if not found:
            self.run_id, self._offset = None, 0
            raise RuntimeError(f"run {event['name']!r} is no longer there")
        active = [run for run in found if run.info.lifecycle_stage == "active"]
        if not active:
            raise Deleted(f"run {event['name']!r} was deleted in MLflow")
        # The current run, else the one that an earlier attempt wrote to.
        chosen = max(active, key=lambda run: (run.info.run_id == self.run_id, len(run.data.params)))
        if chosen.info.run_id != self.run_id:
            self.run_id, self._offset = chosen.info.run_id, 0
            if not create:
                raise RuntimeError(f"run {event['name']!r} has to be sent again")
        for run in active:
            if run is not chosen:
                client.delete_run(run.info.run_id)

    def _experiment(self, client: MlflowClient, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(client.create_experiment(name, artifact_location(self._uri, name)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = client.get_experiment_by_name(name)  # another run created it first
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(
                f"experiment {name} is deleted; bring it back: "
                f"mlflow experiments restore -x {experiment.experiment_id}"
            )
        return str(experiment.experiment_id)


@dataclass(frozen=True)
class UnsentRun:
    """A run whose journal is still on this machine.

    Attributes:
        name: of the run.
        experiment: of the run.
        uri: its destination, without secrets.
        folder: folder of its journal.
        started: seconds since the epoch.
        state: ``waiting`` to be sent; ``running``: its process or another flush holds it; ``sent``;
            ``kept``: could not be sent; ``gone``: deleted in MLflow, so its journal was dropped.
        detail: why it was kept, or what MLflow refused.
    """

    name: str
    experiment: str
    uri: str
    folder: Path
    started: float
    state: State
    detail: str = ""


def unsent_runs() -> list[UnsentRun]:
    """The runs that are not fully sent, oldest first; sends nothing."""
    runs = []
    for folder, event in pending():
        journal = Journal.take(folder)
        if journal is not None:
            journal.close()
        runs.append(_describe(folder, event, "running" if journal is None else "waiting"))
    return runs


def flush(uri: str | None = None) -> Iterator[UnsentRun]:
    """Send every journal whose process has ended; yields each run with its outcome.

    Can be interrupted and repeated at any time: nothing arrives twice.

    Args:
        uri: destination for all runs, instead of their own.

    Raises:
        WrongUse: ``wrong_use``.
    """
    set_limits(FLUSH_TIMEOUT_S)
    unreachable: dict[tuple[str, str], str] = {}
    for folder, event in pending():
        target = with_credentials(event["uri"], uri)
        place = (target, event["experiment"])
        journal = Journal.take(folder)
        if journal is None:
            yield _describe(folder, event, "running")
            continue
        try:
            state: State = "kept"
            detail = unreachable.get(place)
            if detail is None:
                state, detail = _flush_one(Sender(journal, target))
            if state == "kept":
                unreachable[place] = detail
            else:
                journal.discard()
        finally:
            journal.close()
        yield _describe(folder, event, state, detail)


def _flush_one(sender: Sender) -> tuple[State, str]:
    for pause in (*PAUSES_S, None):
        try:
            sender.send(died=True)
            return "sent", "; ".join(sender.refused)
        except Deleted as error:
            return "gone", str(error)
        except Exception as error:  # any failure to reach the server
            if pause is None:
                return "kept", reason(error)
            time.sleep(pause)
    raise AssertionError("the last attempt returns")


def _describe(folder: Path, event: Event, state: State, detail: str = "") -> UnsentRun:
    uri = shown_uri(event["uri"])
    return UnsentRun(event["name"], event["experiment"], uri, folder, event["time"] / 1000, state, detail)


def _log_artifacts(client: MlflowClient, run_id: str, folder: str | None, sources: list[str]) -> None:
    for source in sources:
        client.log_artifacts(run_id, source, folder)


def _log_batch(client: MlflowClient, run_id: str, kind: str, items: list[Any]) -> None:
    client.log_batch(run_id, **{kind: items})


def _is_refusal(error: Exception) -> bool:
    response = getattr(error, "response", None)
    if response is not None:
        return getattr(response, "status_code", None) in REFUSED_HTTP
    return getattr(error, "error_code", None) in REFUSALS


def _dataset_input(event: Event) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    place = event["source"]
    scheme = "code" if place is None else place.partition("://")[0] if "://" in place else "local"
    kind = "http" if scheme == "https" else scheme
    source = {} if place is None else {"url" if kind == "http" else "uri": place}
    dataset = Dataset(
        name=event["name"],
        digest=event["fingerprint"][:MAX_DIGEST],
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps(event["profile"]),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])
