from __future__ import annotations

import uuid

import pytest
from mlflow.tracking import MlflowClient

from pipeline.retraining.parent import job_run, open_parent, tick_tags


@pytest.mark.slow
def test_a_tick_has_one_run_and_its_jobs_are_found_by_what_they_were_told(registry_database: str) -> None:
    client = MlflowClient(registry_database, registry_uri=registry_database)
    name = f"pets-{uuid.uuid4().hex[:8]}"
    opened = [open_parent(client, registry_database, name, "0001", output="out") for _ in range(2)]
    assert opened[0] == opened[1]
    assert open_parent(client, registry_database, name, "0002", output="out") not in opened

    found = client.get_experiment_by_name("maskmill-evaluate")
    experiment = client.create_experiment("maskmill-evaluate") if found is None else found.experiment_id
    told = {"model": "student", "result": "abc"}
    tags = tick_tags(name, "0001") | {f"maskmill.{tag}": value for tag, value in told.items()}
    first = client.create_run(experiment, tags=tags).info.run_id
    assert job_run(client, "evaluate", name, "0001", **told) == first
    assert job_run(client, "evaluate", name, "0001", finished=True, **told) is None
    client.set_terminated(first)
    assert job_run(client, "evaluate", name, "0001", finished=True, **told) == first
    for other in ({"result": "abd"}, {"model": "clipseg"}):
        assert job_run(client, "evaluate", name, "0001", **(told | other)) is None
    assert job_run(client, "evaluate", name, "0002", **told) is None
    assert job_run(client, "segment", name, "0001", **told) is None
