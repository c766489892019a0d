"""Read runs: list the newest, find one by id or name, compare several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import FailedWork, MaskMillError, WrongUse, did_you_mean
from pipeline.tracking.destination import (
    EXPERIMENT_PREFIX,
    FLUSH_TIMEOUT_S,
    connect,
    reason,
    resolve_uri,
    set_limits,
    shown_uri,
    sqlite_file,
)

SEARCHED = 1000
"""Number of newest runs searched for a name."""


@dataclass(frozen=True)
class TrackedRun:
    """A run in MLflow.

    Attributes:
        id: 32 hexadecimal digits.
        kind: label, evaluate, benchmark or train.
        name: of the run.
        status: RUNNING, FINISHED, FAILED or KILLED.
        started: seconds since the epoch.
        dataset: name of the first input, if any.
        command: command line, without secrets.
        params: settings.
        metrics: latest value of each.
    """

    id: str
    kind: str
    name: str
    status: str
    started: float
    dataset: str | None
    command: str | None
    params: Mapping[str, str]
    metrics: Mapping[str, float]


def list_runs(uri: str | None = None, *, experiment: str | None = None, limit: int = 20) -> list[TrackedRun]:
    """The newest runs, newest first.

    Args:
        uri: tracking URI; see ``destination.resolve_uri``.
        experiment: name of an experiment, or the kind of job ("evaluate"); None is all of MaskMill's.
        limit: maximum number of runs.

    Raises:
        MaskMillError: ``wrong_use``; ``tracking_unreachable``; ``name_unknown``.
    """
    target = resolve_uri(uri)
    database = sqlite_file(target)
    if database is not None and not database.exists():
        return []  # listing must not create one
    set_limits(FLUSH_TIMEOUT_S)
    try:
        client = connect(target)
        found = {entry.name: entry.experiment_id for entry in client.search_experiments()}
        names = _experiments(found, experiment)
        if not names:
            return []
        runs = client.search_runs(
            [found[name] for name in names], max_results=limit, order_by=["attributes.start_time DESC"]
        )
    except MaskMillError:
        raise
    except Exception as error:  # MLflow raises various exceptions, depending on the store
        raise FailedWork(
            "tracking_unreachable",
            f"cannot read runs from {shown_uri(target)}: {reason(error)}",
            "Start the server, or name another place: --tracking URI, or MLFLOW_TRACKING_URI.",
        ) from None
    by_id = {identity: name for name, identity in found.items()}
    return [_read(run, by_id[run.info.experiment_id]) for run in runs]


def choose_runs(
    wanted: Sequence[str], uri: str | None = None, *, experiment: str | None = None
) -> list[TrackedRun]:
    """Runs by id, start of an id, or name (the newest of several with that name).

    Raises:
        MaskMillError: ``name_unknown``; the errors of ``list_runs``.
    """
    runs = list_runs(uri, experiment=experiment, limit=SEARCHED)
    return [_choose(runs, text) for text in wanted]


def differences(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The names whose values differ, sorted; None where one is missing.

    >>> differences([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}])
    {'b': [2, 3], 'c': [None, 4]}
    """
    names = sorted(set().union(*values))
    rows = {name: [mapping.get(name) for mapping in values] for name in names}
    return {name: row for name, row in rows.items() if any(value != row[0] for value in row)}


def _choose(runs: Sequence[TrackedRun], text: str) -> TrackedRun:
    for run in runs:
        if text in (run.id, run.name):
            return run
    starts = [run for run in runs if len(text) >= 4 and run.id.startswith(text.lower())]
    if len(starts) > 1:
        raise WrongUse(
            "name_unknown",
            f"{text} is the beginning of {len(starts)} run ids.",
            f"Give more of it: {', '.join(run.id[:12] for run in starts[:5])}.",
        )
    if not starts:
        raise WrongUse(
            "name_unknown",
            f"There is no run {text!r}.",
            f"{did_you_mean(text, (run.name for run in runs), most=3)}"
            "List them with: maskmill runs --limit 100",
        )
    return starts[0]


def _experiments(found: Mapping[str, str], wanted: str | None) -> list[str]:
    ours = sorted(name for name in found if name.startswith(EXPERIMENT_PREFIX))
    if wanted is None:
        return ours
    for name in (wanted, EXPERIMENT_PREFIX + wanted):
        if name in found:
            return [name]
    raise WrongUse(
        "name_unknown",
        f"There is no experiment {wanted!r}.",
        f"{did_you_mean(wanted, (name.removeprefix(EXPERIMENT_PREFIX) for name in ours))}"
        f"There are: {', '.join(ours)}."
        if ours
        else "There are none of MaskMill's yet.",
    )


def _read(run: Any, experiment: str) -> TrackedRun:
    tags = run.data.tags
    inputs = run.inputs.dataset_inputs if run.inputs else []
    return TrackedRun(
        id=run.info.run_id,
        kind=tags.get("maskmill.kind") or experiment.removeprefix(EXPERIMENT_PREFIX),
        name=run.info.run_name,
        status=run.info.status,
        started=run.info.start_time / 1000,
        dataset=inputs[0].dataset.name if inputs else None,
        command=run.data.params.get("command") or tags.get("maskmill.command"),
        params=dict(run.data.params),
        metrics=dict(run.data.metrics),
    )
