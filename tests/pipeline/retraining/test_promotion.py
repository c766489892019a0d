from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from benchmarks.faults.mlflow_server import Server
from models.errors import MaskMillError
from pipeline.retraining.ledger import Entry, Ledger
from pipeline.retraining.promotion import force, promote, refuse, rollback
from pipeline.retraining.registry import PREFIX
from pipeline.table.lease import LEASE_FILE, Lease
from tests.pipeline.retraining.outputs import Scene, Watched, new_output

ROOT = Path(__file__).resolve().parents[3]
VERDICT = {"verdict": "promote", "reasons": [{"check": "gain", "text": "better by 0.02"}]}

Act = Callable[[Ledger, Any, Lease], Entry]


def promoting(name: str, version: str, expected: str | None, run: str) -> Act:
    return lambda ledger, client, lease: promote(
        ledger, client, lease, name, version, expected=expected, verdict=VERDICT, run=run
    )


def done(scene: Scene, act: Act) -> Entry:
    with scene.lease() as lease:
        return act(Ledger(scene.output), scene.client, lease)


def promoted(scene: Scene, count: int) -> None:
    """Make the first versions champion, one after the other."""
    for number in range(1, count + 1):
        before = None if number == 1 else str(number - 1)
        done(scene, promoting(scene.name, str(number), before, f"{number:04}"))


def refused(scene: Scene, act: Act) -> MaskMillError:
    with pytest.raises(MaskMillError) as caught:
        done(scene, act)
    return caught.value


def test_a_promotion_moves_the_alias_and_says_why(scene: Scene) -> None:
    entry = done(scene, promoting(scene.name, "2", None, "0001"))
    assert scene.champion == "2" and scene.kinds() == ["promoting", "promoted"]
    assert (entry.version, entry.previous, entry.run, entry.verdict) == ("2", None, "0001", VERDICT)
    again = done(scene, promoting(scene.name, "2", None, "0001"))
    assert again == entry and len(scene.entries) == 2


def test_a_tick_does_not_promote_again_what_was_rolled_back(scene: Scene) -> None:
    promoted(scene, 2)
    done(scene, lambda *place: rollback(*place, scene.name))
    assert scene.champion == "1"
    done(scene, promoting(scene.name, "2", "1", "0002"))
    assert scene.champion == "1" and scene.kinds()[-1] == "rolled_back"


def test_rollbacks_go_further_back_if_they_are_asked_to(scene: Scene) -> None:
    promoted(scene, 3)
    first = done(scene, lambda *place: rollback(*place, scene.name, why="grass is lost", user="me"))
    assert (first.version, first.previous, first.why, first.user) == ("2", "3", "grass is lost", "me")
    assert scene.champion == "2"
    tags = scene.client.get_model_version(scene.name, "3").tags
    assert tags[PREFIX + "rolled_back"] == "grass is lost"
    assert done(scene, lambda *place: rollback(*place, scene.name)) == first and scene.champion == "2"
    assert done(scene, lambda *place: rollback(*place, scene.name, to="1")).version == "1"
    assert scene.champion == "1"
    for nowhere in ("2", "3", "9"):
        error = refused(scene, lambda *place, to=nowhere: rollback(*place, scene.name, to=to))
        assert error.code == "wrong_use" and "was not champion before" in error.message
    assert scene.champion == "1" and scene.kinds()[-2:] == ["rolling_back", "rolled_back"]


def test_a_rollback_can_skip_versions_and_what_it_skips_is_left(scene: Scene) -> None:
    promoted(scene, 3)
    assert done(scene, lambda *place: rollback(*place, scene.name, to="3")).kind == "promoted"  # it is
    assert done(scene, lambda *place: rollback(*place, scene.name, to="1")).previous == "3"
    assert scene.champion == "1" and Ledger(scene.output).standing(scene.name).champions == ("1",)
    assert done(scene, lambda *place: rollback(*place, scene.name, to="1")).kind == "rolled_back"
    assert len(scene.entries) == 8


