"""``maskmill promote`` and ``maskmill rollback``, on a real registry."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jobs.promote import Promote
from jobs.rollback import Rollback
from models.errors import MaskMillError
from pipeline.retraining.ledger import Ledger
from pipeline.retraining.promotion import promote
from pipeline.table.lease import LEASE_FILE, Lease
from tests.pipeline.retraining.outputs import Scene, never, new_output

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowClient]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlruns.db"
        yield MlflowClient(uri, registry_uri=uri)


@pytest.fixture
def scene(client: MlflowClient, tmp_path: Path) -> Scene:
    """Two versions were promoted, one after the other; there are three."""
    name = f"pets-{uuid.uuid4().hex[:8]}"
    scene = Scene(client, name, new_output(tmp_path / "out", name, client.tracking_uri))
    scene.add_versions(3)
    with Lease.acquire(scene.output, on_lost=never) as lease:
        for version, before, run in (("1", None, "0001"), ("2", "1", "0002")):
            promote(Ledger(scene.output), client, lease, name, version, expected=before, verdict={}, run=run)
    return scene


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


def test_back_and_further_back_than_there_is(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    place = scene.output.uri
    assert Rollback(retraining=place, why="it sees cats in clouds").run() == 0
    out = said(capsys)
    assert "champion is version 1 now; it was version 2" in out and "it sees cats in clouds" in out
    assert f"maskmill promote {place} --version 2 --force --why TEXT" in out
    assert scene.champion == "1"
    entry = scene.entries[-1]
    assert entry.kind == "rolled_back" and entry.user is not None and "@" in entry.user
    with pytest.raises(MaskMillError) as caught:
        Rollback(retraining=place).run()
    assert caught.value.code == "nothing_before" and caught.value.exit_status == 1
    assert scene.champion == "1" and scene.entries[-1] == entry
    assert not scene.output.exists(LEASE_FILE)


def test_a_forced_promotion(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    place = scene.output.uri
    command = Promote(retraining=place, version="3", force=True, why="the truth was wrong")
    assert command.run() == 0
    out = said(capsys)
    assert "champion is version 3 now; it was version 2" in out and f"maskmill rollback {place}" in out
    assert command.run() == 0 and "is champion already" in said(capsys)
    assert scene.champion == "3" and scene.kinds()[-2:] == ["forcing", "forced"]
    assert scene.client.get_model_version(scene.name, "3").tags["maskmill.forced"] == "the truth was wrong"
    assert Rollback(retraining=place).run() == 0 and scene.champion == "2"


@pytest.mark.parametrize(
    "command",
    [
        lambda place: Rollback(retraining=place),
        lambda place: Promote(retraining=place, version="3", force=True, why="so"),
    ],
    ids=["rollback", "promote"],
)
def test_while_a_retraining_runs_nothing_moves(
    scene: Scene, command: Callable[[str], Rollback | Promote]
) -> None:
    with Lease.acquire(scene.output, on_lost=never), pytest.raises(MaskMillError) as caught:
        command(scene.output.uri).run()
    assert caught.value.code == "output_in_use" and f"process {os.getpid()}" in caught.value.message
    assert scene.champion == "2" and len(scene.entries) == 4


def test_by_the_configuration_and_the_place_that_the_registry_has_now(scene: Scene, tmp_path: Path) -> None:
    config = tmp_path / "retrain.yaml"
    config.write_text(f"name: pets\noutput: {scene.output.uri}\n")
    nowhere = f"sqlite:///{tmp_path}/nowhere.db"
    with pytest.raises(MaskMillError) as caught:
        Rollback(retraining=str(config), tracking=nowhere).run()
    assert caught.value.code == "tracking_unreachable" and not (tmp_path / "nowhere.db").exists()
    assert Rollback(retraining=str(config), tracking=scene.client.tracking_uri).run() == 0
    assert scene.champion == "1"


@pytest.mark.slow
def test_the_command_itself(scene: Scene) -> None:
    """Exit status and streams, as a script sees them."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *arguments], env=environment, capture_output=True, text=True
        )

    first = run("rollback", scene.output.uri, "--model", scene.name)
    assert first.returncode == 0, first.stderr
    assert "champion is version 1 now" in first.stdout
    second = run("rollback", scene.output.uri)
    assert second.returncode == 1 and "nothing to go back to" in second.stderr
    assert "Traceback" not in second.stderr and scene.champion == "1"
