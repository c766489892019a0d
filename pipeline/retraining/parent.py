"""The run of a tick in MLflow: the parent of the runs that its jobs make.

It is found by its key or made, so that a tick has one however often it is begun.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.retraining.registry import PREFIX, registry_errors
from pipeline.tracking.destination import EXPERIMENT_PREFIX, artifact_location

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = f"{EXPERIMENT_PREFIX}retrain"
PARENT_TAG = "mlflow.parentRunId"
_KEY = PREFIX + "key"


def tick_tags(name: str, run: str) -> dict[str, str]:
    """Tags of every run of a tick."""
    return {f"{PREFIX}retraining": name, f"{PREFIX}tick": run}


def open_parent(client: MlflowClient, uri: str, name: str, run: str, *, output: str) -> str:
    """The id of the run of a tick, made if there is none.

    Args:
        client: of ``pipeline.retraining.registry.connect_registry``.
        uri: of the tracking server, resolved.
        name: of the retraining.
        run: number of the tick.
        output: of the retraining.

    Raises:
        MaskMillError: ``tracking_unreachable``.
    """
    key = f"{name}/{run} {output}"
    with registry_errors(name):
        experiment = _experiment(client, uri)
        found = client.search_runs([experiment], f"tags.`{_KEY}` = '{key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        tags = {
            **tick_tags(name, run),
            _KEY: key,
            "mlflow.runName": f"retrain {name} {run}",
            "maskmill.kind": "retrain",
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": "maskmill retrain",
        }
        return str(client.create_run(experiment, tags=tags).info.run_id)


def close_parent(
    client: MlflowClient,
    run_id: str,
    name: str,
    *,
    metrics: Mapping[str, float | None],
    params: Mapping[str, str],
    tags: Mapping[str, str],
    files: Mapping[str, str],
    succeeded: bool,
) -> None:
    """Log what became of a tick, and end its run.

    Args:
        client: of ``open_parent``.
        run_id: of the run.
        name: of the retraining.
        metrics: by name; None is skipped.
        params: by name.
        tags: by name.
        files: texts by file name.
        succeeded: whether it has an outcome.

    Raises:
        MaskMillError: ``tracking_unreachable``.
    """
    from mlflow.entities import Metric, Param, RunTag

    with registry_errors(name):
        at = client.get_run(run_id).info.start_time
        client.log_batch(
            run_id,
            metrics=[Metric(key, float(value), at, 0) for key, value in metrics.items() if value is not None],
            params=[Param(key, value[:5_800]) for key, value in params.items()],
            tags=[RunTag(key, value[:4_900]) for key, value in tags.items()],
        )
        for file, text in files.items():
            client.log_text(run_id, text, file)
        client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED")


def job_run(
    client: MlflowClient, kind: str, name: str, run: str, *, finished: bool = False, **tags: str
) -> str | None:
    """The newest run that a job of a tick has made; None if there is none, or it did not reach MLflow.

    Args:
        client: of ``open_parent``.
        kind: of the job: ``train``, ``evaluate``.
        name: of the retraining.
        run: number of the tick.
        finished: only a run that has ended well.
        tags: what else the run must have been told, such as ``model``.

    Raises:
        MaskMillError: ``tracking_unreachable``.
    """
    with registry_errors(name):
        experiment = client.get_experiment_by_name(f"{EXPERIMENT_PREFIX}{kind}")
        if experiment is None:
            return None
        wanted = tick_tags(name, run) | {f"{PREFIX}{tag}": value for tag, value in tags.items()}
        query = [f"tags.`{tag}` = '{value}'" for tag, value in wanted.items()]
        query += ["attributes.status = 'FINISHED'"] if finished else []
        found = client.search_runs(
            [experiment.experiment_id],
            " and ".join(query),
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        return str(found[0].info.run_id) if found else None


def _experiment(client: MlflowClient, uri: str) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            return str(
                client.create_experiment(EXPERIMENT, artifact_location=artifact_location(uri, EXPERIMENT))
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run has just made it
                raise
            found = client.get_experiment_by_name(EXPERIMENT)
    return str(found.experiment_id)