def test_before_the_first_champion_there_is_nothing_to_go_back_to(scene: Scene) -> None:
    promoted(scene, 1)
    error = refused(scene, lambda *place: rollback(*place, scene.name))
    assert error.code == "input_missing" and error.exit_status == 1 and scene.champion == "1"


def test_a_rollback_goes_to_the_last_that_was_not_left(scene: Scene) -> None:
    promoted(scene, 2)
    done(scene, lambda *place: rollback(*place, scene.name))
    done(scene, promoting(scene.name, "3", "1", "0003"))
    assert done(scene, lambda *place: rollback(*place, scene.name)).version == "1"  # not 2, which was bad


def test_without_a_champion_there_is_nothing_to_go_back_to(scene: Scene) -> None:
    assert refused(scene, lambda *place: rollback(*place, scene.name)).code == "input_missing"
    assert scene.entries == ()


def test_a_forced_promotion_is_logged_and_can_be_undone(scene: Scene) -> None:
    promoted(scene, 1)
    done(scene, lambda *place: refuse(*place, scene.name, "2", verdict={"verdict": "refuse"}, run="0002"))
    forcing: Act = lambda *place: force(*place, scene.name, "2", why="the truth is wrong", user="me")  # noqa: E731
    entry = done(scene, forcing)
    assert (entry.kind, entry.version, entry.previous, entry.user) == ("forced", "2", "1", "me")
    assert scene.champion == "2"
    assert scene.client.get_model_version(scene.name, "2").tags[PREFIX + "forced"] == "the truth is wrong"
    assert done(scene, forcing) == entry
    assert done(scene, lambda *place: rollback(*place, scene.name)).version == "1"


def test_a_refusal_is_written_once_and_moves_nothing(scene: Scene) -> None:
    promoted(scene, 1)
    refusing: Act = lambda *place: refuse(*place, scene.name, "2", verdict={"verdict": "refuse"}, run="0002")  # noqa: E731
    assert done(scene, refusing) == done(scene, refusing)
    assert scene.kinds() == ["promoting", "promoted", "refused"] and scene.champion == "1"


# -- somebody else moves the alias


def test_an_alias_that_another_process_moved_is_left_alone(scene: Scene) -> None:
    promoted(scene, 1)
    scene.move_by_hand("3")
    error = refused(scene, promoting(scene.name, "2", "1", "0002"))
    assert error.code == "champion_changed" and "version 3, not to version 1" in error.message
    assert scene.champion == "3" and scene.kinds()[-2:] == ["promoting", "failed"]
    for act in (promoting(scene.name, "2", "1", "0002"), lambda *place: rollback(*place, scene.name)):
        assert refused(scene, act).code == "champion_changed"
        assert scene.champion == "3"
    done(scene, promoting(scene.name, "2", "3", "0003"))  # compared with it
    assert done(scene, lambda *place: rollback(*place, scene.name)).version == "3"


def test_a_version_that_somebody_has_made_champion_can_be_taken_over(scene: Scene) -> None:
    promoted(scene, 1)
    scene.move_by_hand("3")
    assert done(scene, lambda *place: force(*place, scene.name, "3", why="it is better")).version == "3"
    assert done(scene, lambda *place: rollback(*place, scene.name)).version == "1"


def test_an_alias_that_somebody_deletes_is_no_champion(scene: Scene) -> None:
    promoted(scene, 2)
    scene.client.delete_registered_model_alias(scene.name, "champion")
    assert "no version" in refused(scene, lambda *place: rollback(*place, scene.name)).message
    done(scene, promoting(scene.name, "3", None, "0003"))
    assert done(scene, lambda *place: rollback(*place, scene.name)).version == "2"


@pytest.mark.parametrize(
    ("method", "after", "champion"),
    [
        pytest.param("get_registered_model", True, "3", id="before it is looked at"),
        pytest.param("set_registered_model_alias", True, "3", id="before it is read back"),
    ],
)
def test_an_alias_that_moves_meanwhile_is_noticed(
    scene: Scene, method: str, after: bool, champion: str
) -> None:
    promoted(scene, 1)

    def hook(name: str, done: bool) -> None:
        if (name, done) == (method, after):
            scene.move_by_hand("3")

    with scene.lease() as lease, pytest.raises(MaskMillError) as caught:
        promoting(scene.name, "2", "1", "0002")(Ledger(scene.output), Watched(scene.client, hook), lease)
    assert caught.value.code == "champion_changed"
    assert scene.champion == champion and scene.kinds()[-2:] == ["promoting", "failed"]


