from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.retraining.record import (
    RECORD_FILE,
    RetrainedModel,
    RetrainingRecord,
    create_retraining,
    find_output,
    note_webhook,
    read_retraining,
)
from tests.pipeline.retraining.outputs import new_output


def test_the_record_is_written_once_and_without_credentials(tmp_path: Path) -> None:
    output = new_output(tmp_path, "pets", "https://me:pa55word@mlflow.example.org")
    first = read_retraining(output)
    assert first.tracking == "https://***@mlflow.example.org"
    assert "pa55word" not in (tmp_path / RECORD_FILE).read_text()
    later = first.model_copy(update={"id": "another-id"})
    assert create_retraining(output, later) == first


def test_the_webhook_is_that_of_the_last_run_and_not_noted_before_there_is_an_output(tmp_path: Path) -> None:
    record = read_retraining(new_output(tmp_path / "out", "pets", "sqlite:////x.db"))
    empty = open_storage(tmp_path / "none")
    assert note_webhook(empty, record, "HOOK").webhook_env == "HOOK" and not empty.exists(RECORD_FILE)
    output = open_storage(tmp_path / "out")
    for variable in ("HOOK", None):
        assert note_webhook(output, read_retraining(output), variable) == read_retraining(output)
        assert read_retraining(output) == record.model_copy(update={"webhook_env": variable})


def test_models_by_name(tmp_path: Path) -> None:
    one = read_retraining(new_output(tmp_path / "one", "pets", "sqlite:////x.db"))
    assert one.model(None) == one.model("pets") == RetrainedModel(name="pets", kind="maskclip-plus")
    two = read_retraining(new_output(tmp_path / "two", "pets", "cars", "sqlite:////x.db"))
    assert two.model("cars").name == "cars"
    with pytest.raises(MaskMillError, match="has 2 models"):
        two.model(None)
    with pytest.raises(MaskMillError) as caught:
        two.model("pet")
    assert "Did you mean pets?" in caught.value.remedy


@pytest.mark.parametrize("name", ["a/b", "a:b", "it's", 'a"b', "a`b", "50%", " a", "a ", "", "..", "x" * 201])
def test_names_that_no_registry_takes_are_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        RetrainedModel(name=name, kind="clipseg")


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"{", "file_damaged"),
        (b"[]", "file_damaged"),
        (b"{}", "file_damaged"),
        (b'{"schema_version": 99}', "newer_version"),
    ],
)
def test_a_damaged_record_is_told(tmp_path: Path, content: bytes, code: str) -> None:
    (tmp_path / RECORD_FILE).write_bytes(content)
    with pytest.raises(MaskMillError) as caught:
        read_retraining(open_storage(tmp_path))
    assert caught.value.code == code and RECORD_FILE in caught.value.message


def test_a_record_of_a_later_version_with_more_in_it_is_read(tmp_path: Path) -> None:
    output = new_output(tmp_path, "pets", "sqlite:////x.db")
    record = json.loads((tmp_path / RECORD_FILE).read_text())
    (tmp_path / RECORD_FILE).write_text(json.dumps(record | {"more": 1}))
    assert isinstance(read_retraining(output), RetrainingRecord)


def test_an_output_is_found_by_its_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("retrain.yaml").write_text("name: pets\noutput: here/out\nimages: photos\n")
    Path("remote.yml").write_text("output: s3://bucket/out\n")
    assert find_output("retrain.yaml").uri == str(tmp_path / "here/out")
    assert find_output(tmp_path / "remote.yml").uri == "s3://bucket/out"
    assert find_output("here/out").uri == str(tmp_path / "here/out")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "There is no retrain.yaml"),
        ("name: pets\n", "names no output"),
        ("output: [1]\n", "names no output"),
        ("- output\n", "names no output"),
        ("output: {\n", "not valid YAML"),
    ],
)
def test_a_configuration_that_names_no_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("retrain.yaml").write_text(content)
    with pytest.raises(MaskMillError, match=says) as caught:
        find_output("retrain.yaml")
    assert caught.value.code == "input_missing" and caught.value.exit_status == 2
