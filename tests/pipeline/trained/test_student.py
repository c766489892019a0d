from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from models.clip.loading import Clip, load_clip
from models.clip.text import TextClassifier, build_text_classifier
from models.errors import MaskMillError
from models.settings import StudentConfig
from models.student.deeplab import DeepLab
from pipeline.files.images import ImageSettings
from pipeline.files.storage import Storage
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import generate
from pipeline.trained.record import read_trained_weights
from pipeline.trained.student import (
    is_student,
    load_student,
    read_student_record,
    write_student_folder,
)

SIZES = ImageSettings(scale=(512, 96), keep_ratio=True, resize="opencv", max_pixels=100_000)


@cache
def _toy_clip() -> Clip:
    return load_clip("toyclip", "bundled")


def toy_text(ontology: Ontology) -> tuple[TextClassifier, dict[str, Any]]:
    """The classifier of an ontology by the bundled CLIP, and what a record says about it."""
    clip = _toy_clip()
    text = build_text_classifier(
        clip, ontology.prompts(), templates=ontology.templates, merge=ontology.merges()
    )
    words = {"model": "toyclip", "pretrained": "bundled", "fingerprint": clip.fingerprint}
    return text, words | {"precision": "fp32"}


def toy_student(folder: str | Path, *, ontology: Ontology | None = None, **config: Any) -> DeepLab:
    """Write a small student with seeded random weights, whose batch norms have seen scenes."""
    ontology = ontology or load_ontology("toyworld")
    text, words = toy_text(ontology)
    if config.get("learned_background"):
        keep = text.class_ids > 0
        text = TextClassifier(text.embeddings[keep], text.class_ids[keep] - 1, text.num_classes - 1)
    torch.manual_seed(5)
    fields = {"decoder": "light", "backbone": "light", "width": 8, "depth": 1, "logit_scale": 4.0} | config
    model = DeepLab(StudentConfig(embed_dim=text.embeddings.shape[1], **fields), text).train()
    scenes = torch.from_numpy(generate(11, 4, 64).images).permute(0, 3, 1, 2)
    with torch.no_grad():
        for _ in range(8):
            model(scenes)
    write_student_folder(
        folder,
        model.eval(),
        ontology=ontology,
        recipe={"name": "toy", "hash": "abc"},
        labelling=SIZES,
        teacher={"labels": "s3://somewhere/labels"},
        text=words,
        metrics={"miou": 0.5},
        training={"iterations": 8},
        versions={"torch": str(torch.__version__)},
    )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "run"
    toy_student(path)
    return path


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "run"))


