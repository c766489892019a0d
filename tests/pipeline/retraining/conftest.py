from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from benchmarks.faults.mlflow_server import Server
from tests.pipeline.retraining.outputs import Scene, new_output


@pytest.fixture(scope="module", autouse=True)
def plain_environment() -> Iterator[None]:
    """MLflow's variables as a user has them who sets none."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        yield


@pytest.fixture
def scene(tmp_path: Path, registry_database: str) -> Scene:
    """A new retraining with three versions of a new registered model, none of them champion."""
    name = f"pets-{uuid.uuid4().hex[:8]}"
    output = new_output(tmp_path / "out", name, registry_database)
    scene = Scene(MlflowClient(registry_database, registry_uri=registry_database), name, output)
    scene.add_versions(3)
    return scene


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, registry_database: str) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.db").write_bytes(Path(registry_database.removeprefix("sqlite:///")).read_bytes())
    server = Server(folder)
    server.start()
    yield server
    server.kill()
