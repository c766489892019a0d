"""From a journal to MLflow, exactly once: the same code for a run that lives and for ``track --flush``.

Delivery is repeated until it is confirmed, so everything that is delivered must be the same the second time:

- The run is known by a tag that its journal made up (``maskmill.key``). It is searched for before it is
  created. A request to create it that was given up may still be carried out later: of several runs with the
  key the one that has been written to stays, and the others are deleted. This is looked at once more at
  the end.
- A metric carries the time and step of its event; MLflow stores the same (key, value, time, step) once.
- Parameters, tags, inputs and files overwrite themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.files.redaction import redact
from pipeline.tracking.destination import artifact_location, connect
from pipeline.tracking.spool import Event, Journal

if TYPE_CHECKING:
    from mlflow.entities import Dataset
    from mlflow.tracking import MlflowClient

KEY_TAG = "maskmill.key"
MAX_METRICS = 500
MAX_SETTINGS = 20
"""Of 6,000 characters each; a request may hold a million bytes."""
MAX_DIGEST = 36
SETTINGS = frozenset({"metrics", "params", "tags"})
REFUSALS = frozenset({"INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS"})
REFUSED_HTTP = frozenset({400, 413, 415, 422})

T = TypeVar("T")


class Gone(Exception):
    """The run was deleted in MLflow; there is nothing to send to."""


class Sender:
    """Sends one journal.

    Args:
        journal: held by this process.
        uri: resolved tracking URI, with credentials if there are any.
        stop: asked between requests; True ends ``send``.
    """

    def __init__(self, journal: Journal, uri: str, *, stop: Callable[[], bool] = lambda: False) -> None:
        self.refused: list[str] = []
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._journal = journal
        self._uri = uri
        self._stop = stop
        self._client: MlflowClient | None = None
        self._offset = 0

    def send(self, *, died: bool = False) -> bool:
        """Send what the journal holds by now.

        Args:
            died: the run's process is gone: a journal without an end gets one, ``KILLED``.

        Returns:
            Whether the run is closed and all of it is there.

        Raises:
            Gone: see there.
            Exception: whatever MLflow raises when it cannot be reached; try again later.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self._send(died)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                self.run_id = None  # another database took the place of the one with the run: begin anew
            raise

    def _send(self, died: bool) -> bool:
        if self._client is None:
            self._client = connect(self._uri)
        if self.run_id is None:
            self._find_run(create=True)
        end: Event | None = None
        batch: list[Event] = []
        for event, position in self._journal.read(self._offset):
            if self._stop():
                return False
            if event["do"] in SETTINGS:
                batch.append(event)
                if len(batch) < MAX_METRICS:
                    continue
            self._log_batch(batch)
            batch = []
            if event["do"] == "artifact":
                self._log_artifact(event)
            elif event["do"] == "dataset":
                self._log_dataset(event)
            elif event["do"] == "end":
                end = event
            if end is None:  # the end stays unconfirmed, so that whoever goes on from here finds it
                self._confirm(position)
        if batch:
            self._log_batch(batch)
            if end is None:
                self._confirm(position)
        if end is None and died:
            # Not written to the journal: what the dead run left is all there is, whoever sends it.
            *_, (last, _) = self._journal.read()
            end = {"status": "KILLED", "time": last["time"]}
        if end is None or self._stop():
            return False
        self._find_run(create=False)
        self._client.set_terminated(self.run_id, end["status"], end["time"])
        return True

    def _confirm(self, offset: int) -> None:
        self._offset = offset
        self._journal.sent = {"run_id": self.run_id, "offset": offset}

    def _find_run(self, *, create: bool) -> None:
        """Find the run by its key, or create it; leaves one run with the key."""
        from mlflow.entities import ViewType

        assert self._client is not None
        event, _ = next(self._journal.read())
        sent = self._journal.sent
        self.experiment_id = self._experiment(event["experiment"])
        query = f"tags.`{KEY_TAG}` = '{event['key']}'"
        found = self._client.search_runs([self.experiment_id], query, ViewType.ALL)
        if not found and create:
            self._client.create_run(
                self.experiment_id,
                start_time=event["time"],
                tags=event["tags"] | {KEY_TAG: event["key"]},
                run_name=event["name"],
            )
            found = self._client.search_runs([self.experiment_id], query, ViewType.ALL)
        if not found:
            self.run_id = None
            raise RuntimeError(f"run {event['name']!r} is no longer there")
        active = {run.info.run_id: run for run in found if run.info.lifecycle_stage == "active"}
        if not active:
            raise Gone(f"run {event['name']!r} was deleted in MLflow")
        known = self.run_id or sent["run_id"]
        chosen = known if known in active else min(active)
        for run_id in active.keys() - {chosen}:
            self._client.delete_run(run_id)
        if chosen != self.run_id:
            self._offset = sent["offset"] if chosen == sent["run_id"] else 0
            self.run_id = chosen

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        assert self._client is not None
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return str(self._client.create_experiment(name, artifact_location(self._uri, name)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
                experiment = self._client.get_experiment_by_name(name)  # another run was faster
        if experiment.lifecycle_stage != "active":
            raise RuntimeError(
                f"experiment {name} is deleted; bring it back: "
                f"mlflow experiments restore -x {experiment.experiment_id}"
            )
        return str(experiment.experiment_id)

    def _log_batch(self, events: Sequence[Event]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        if not events:
            return
        metrics = [
            Metric(key, value, event["time"], event["step"])
            for event in events
            if event["do"] == "metrics"
            for key, value in event["values"].items()
        ]
        params = [
            Param(*item) for event in events if event["do"] == "params" for item in event["values"].items()
        ]
        tags = [
            RunTag(*item) for event in events if event["do"] == "tags" for item in event["values"].items()
        ]
        assert self._client is not None
        log = self._client.log_batch
        for chunk in _chunks(params, MAX_SETTINGS):
            self._deliver(chunk, lambda part: log(self.run_id, params=part))
        for chunk in _chunks(tags, MAX_SETTINGS):
            self._deliver(chunk, lambda part: log(self.run_id, tags=part))
        for chunk in _chunks(metrics, MAX_METRICS):
            self._deliver(chunk, lambda part: log(self.run_id, metrics=part))

    def _log_artifact(self, event: Event) -> None:
        assert self._client is not None
        client = self._client
        folder = self._journal.kept(event["files"])
        self._deliver(
            [folder], lambda part: client.log_artifacts(self.run_id, str(part[0]), event["folder"] or None)
        )

    def _log_dataset(self, event: Event) -> None:
        from mlflow.entities import DatasetInput, InputTag

        assert self._client is not None
        client = self._client
        entry = DatasetInput(_dataset(event), [InputTag("mlflow.data.context", event["context"])])
        self._deliver([entry], lambda part: client.log_inputs(self.run_id, datasets=part))

    def _deliver(self, items: list[T], call: Callable[[list[T]], Any]) -> None:
        """Send items; one that MLflow will never take is set aside instead of holding up all others."""
        try:
            call(items)
        except Exception as error:
            if not _is_refusal(error):
                raise
            self._check_active()
            if len(items) == 1:
                self.refused.append(f"{getattr(items[0], 'key', items[0])}: {reason(error)}")
                return
            middle = len(items) // 2
            self._deliver(items[:middle], call)
            self._deliver(items[middle:], call)

    def _check_active(self) -> None:
        assert self._client is not None
        if self._client.get_run(self.run_id).info.lifecycle_stage != "active":
            raise Gone("the run was deleted in MLflow")


def reason(error: BaseException) -> str:
    """What went wrong in a few words, without secrets."""
    text = str(error)
    low = text.lower()
    for sign, short in (
        ("connection refused", "connection refused"),
        ("timed out", "no answer in time"),
        ("name or service not known", "unknown host"),
        ("failed to resolve", "unknown host"),
        ("database is locked", "the database is locked"),
    ):
        if sign in low:
            return short
    return redact(" ".join(text.split()) or type(error).__name__)[:200]


def _is_refusal(error: Exception) -> bool:
    response = getattr(error, "response", None)
    if response is not None:
        return getattr(response, "status_code", None) in REFUSED_HTTP
    return getattr(error, "error_code", None) in REFUSALS


def _dataset(event: Event) -> Dataset:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset
    from mlflow.exceptions import MlflowException

    place = event["source"]
    if place is None:
        source = CodeDatasetSource({"name": event["name"]})
    else:
        scheme = place.partition("://")[0] if "://" in place else "local"
        kind = "http" if scheme == "https" else scheme
        try:
            source = get_dataset_source_from_json(
                json.dumps({"url" if kind == "http" else "uri": place}), source_type=kind
            )
        except (MlflowException, ValueError):  # a scheme that only fsspec knows
            source = CodeDatasetSource({"uri": place})
    dataset = MetaDataset(source, name=event["name"], digest=event["fingerprint"][:MAX_DIGEST])
    return Dataset(**dataset.to_dict(), profile=json.dumps(event["profile"]))


def _chunks(items: list[T], size: int) -> Iterable[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))