def test_a_student_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = toy_student(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")  # what else training leaves
    record = read_student_record(tmp_path / "run")
    assert record.name == "run" and record.uri == str(tmp_path / "run")
    assert record.ontology == load_ontology("toyworld") and record.labelling == SIZES
    assert record.config == written.config.model_dump(mode="json")
    assert record.fingerprint == hashlib.sha256((tmp_path / "run/model.safetensors").read_bytes()).hexdigest()
    on_disk = json.loads((tmp_path / "run/student.json").read_text())
    assert on_disk == record.to_dict()
    assert on_disk["schema_version"] == 2 and on_disk["kind"] == "student"
    assert on_disk["labelling"] == {
        "scale": [512, 96],
        "keep_ratio": True,
        "resize": "opencv",
        "max_pixels": 100_000,
        "large_window": 1024,
        "large_overlap": 128,
    }
    model = load_student(record, device=torch.device("cpu"), dtype=torch.float32)
    assert not model.training
    images = torch.randint(0, 256, (2, 3, 40, 56), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(model(images), written(images))


def test_an_object_store_holds_one_as_well() -> None:
    uri = "memory://bucket/students/a"
    try:
        assert not is_student(uri)
        written = toy_student(uri)
        assert is_student(uri)
        record = read_student_record(uri)
        assert record.uri == uri and record.name == "a"
        model = load_student(record, device=torch.device("cpu"), dtype=torch.float32)
        images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
        with torch.inference_mode():
            assert torch.equal(model(images), written(images))
    finally:
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


@pytest.mark.parametrize(
    "name", ["toyclip", "ViT-B-16-quickgelu", "ViT-B/16", "hf-hub:org/name", "local-dir:x"]
)
def test_names_of_clips_are_no_students(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toyclip").mkdir()
    assert not is_student(name)


def test_a_student_is_replaced_only_on_request(copied: Path) -> None:
    before = (copied / "student.json").read_bytes()
    with pytest.raises(MaskMillError) as caught:
        toy_student(copied, width=4)
    assert caught.value.code == "output_exists" and "--overwrite" in caught.value.remedy
    assert (copied / "student.json").read_bytes() == before
    record = read_student_record(copied)
    model = load_student(record, device=torch.device("cpu"), dtype=torch.float32)
    fields = {name: getattr(record, name) for name in ("recipe", "labelling", "teacher", "text", "metrics")}
    write_student_folder(
        copied, model, ontology=record.ontology, training={"again": 1}, versions={}, overwrite=True, **fields
    )
    assert read_student_record(copied).training == {"again": 1}


def _edit(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        data = json.loads((folder / "student.json").read_text())
        for key, value in changes.items():
            if value is None:
                del data[key]
            else:
                data[key] = value
        (folder / "student.json").write_text(json.dumps(data))

    return edit


def _rename_class(folder: Path) -> None:
    text = (folder / "student.json").read_text()
    (folder / "student.json").write_text(text.replace("grass", "lawn"))


def _flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "code", "said"),
    [
        (lambda folder: (folder / "student.json").unlink(), "name_unknown", "there is no student.json"),
        (shutil.rmtree, "name_unknown", "there is no student.json"),
        (_edit(kind="table"), "name_unknown", "no student is described by its student.json"),
        (_edit(schema_version=3), "newer_version", "newer MaskMill"),
        (_edit(labelling=None), "model_damaged", "labelling: Field required"),
        (_edit(labelling={"scale": [1]}), "model_damaged", "incomplete"),
        (_edit(config=[1]), "model_damaged", "incomplete"),
        (_edit(fingerprint=None), "model_damaged", "fingerprint: Field required"),
        (_rename_class, "model_damaged", "not the ones that it was trained for"),
        (lambda folder: (folder / "student.json").write_text("{"), "model_damaged", "not valid JSON"),
        (lambda folder: (folder / "student.json").write_text("[]"), "model_damaged", "not a record"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model_damaged", "no model.safetensors"),
        (_flip_a_bit, "model_damaged", "is not the file that its student.json names"),
    ],
)
def test_what_is_wrong_with_a_folder_is_said(
    copied: Path, harm: Callable[[Path], None], code: str, said: str
) -> None:
    harm(copied)
    with pytest.raises(MaskMillError) as caught:
        load_student(read_student_record(copied), device=torch.device("cpu"), dtype=torch.float32)
    assert caught.value.code == code
    assert said in caught.value.message and str(copied) in caught.value.message


def test_a_folder_of_schema_1_is_read(copied: Path) -> None:
    now = read_student_record(copied)
    old = json.loads((copied / "student.json").read_text()) | {"schema_version": 1}
    old["weights"] = {"file": "model.safetensors", "fingerprint": old.pop("fingerprint")}
    (copied / "student.json").write_text(json.dumps(old))
    then = read_student_record(copied)
    assert then.to_dict() == now.to_dict()
    load_student(then, device=torch.device("cpu"), dtype=torch.float32)


def test_a_kill_between_the_two_files_is_noticed(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(Exception):
        pass

    def kill(*_: object) -> None:
        raise Killed

    record = read_student_record(copied)
    model = load_student(record, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    monkeypatch.setattr(Storage, "write_json", kill)
    fields = {
        name: getattr(record, name)
        for name in ("ontology", "recipe", "labelling", "teacher", "text", "metrics", "training", "versions")
    }
    with pytest.raises(Killed):
        write_student_folder(copied, model, overwrite=True, **fields)
    with pytest.raises(MaskMillError) as caught:
        read_trained_weights(read_student_record(copied))
    assert caught.value.code == "model_damaged"
