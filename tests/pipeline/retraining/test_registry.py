from __future__ import annotations

import dataclasses
import hashlib
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from benchmarks.faults.mlflow_server import Server
from models.clip.loading import load_clip
from models.clipseg.decoder import build_clipseg
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.files.storage import open_storage
from pipeline.retraining import registry
from pipeline.retraining.record import read_retraining
from pipeline.retraining.registry import Facts, Version
from pipeline.trained.clipseg import read_clipseg_record, write_clipseg_folder
from pipeline.trained.student import read_student_record
from tests.pipeline.retraining.outputs import Killed, Scene, Watched, new_output
from tests.pipeline.trained.test_student import toy_student

FACTS = Facts(
    key="pets/0007/student",
    kind="maskclip-plus",
    run="0007",
    data="sha256:" + "d" * 64,
    labels="sha256:" + "a" * 64,
    teacher="champion version 3 of pets",
    verdict="promote",
    reasons=("gain: +0.02 [0.01, 0.03] <b>bold</b>", "no class falls | by more than 0.05"),
    page="s3://bucket/out/runs/0007/report.html",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "run"
    toy_student(folder)
    return folder


@pytest.fixture
def empty(tmp_path: Path, registry_database: str) -> Scene:
    """A new retraining without a registered model."""
    name = f"pets-{uuid.uuid4().hex[:8]}"
    client = MlflowClient(registry_database, registry_uri=registry_database)
    return Scene(client, name, new_output(tmp_path / "out", name, registry_database))


def new_run(client: MlflowClient) -> str:
    experiment = client.get_experiment_by_name("train")
    assert experiment is not None
    return str(client.create_run(experiment.experiment_id).info.run_id)


def registered(scene: Scene, folder: Path, facts: Facts = FACTS, client: Any = None) -> Version:
    client = client or scene.client
    run_id = new_run(scene.client)
    return registry.register(client, scene.name, folder, facts, run_id=run_id, output=scene.output)


def test_a_version_says_what_it_was_made_from(empty: Scene, student: Path) -> None:
    version = registered(empty, student)
    found = empty.client.get_model_version(empty.name, version.number)
    assert found.tags == {
        "maskmill.key": "pets/0007/student",
        "maskmill.kind": "maskclip-plus",
        "maskmill.run": "0007",
        "maskmill.data": FACTS.data,
        "maskmill.labels": FACTS.labels,
        "maskmill.teacher": FACTS.teacher,
        "maskmill.verdict": "promote",
        "maskmill.reasons": "\n".join(FACTS.reasons),
        "maskmill.page": FACTS.page,
        "maskmill.folder": str(student),
        "maskmill.fingerprint": hashlib.sha256((student / "model.safetensors").read_bytes()).hexdigest(),
    }
    for text in ("promote", FACTS.data, FACTS.labels, "champion version 3", "0007/report.html"):
        assert text is not None and text in found.description
    assert r"\<b\>bold" in found.description and r"falls \| by" in found.description
    model = empty.client.get_registered_model(empty.name)
    assert {which: str(number) for which, number in model.aliases.items()} == {
        "challenger": "1"
    }  # no champion: that is for a promotion
    assert model.tags["maskmill.ledger"] == empty.output.uri
    assert registry.champion(empty.client, empty.name) is None
    assert registry.alias(empty.client, empty.name, "challenger") == version.number


def test_registering_again_makes_no_version(empty: Scene, student: Path) -> None:
    first = registered(empty, student)
    assert registered(empty, student) == first
    other = registered(empty, student, Facts(key="pets/0008/student", kind="maskclip-plus", run="0008"))
    assert (first.number, other.number) == ("1", "2")
    assert registered(empty, student) == first  # the challenger is the one that was asked for
    assert registry.alias(empty.client, empty.name, "challenger") == "1"


def test_a_verdict_that_has_changed_is_told(empty: Scene, student: Path) -> None:
    first = registered(empty, student)
    again = registered(empty, student, dataclasses.replace(FACTS, verdict="refuse", reasons=("too slow",)))
    assert again.number == first.number and again.tags["maskmill.verdict"] == "refuse"
    found = empty.client.get_model_version(empty.name, again.number)
    assert found.tags["maskmill.reasons"] == "too slow" and "too slow" in found.description


def test_other_weights_under_the_same_key_are_another_version(
    empty: Scene, student: Path, tmp_path: Path
) -> None:
    first = registered(empty, student)
    toy_student(tmp_path / "again", width=16)
    again = registered(empty, tmp_path / "again")
    assert (first.number, again.number) == ("1", "2")
    assert again.tags["maskmill.fingerprint"] == read_student_record(tmp_path / "again").fingerprint


@pytest.mark.parametrize(
    ("method", "after"),
    [
        ("create_registered_model", True),
        ("log_model_artifacts", False),
        ("create_model_version", False),
        ("create_model_version", True),
        ("set_registered_model_alias", True),
    ],
)
def test_a_registration_that_is_killed_is_made_once(
    empty: Scene, student: Path, method: str, after: bool
) -> None:
    def hook(name: str, done: bool) -> None:
        if (name, done) == (method, after):
            raise Killed

    with pytest.raises(Killed):
        registered(empty, student, client=Watched(empty.client, hook))
    version = registered(empty, student)
    (only,) = empty.client.search_model_versions(f"name='{empty.name}'")
    assert str(only.version) == version.number and only.tags["maskmill.key"] == FACTS.key
    assert registry.alias(empty.client, empty.name, "challenger") == version.number


def test_a_key_is_found_among_many_versions(empty: Scene, student: Path) -> None:
    empty.add_versions(1)
    first = registered(empty, student)
    empty.add_versions(100)
    assert registered(empty, student) == first and first.number == "2"


def test_what_is_too_long_or_secret_is_cut(empty: Scene, student: Path) -> None:
    facts = Facts(
        key="k",
        kind="maskclip-plus",
        run="0001",
        teacher="https://me:pa55word@host/teacher",
        reasons=tuple(f"reason {number}" for number in range(2000)),
    )
    version = registered(empty, student, facts)
    found = empty.client.get_model_version(empty.name, version.number)
    assert len(found.tags["maskmill.reasons"]) == 5000 and len(found.description) <= 5000
    assert "pa55word" not in str(found.tags) + found.description
    assert "maskmill.page" not in found.tags and "Report" not in found.description


def test_a_folder_that_is_no_such_model_is_refused_before_anything_is_made(
    empty: Scene, tmp_path: Path
) -> None:
    with pytest.raises(MaskMillError) as caught:
        registered(empty, tmp_path)
    assert caught.value.code == "name_unknown"
    assert not empty.client.search_model_versions(f"name='{empty.name}'")


# -- the folder of a version


def test_the_folder_that_it_was_trained_in_serves_while_it_is_there(
    empty: Scene, student: Path, tmp_path: Path
) -> None:
    version = registered(empty, student)
    place = registry.version_folder(empty.client, version, "maskclip-plus", tmp_path / "into")
    assert place == str(student) and not (tmp_path / "into").exists()


@pytest.mark.parametrize("fate", ["gone", "another model", "damaged"])
def test_else_it_is_downloaded_once(empty: Scene, student: Path, tmp_path: Path, fate: str) -> None:
    folder = tmp_path / "candidate"
    shutil.copytree(student, folder)
    version = registered(empty, folder)
    if fate == "gone":
        shutil.rmtree(folder)
    elif fate == "damaged":
        (folder / "model.safetensors").write_bytes(b"")
    else:
        shutil.rmtree(folder)
        toy_student(folder, width=16)
        assert read_student_record(folder).fingerprint != read_student_record(student).fingerprint
    place = registry.version_folder(empty.client, version, "maskclip-plus", tmp_path / "into")
    assert read_student_record(place).fingerprint == read_student_record(student).fingerprint
    assert Path(place).is_relative_to(tmp_path / "into")

    def offline(name: str, done: bool) -> None:
        raise AssertionError("it is there already")

    client = Watched(empty.client, offline)
    assert registry.version_folder(client, version, "maskclip-plus", tmp_path / "into") == place


def test_weights_that_are_not_those_of_the_tags_are_refused(
    empty: Scene, student: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "candidate"
    shutil.copytree(student, folder)
    version = registered(empty, folder)
    shutil.rmtree(folder)
    registry.tag_version(empty.client, empty.name, version.number, "fingerprint", "0" * 64)
    changed = registry.read_version(empty.client, empty.name, version.number)
    with pytest.raises(MaskMillError) as caught:
        registry.version_folder(empty.client, changed, "maskclip-plus", tmp_path / "into")
    assert caught.value.code == "model_damaged"


def test_a_clipseg_is_registered_and_downloaded_too(empty: Scene, tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = ClipSegConfig(reduce_dim=8, heads=2, feedforward=16, extract_layers=(0, 1, 2))
    model = build_clipseg(load_clip("toyclip", "bundled"), config)
    folder = tmp_path / "run"
    write_clipseg_folder(
        folder, model, kind="clipseg", recipe={"triplets": {"size": 64}}, data={}, metrics={}, training={},
        versions={},
    )  # fmt: skip
    fingerprint = read_clipseg_record(folder).fingerprint
    version = registered(empty, folder, Facts(key="pets/0001/clipseg", kind="clipseg", run="0001"))
    shutil.rmtree(folder)
    place = registry.version_folder(empty.client, version, "clipseg", tmp_path / "into")
    assert read_clipseg_record(place).fingerprint == fingerprint


@pytest.mark.slow
def test_on_a_server(server: Server, student: Path, tmp_path: Path) -> None:
    """Its artifacts come through the server, and a process that uses another one is not disturbed."""
    client = MlflowClient(server.uri, registry_uri=server.uri)
    experiment = client.create_experiment("remote")
    scene = Scene(client, "by-server", new_output(tmp_path / "out", "by-server", server.uri))
    folder = tmp_path / "candidate"
    shutil.copytree(student, folder)
    run = client.create_run(experiment).info.run_id
    before = mlflow.get_tracking_uri()
    version = registry.register(client, scene.name, folder, FACTS, run_id=run, output=scene.output)
    assert registry.register(client, scene.name, folder, FACTS, run_id=run, output=scene.output) == version
    shutil.rmtree(folder)
    place = registry.version_folder(client, version, "maskclip-plus", tmp_path / "into")
    assert read_student_record(place).fingerprint == read_student_record(student).fingerprint
    assert mlflow.get_tracking_uri() == before
    scene.move_by_hand("1")
    found = registry.champion(client, scene.name)
    assert found is not None and found == version
    server.kill()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            for said in (
                "refused|broke",
                "connection refused",
            ):  # the first one by a connection that was open
                with pytest.raises(MaskMillError, match=said) as caught:
                    registry.champion(client, scene.name)
                assert caught.value.code == "tracking_unreachable"
    finally:
        server.start()


# -- whose it is


def test_a_model_that_was_registered_by_hand_is_taken_over(empty: Scene) -> None:
    empty.client.create_registered_model(empty.name, tags={"mine": "yes"})
    registry.claim(empty.client, empty.name, empty.output)
    tags = empty.client.get_registered_model(empty.name).tags
    assert tags["maskmill.ledger"] == empty.output.uri and tags["mine"] == "yes"


@pytest.mark.parametrize("act", [registry.claim, registry.refuse_other_owner])
def test_another_retraining_is_refused(
    empty: Scene, tmp_path: Path, act: Callable[[Any, str, Any], None]
) -> None:
    registry.claim(empty.client, empty.name, empty.output)
    act(empty.client, empty.name, empty.output)
    other = new_output(tmp_path / "other", "others", "sqlite:///x.db")
    with pytest.raises(MaskMillError, match="belongs to another retraining") as caught:
        act(empty.client, empty.name, other)
    assert caught.value.code == "output_not_ours" and empty.output.uri in caught.value.message
    copied = tmp_path / "copied"
    shutil.copytree(empty.output.path(), copied)
    with pytest.raises(MaskMillError, match="is a copy of it"):
        act(empty.client, empty.name, open_storage(copied))
    tags = empty.client.get_registered_model(empty.name).tags
    assert tags["maskmill.ledger"] == empty.output.uri


def test_looking_makes_no_registered_model(empty: Scene) -> None:
    registry.refuse_other_owner(empty.client, empty.name, empty.output)
    assert registry.alias(empty.client, empty.name, "champion") is None
    assert not empty.client.search_registered_models(f"name='{empty.name}'")


def test_a_version_that_is_not_there(empty: Scene) -> None:
    empty.add_versions(1)
    for number in ("2", "none"):
        for act in (
            lambda number: registry.read_version(empty.client, empty.name, number),
            lambda number: registry.set_alias(empty.client, empty.name, "champion", number),
        ):
            with pytest.raises(MaskMillError) as caught:
                act(number)
            assert caught.value.code == "name_unknown"


def test_connecting_makes_no_database(empty: Scene, tmp_path: Path, registry_database: str) -> None:
    record = read_retraining(empty.output)
    assert registry.connect_registry(record).tracking_uri == registry_database
    moved = f"sqlite:///{tmp_path}/elsewhere.db"
    with pytest.raises(MaskMillError) as caught:
        registry.connect_registry(record, moved)
    assert caught.value.code == "tracking_unreachable" and not (tmp_path / "elsewhere.db").exists()
