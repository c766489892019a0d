from __future__ import annotations

import ast
import base64
import io
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from mlflow.pyfunc import scoring_server
from mlflow.tracking import MlflowClient
from PIL import Image

from models.device import best_device, native_precision
from models.errors import MaskMillError
from pipeline.files.images import resize, target_size
from pipeline.labelling.student import StudentLabeller
from pipeline.serving.flavours.common import REQUIREMENTS
from pipeline.serving.flavours.student import log_student, save_student_model
from pipeline.table.labels import decode_confidence, decode_mask
from pipeline.toyworld.scenes import generate
from pipeline.trained.student import read_student_record
from tests.pipeline.trained.test_student import toy_student

PRECISION = native_precision(best_device())


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
    return mlflow.pyfunc.load_model(str(saved))


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
    record = read_student_record(folder)
    image = np.asarray(Image.open(path).convert("RGB"))
    size = target_size(*image.shape[:2], scale=record.labelling.scale)
    labeller = StudentLabeller(
        uri=record.uri,
        thresholds=[least] * record.ontology.num_classes,
        precision=PRECISION,
        batch_size=0,
        ignore_index=255,
    )
    (prediction,) = labeller.label([resize(image, size)], [image.shape[:2]])
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


@pytest.mark.parametrize(
    ("cell", "code"),
    [
        (b"no image", "not_an_image"),
        (b"", "empty"),
        ("/nowhere/at/all.png", "not_found"),
        ("gopher://host/a.png", "unsupported_uri"),
        ("data:image/png;base64,@@@", "unreadable"),
        ("data:image/png,abc", "unreadable"),
        (None, "not_an_image"),
        (17, "not_an_image"),
    ],
)
def test_a_bad_image_is_a_row_with_an_error(
    model: mlflow.pyfunc.PyFuncModel, pictures: list[Path], cell: Any, code: str
) -> None:
    out = model.predict(pd.DataFrame({"image": [cell, str(pictures[0])]}))
    assert out["error"][0].startswith(f"{code}: ")
    assert out.loc[0, ["mask", "confidence", "height", "width"]].isna().all()
    assert out["error"].isna()[1] and decode_mask(out["mask"][1]).shape == (96, 96)


def test_too_large_images_and_no_images(model: mlflow.pyfunc.PyFuncModel, tmp_path: Path) -> None:
    Image.new("L", (1000, 101)).save(tmp_path / "large.png")  # the student's limit is 100,000 pixels
    out = model.predict([{"image": str(tmp_path / "large.png")}])
    assert out["error"][0].startswith("too_large: ")
    assert model.predict(pd.DataFrame({"image": []})).empty


def test_signature_example_and_what_is_in_the_folder(saved: Path, folder: Path) -> None:
    described = mlflow.models.Model.load(str(saved))
    assert described.signature.inputs.input_names() == ["image"]
    assert described.signature.params.params[0].name == "min_confidence"
    example = described.load_input_example(str(saved))
    answer = mlflow.pyfunc.load_model(str(saved), model_config={"precision": "fp32"}).predict(example)
    assert answer["error"].isna().all() and decode_mask(answer["mask"][0]).shape == (32, 32)
    assert not [path for path in saved.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]
    artifacts = saved / "artifacts" / "student"
    assert sorted(path.name for path in artifacts.iterdir()) == ["model.safetensors", "student.json"]
    assert (artifacts / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    with pytest.raises(MaskMillError) as caught:
        save_student_model(folder, saved)
    assert caught.value.code == "output_exists"


def test_over_http_as_mlflow_serves_it(
    folder: Path, model: mlflow.pyfunc.PyFuncModel, pictures: list[Path]
) -> None:
    data = "data:image/png;base64," + base64.b64encode(pictures[0].read_bytes()).decode()
    rows = [{"image": data}, {"image": "data:image/png;base64,AAAA"}]
    answer = TestClient(scoring_server.init(model)).post("/invocations", json={"dataframe_records": rows})
    assert answer.status_code == 200
    good, bad = answer.json()["predictions"]
    assert (decode_mask(base64.b64decode(good["mask"])) == wanted(folder, pictures[0])[0]).all()
    assert bad["error"].startswith("not_an_image: ") and bad["mask"] is None and bad["height"] is None


ELSEWHERE = """\
import json, sys
import mlflow

model = mlflow.pyfunc.load_model(sys.argv[1])
out = model.predict([{"image": sys.argv[2]}, {"image": open(sys.argv[2], "rb").read()}])
ours = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in ("models", "pipeline")]
json.dump({"masks": [mask.hex() for mask in out["mask"]], "files": ours}, open(sys.argv[3], "w"))
"""


def test_it_works_where_there_is_no_repository(
    folder: Path, saved: Path, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        # The script is in another folder: neither the repository nor this one is on the path.
        [sys.executable, "elsewhere.py", str(saved), str(pictures[0]), "answer.json"],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/none.db"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    labels, _ = wanted(folder, pictures[0])
    for mask in answer["masks"]:
        assert (np.asarray(Image.open(io.BytesIO(bytes.fromhex(mask)))) == labels).all()
    files = [Path(file) for file in answer["files"] if file]
    assert files and all(saved in file.parents for file in files)
    _check_requirements(files)


def _check_requirements(files: list[Path]) -> None:
    """Every package that the loaded code imports when it is loaded is in the requirements."""
    distributions = metadata.packages_distributions()
    # pydantic pins its core.
    named = {name.replace("_", "-") for name in REQUIREMENTS} | {"pydantic-core"}
    for file in files:
        for node in ast.parse(file.read_text()).body:  # the top level: neither TYPE_CHECKING nor functions
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            else:
                continue
            for module in modules:
                root = module.partition(".")[0]
                if root in sys.stdlib_module_names or root in ("models", "pipeline"):
                    continue
                found = {name.lower().replace("_", "-") for name in distributions[root]}
                assert found & named, f"{file.name} imports {root}, which is not in the requirements"


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tracking URI of a database; making its tables takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking')}/mlruns.db"


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
        loaded = mlflow.pyfunc.load_model("models:/pets@challenger")
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