# -- kills


# Calls of registry and ledger that each makes: a kill after one is a kill before the next.
PROMOTION, ROLLBACK, FORCED = 7, 9, 9


def test_a_promotion_killed_again_and_again_is_made_once(scene: Scene) -> None:
    promoted(scene, 1)
    act = promoting(scene.name, "2", "1", "0002")
    kills = 0
    while scene.killed_at(kills, act) is None:
        kills += 1
    assert kills > 1 and scene.champion == "2"
    assert scene.kinds() == ["promoting", "promoted", "promoting", "promoted"]


@pytest.mark.parametrize("point", range(PROMOTION + 1))
def test_a_promotion_killed_once_is_made_once(scene: Scene, point: int) -> None:
    promoted(scene, 1)
    act = promoting(scene.name, "2", "1", "0002")
    assert (scene.killed_at(point, act) is None) == (point < PROMOTION)
    assert scene.champion in ("1", "2")
    done(scene, act)
    assert scene.champion == "2"
    assert scene.kinds() == ["promoting", "promoted", "promoting", "promoted"]


@pytest.mark.parametrize("point", range(ROLLBACK + 1))
def test_a_rollback_killed_once_goes_one_step_back(scene: Scene, point: int) -> None:
    promoted(scene, 3)
    act: Act = lambda *place: rollback(*place, scene.name, why="bad")  # noqa: E731
    assert (scene.killed_at(point, act) is None) == (point < ROLLBACK)
    done(scene, act)  # even if it was killed after its last entry, which nobody saw
    assert scene.champion == "2"
    assert scene.kinds()[-2:] == ["rolling_back", "rolled_back"] and len(scene.entries) == 8


@pytest.mark.parametrize("point", range(FORCED + 1))
def test_a_forced_promotion_killed_once_is_made_once(scene: Scene, point: int) -> None:
    promoted(scene, 1)
    act: Act = lambda *place: force(*place, scene.name, "2", why="I say so")  # noqa: E731
    assert (scene.killed_at(point, act) is None) == (point < FORCED)
    done(scene, act)
    assert scene.champion == "2"
    assert scene.kinds() == ["promoting", "promoted", "forcing", "forced"]
    assert PREFIX + "forced" in scene.client.get_model_version(scene.name, "2").tags


@pytest.mark.parametrize("point", range(PROMOTION + 1))
def test_a_rollback_after_a_killed_promotion_leaves_a_champion_that_the_ledger_knows(
    scene: Scene, point: int
) -> None:
    promoted(scene, 2)
    scene.killed_at(point, promoting(scene.name, "3", "2", "0003"))
    moved = scene.champion == "3"
    assert done(scene, lambda *place: rollback(*place, scene.name)).version == ("2" if moved else "1")
    assert Ledger(scene.output).current(scene.name) == scene.champion
    assert Ledger(scene.output).standing(scene.name).unfinished is None


def test_random_moves_with_kills_keep_ledger_and_alias_together(scene: Scene) -> None:
    scene.add_versions(3)
    chosen = random.Random(5)
    for step in range(25):
        before = scene.champion
        version = chosen.choice([version for version in "123456" if version != before])
        acts: list[Act] = [
            promoting(scene.name, version, before, f"{step:04}"),
            functools.partial(force, name=scene.name, version=version, why="so"),
            functools.partial(rollback, name=scene.name),
        ]
        act = chosen.choice(acts)
        try:
            if scene.killed_at(chosen.randrange(12), act) is None:
                # Whatever comes next settles it: here, a refusal.
                done(scene, lambda *place: refuse(*place, scene.name, None, verdict={}, run="none"))
        except MaskMillError as error:
            assert error.code == "input_missing"
        assert Ledger(scene.output).current(scene.name) == scene.champion
    assert {"promoted", "forced", "rolled_back", "failed"} <= set(scene.kinds())


