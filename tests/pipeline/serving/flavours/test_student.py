from __future__ import annotations

import base64
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.images import fit
from pipeline.labelling.prepare import prepare_labeller, student_recipe
from pipeline.serving.flavours.student import log_student, save_student_model
from pipeline.table.labels import decode_confidence, decode_mask
from pipeline.toyworld.scenes import generate
from pipeline.trained.student import read_student_record
from tests.pipeline.trained.test_student import toy_student


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "run"
    toy_student(path)
    return path


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mlflow") / "model"
    save_student_model(folder, path)
    return path


@pytest.fixture(scope="module")
def model(saved: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(saved), model_config={"paths": True})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three scenes of two sizes; the last is larger than the student sees images."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for index, size in enumerate(((96, 96), (96, 96), (150, 200))):
        paths.append(folder / f"{index}.png")
        Image.fromarray(generate(index, 1, 224).images[0][: size[0], : size[1]]).save(paths[-1])
    return paths


def wanted(folder: Path, path: Path, least: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """What the Labeller gives for an image file."""
    recipe, ontology = student_recipe(str(folder), [f"min_confidence={least}"])
    image = np.asarray(Image.open(path).convert("RGB"))
    seen = fit(image, read_student_record(folder).labelling)
    (prediction,) = prepare_labeller(recipe, ontology).build().label([seen], [image.shape[:2]])
    return prediction.labels, prediction.confidence


def test_bytes_paths_and_data_uris_give_what_the_labeller_gives(
    folder: Path, model: mlflow.pyfunc.PyFuncModel, pictures: list[Path]
) -> None:
    data = pictures[1].read_bytes()
    cells = [
        str(pictures[0]),
        data,
        "data:image/png;base64," + base64.b64encode(data).decode(),
        pictures[2].as_uri(),
    ]
    out = model.predict(pd.DataFrame({"image": cells}, index=[7, 5, 3, 1]))
    assert list(out.index) == [7, 5, 3, 1]
    assert list(out.columns) == ["mask", "confidence", "height", "width", "error"]
    assert out["error"].isna().all()
    assert out["height"].tolist() == [96, 96, 96, 150] and out["width"].tolist() == [96, 96, 96, 200]
    for row, path in zip(out.itertuples(), [pictures[index] for index in (0, 1, 1, 2)], strict=True):
        labels, confidence = wanted(folder, path)
        assert (decode_mask(row.mask) == labels).all() and len(np.unique(labels)) > 2
        assert (decode_confidence(row.confidence) == confidence).all()
    assert model.metadata.metadata["classes"] == list(read_student_record(folder).ontology.names)


def test_a_list_of_rows_will_do(model: mlflow.pyfunc.PyFuncModel, pictures: list[Path]) -> None:
    rows = [{"image": str(pictures[0])}, {"image": pictures[1].read_bytes()}]
    out = model.predict(rows)
    assert out["error"].isna().all() and out["mask"].map(decode_mask).map(np.shape).tolist() == [(96, 96)] * 2


def test_min_confidence(folder: Path, model: mlflow.pyfunc.PyFuncModel, pictures: list[Path]) -> None:
    _, confidence = wanted(folder, pictures[0])
    least = float(np.median(confidence)) / 255
    out = model.predict([{"image": str(pictures[0])}], params={"min_confidence": least})
    labels, _ = wanted(folder, pictures[0], least)
    mask = decode_mask(out["mask"][0])
    assert (mask == labels).all() and 0.2 < (mask == 255).mean() < 0.8
    with pytest.raises(MaskMillError) as caught:
        model.predict([{"image": str(pictures[0])}], params={"min_confidence": 1.5})
    assert caught.value.code == "setting_invalid"


def test_too_large_images_and_no_images(model: mlflow.pyfunc.PyFuncModel, tmp_path: Path) -> None:
    Image.new("L", (1000, 101)).save(tmp_path / "large.png")  # the student's limit is 100,000 pixels
    out = model.predict([{"image": str(tmp_path / "large.png")}])
    assert out["error"][0].startswith("too_large: ")
    assert model.predict(pd.DataFrame({"image": []})).empty


def test_what_is_in_the_folder(saved: Path, folder: Path) -> None:
    described = mlflow.models.Model.load(str(saved))
    assert described.signature.inputs.input_names() == ["image"]
    assert described.signature.params.params[0].name == "min_confidence"
    artifacts = saved / "artifacts" / "student"
    assert sorted(path.name for path in artifacts.iterdir()) == ["model.safetensors", "student.json"]
    assert (artifacts / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(MaskMillError) as caught:
        save_student_model(folder, saved)
    assert caught.value.code == "output_exists"


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of a database; making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlruns.db"


@pytest.mark.slow
def test_in_a_run_and_in_the_registry(
    folder: Path, pictures: list[Path], tmp_path: Path, sqlite: str
) -> None:
    before = mlflow.get_tracking_uri()
    client = MlflowClient(sqlite, registry_uri=sqlite)
    experiment = client.create_experiment("train", (tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    first = log_student(client, folder, run_id=run)
    assert first.version is None and not client.search_registered_models()
    second = log_student(client, folder, run_id=run, register_as="pets")
    third = log_student(client, folder, run_id=run, register_as="pets")
    assert (second.version, third.version) == ("1", "2")
    assert str(client.get_model_version_by_alias("pets", "challenger").version) == "2"
    assert client.get_run(run).info.status == "RUNNING"  # the run is its owner's to end
    outputs = client.get_run(run).outputs.model_outputs
    assert {output.model_id for output in outputs} == {each.model_id for each in (first, second, third)}
    logged = client.get_logged_model(third.model_id)
    assert logged.status == "READY" and logged.source_run_id == run
    assert logged.params["student_fingerprint"] == read_student_record(folder).fingerprint
    assert mlflow.get_tracking_uri() == before and mlflow.active_run() is None
    try:
        mlflow.set_tracking_uri(sqlite)
        loaded = mlflow.pyfunc.load_model("models:/pets@challenger", model_config={"paths": True})
    finally:
        mlflow.set_tracking_uri(None)
    out = loaded.predict([{"image": str(pictures[0])}])
    assert (decode_mask(out["mask"][0]) == wanted(folder, pictures[0])[0]).all()


def test_a_model_that_could_not_be_logged_is_marked_so(folder: Path, tmp_path: Path, sqlite: str) -> None:
    client = MlflowClient(sqlite, registry_uri=sqlite)
    (tmp_path / "artifacts").write_text("a file where a folder should be")
    experiment = client.create_experiment("unlucky", (tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info.run_id
    with pytest.raises(OSError):
        log_student(client, folder, run_id=run, register_as="unlucky")
    (logged,) = client.search_logged_models([experiment])
    assert logged.status == "FAILED"
    assert not client.search_registered_models("name = 'unlucky'")
