"""``maskmill promote`` and ``maskmill rollback``, on a real registry."""

from __future__ import annotations

import json
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
from pipeline.retraining.record import note_webhook, read_retraining
from pipeline.table.lease import LEASE_FILE, Lease
from tests.pipeline.retraining.outputs import Scene, never, new_output
from tests.pipeline.retraining.receiver import Receiver

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def client(registry_database: str) -> Iterator[MlflowClient]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            patch.delenv(name)
        yield MlflowClient(registry_database, registry_uri=registry_database)


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
    assert Rollback(retraining=place).run() == 0
    out = said(capsys)
    assert f"Nothing moved: version 1 of {scene.name} is champion since {entry.time} (rolled back by" in out
    assert "further back" not in out  # there is none
    with pytest.raises(MaskMillError) as caught:
        Rollback(retraining=place, to="3").run()
    assert caught.value.exit_status == 2 and "Version 3" in caught.value.message
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
    assert Rollback(retraining=place, to="2").run() == 0 and scene.champion == "2"
    said(capsys)
    assert Rollback(retraining=place).run() == 0 and scene.champion == "2"
    assert f"further back  maskmill rollback {place} --to 1" in said(capsys)
    assert Rollback(retraining=place, to="1").run() == 0 and scene.champion == "1"


def test_the_webhook_is_told_of_moves_by_hand(
    scene: Scene, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, receiver = scene.output.uri, Receiver()
    note_webhook(scene.output, read_retraining(scene.output), "PETS_HOOK")
    monkeypatch.setenv("PETS_HOOK", receiver.url)
    try:
        assert Promote(retraining=place, version="3", force=True, why="the truth was wrong").run() == 0
        assert Rollback(retraining=place, why="it was not").run() == 0
        assert Rollback(retraining=place).run() == 0  # as after a kill: it may not have been told
    finally:
        receiver.close()
    events = [json.loads(body) for _, _, body in receiver.received]
    moves = [(one["event"], one["version"], one["previous"], one["why"]) for one in events]
    assert moves == [
        ("forced", "3", "2", "the truth was wrong"),
        ("rolled_back", "2", "3", "it was not"),
        ("rolled_back", "2", "3", "it was not"),
    ]
    assert events[1] == events[2] and events[1]["model"] == scene.name and "@" in events[1]["user"]
    # Where the address is not known, the champion moves all the same.
    monkeypatch.delenv("PETS_HOOK")
    capsys.readouterr()
    assert Rollback(retraining=place, to="1").run() == 0 and scene.champion == "1"
    assert (
        "The webhook was not told: The environment variable PETS_HOOK is not set" in capsys.readouterr().err
    )


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
    second = run("rollback", scene.output.uri, "--to", "7")
    assert second.returncode == 2 and "was not champion before" in second.stderr
    assert "Traceback" not in second.stderr and scene.champion == "1"