@pytest.mark.slow
def test_a_process_killed_after_the_alias_moved_is_finished_by_the_next(scene: Scene) -> None:
    """A real SIGKILL, and the lease of a dead process."""
    promoted(scene, 1)
    uri = scene.client.tracking_uri
    code = f"""
import os, signal
from mlflow.tracking import MlflowClient
from pipeline.files.storage import open_storage
from pipeline.retraining.ledger import Ledger
from pipeline.retraining.promotion import promote
from pipeline.table.lease import Lease
from tests.pipeline.retraining.outputs import Watched

def hook(name, done):
    if name == "set_registered_model_alias" and done:
        os.kill(os.getpid(), signal.SIGKILL)

output = open_storage({scene.output.uri!r})
client = Watched(MlflowClient({uri!r}, registry_uri={uri!r}), hook)
with Lease.acquire(output, on_lost=print) as lease:
    promote(Ledger(output), client, lease, {scene.name!r}, "2", expected="1", verdict={{}}, run="0002")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert scene.champion == "2" and scene.kinds()[-1] == "promoting"
    with Lease.acquire(scene.output, on_lost=print) as lease:
        entry = promote(
            Ledger(scene.output), scene.client, lease, scene.name, "2", expected="1", verdict={}, run="0002"
        )
    assert entry.kind == "promoted" and scene.kinds().count("promoted") == 2


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_promotion(server: Server, tmp_path: Path) -> None:
    client = MlflowClient(server.uri, registry_uri=server.uri)
    remote = Scene(client, "remote", new_output(tmp_path / "out", "remote", server.uri))
    remote.add_versions(2)
    done(remote, promoting("remote", "1", None, "0001"))

    def hook(name: str, done: bool) -> None:
        if (name, done) == ("set_registered_model_alias", True):
            server.kill()

    act = promoting("remote", "2", "1", "0002")
    with remote.lease() as lease, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        with pytest.raises(MaskMillError) as caught:
            act(Ledger(remote.output), Watched(client, hook), lease)
        assert caught.value.code == "tracking_unreachable"
    assert remote.kinds() == ["promoting", "promoted", "promoting"]
    server.start()
    done(remote, act)
    assert remote.champion == "2" and remote.kinds() == ["promoting", "promoted"] * 2


# -- fences


def test_a_run_that_lost_its_lease_writes_nothing(scene: Scene) -> None:
    promoted(scene, 1)
    path = scene.output.path(LEASE_FILE)

    def hook(name: str, done: bool) -> None:
        # Another run takes over just before the alias would be set.
        if name == "get_model_version" and done:
            content = json.loads(Path(path).read_text())
            Path(path).write_text(json.dumps(content | {"run_id": "another-run", "pid": os.getppid()}))

    lease = Lease.acquire(scene.output, on_lost=print)
    with pytest.raises(MaskMillError) as caught:
        promoting(scene.name, "2", "1", "0002")(Ledger(scene.output), Watched(scene.client, hook), lease)
    assert caught.value.code == "output_in_use"
    assert scene.champion == "1" and scene.kinds() == ["promoting", "promoted"]


def test_a_version_that_is_not_there_is_refused(scene: Scene) -> None:
    promoted(scene, 2)
    assert refused(scene, promoting(scene.name, "9", "2", "0003")).code == "name_unknown"
    scene.client.delete_model_version(scene.name, "1")
    assert refused(scene, lambda *place: rollback(*place, scene.name)).code == "name_unknown"
    assert scene.champion == "2" and scene.kinds() == ["promoting", "promoted"] * 2


def test_another_retraining_cannot_move_the_alias(scene: Scene, tmp_path: Path) -> None:
    promoted(scene, 2)
    other = Scene(scene.client, scene.name, new_output(tmp_path / "other", scene.name, "sqlite:///x.db"))
    for act in (
        promoting(scene.name, "3", "2", "0001"),
        lambda *place: rollback(*place, scene.name),
        lambda *place: force(*place, scene.name, "3", why="so"),
    ):
        assert refused(other, act).code == "output_not_ours"
    assert scene.champion == "2" and other.entries == ()
