"""What every MLflow model promises, whatever it says about an image."""

from __future__ import annotations

import ast
import base64
import json
import os
import socket
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
from PIL import Image

from models.clip.loading import load_clip
from models.clipseg.decoder import build_clipseg
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.files.images import ERROR_CODES
from pipeline.serving.flavours.clipseg import save_clipseg_model
from pipeline.serving.flavours.common import REQUIREMENTS
from pipeline.serving.flavours.student import save_student_model
from pipeline.table.labels import decode_mask
from pipeline.toyworld.scenes import generate
from pipeline.trained.clipseg import write_clipseg_folder
from tests.pipeline.trained.test_student import toy_student

SECRET = b"root:x:0:0 is no picture"
QUESTIONS = {"student": {}, "clipseg": {"text": "a zebra"}}


@pytest.fixture(scope="module", params=QUESTIONS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def saved(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model, whose training folder is gone."""
    folder = tmp_path_factory.mktemp(kind)
    run, model = folder / "run", folder / "model"
    if kind == "student":
        toy_student(run)
        save_student_model(run, model)
    else:
        config = ClipSegConfig(reduce_dim=16, extract_layers=(0, 1, 2), feedforward=32)
        network = build_clipseg(load_clip("toyclip", "bundled"), config)
        facts: dict[str, Any] = {"data": {}, "metrics": {}, "training": {}, "versions": {}}
        write_clipseg_folder(run, network, kind="clipseg", recipe={"triplets": {"size": 64}}, **facts)
        save_clipseg_model(run, model)
    run.rename(folder / "gone")
    return model


@pytest.fixture(scope="module")
def closed(saved: Path) -> mlflow.pyfunc.PyFuncModel:
    """As ``mlflow models serve`` loads it."""
    return mlflow.pyfunc.load_model(str(saved))


@pytest.fixture(scope="module")
def opened(saved: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(saved), model_config={"paths": True})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.fromarray(generate(3, 1, 96).images[0][:70]).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def test_bytes_data_uris_and_where_allowed_paths(
    kind: str, closed: mlflow.pyfunc.PyFuncModel, opened: mlflow.pyfunc.PyFuncModel, picture: Path
) -> None:
    question = QUESTIONS[kind]
    cells = [picture.read_bytes(), data_uri(picture), str(picture), picture.as_uri()]
    out = opened.predict([{"image": cell, **question} for cell in cells])
    assert out["error"].isna().all() and out["mask"].nunique() == 1
    assert decode_mask(out["mask"][0]).shape == (70, 96)
    out = closed.predict([{"image": cell, **question} for cell in cells])
    assert out["error"].isna().tolist() == [True, True, False, False]
    assert out["error"].str.startswith("unsupported_uri: ").tolist()[2:] == [True, True]
    assert out["height"].isna().tolist() == [False, False, True, True]


@pytest.mark.parametrize("column", ["image", "example", "example_mask"])
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_learned_about_files_of_the_server(
    kind: str, closed: mlflow.pyfunc.PyFuncModel, picture: Path, tmp_path: Path, column: str, there: bool
) -> None:
    if kind == "student" and column != "image":
        pytest.skip("takes images only")
    path = tmp_path / "secret"
    if there:
        path.write_bytes(SECRET)
    example = {} if column != "example_mask" else {"example": data_uri(picture)}
    row = {"image": data_uri(picture), **QUESTIONS[kind], **example, column: str(path)}
    errors = {closed.predict([{**row, column: str(one)}])["error"][0] for one in (path, "/nowhere/at/all")}
    assert len(errors) == 1 and errors.pop().startswith("unsupported_uri: ")


def test_errors_do_not_quote_files(kind: str, opened: mlflow.pyfunc.PyFuncModel, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(SECRET)
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + SECRET)
    for name in ("secret", "cut.png"):
        out = opened.predict([{"image": str(tmp_path / name), **QUESTIONS[kind]}])
        assert out["error"][0] and "root" not in out["error"][0] and str(len(SECRET)) not in out["error"][0]


@pytest.fixture(scope="module")
def odd_places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Whatever a path may lead to that is no picture."""
    folder = tmp_path_factory.mktemp("odd")
    (folder / "secret").write_bytes(SECRET)
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + SECRET)
    (folder / "empty").touch()
    (folder / "link.png").symlink_to(folder / "secret")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "fifo.png")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket.png"))
    places = {path.name: str(path) for path in folder.iterdir()}
    return places | {
        "folder": str(folder),
        "process": "/proc/self/environ",
        "device": "/dev/zero",
        "terminal": "/dev/tty",
        "uri": (folder / "link.png").as_uri(),
        "dots": f"{folder}/../{folder.name}/secret",
        "under a file": f"{folder}/secret/x",
        "nul": f"{folder}/secret\0.png",
        "long": "/" + "a" * 5000,
        "nowhere": f"{folder}/nowhere",
        "chained": f"file://{folder}/secret::zip://x",
    }


@pytest.mark.parametrize("column", ["image", "example", "example_mask"])
def test_errors_are_a_code_and_its_meaning(
    kind: str,
    opened: mlflow.pyfunc.PyFuncModel,
    picture: Path,
    odd_places: dict[str, str],
    column: str,
) -> None:
    """Neither content nor size nor the address, and no row waits forever."""
    if kind == "student" and column != "image":
        pytest.skip("takes images only")
    example = {} if column != "example_mask" else {"example": data_uri(picture)}
    row = {"image": data_uri(picture), **QUESTIONS[kind], **example}
    out = opened.predict([{**row, column: place} for place in odd_places.values()])
    for name, told in zip(odd_places, out["error"], strict=True):
        code, _, meaning = str(told).partition(": ")
        assert meaning == ERROR_CODES.get(code), (name, told)
    assert out["mask"].isna().all()


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
    kind: str, opened: mlflow.pyfunc.PyFuncModel, picture: Path, cell: Any, code: str
) -> None:
    out = opened.predict([{"image": cell, **QUESTIONS[kind]}, {"image": str(picture), **QUESTIONS[kind]}])
    assert out["error"][0].startswith(f"{code}: ")
    assert out.drop(columns="error").iloc[0].isna().all()
    assert out["error"].isna()[1] and decode_mask(out["mask"][1]).shape == (70, 96)


def test_no_rows(kind: str, closed: mlflow.pyfunc.PyFuncModel, picture: Path) -> None:
    full = closed.predict([{"image": picture.read_bytes(), **QUESTIONS[kind]}])
    none = closed.predict(pd.DataFrame({"image": []}))
    assert none.empty and list(none.columns) == list(full.columns)


@pytest.mark.parametrize("precision", ["x", "float32", 16])
def test_an_unknown_precision(saved: Path, precision: Any) -> None:
    with pytest.raises(MaskMillError) as caught:
        mlflow.pyfunc.load_model(str(saved), model_config={"precision": precision})
    assert caught.value.code == "setting_invalid" and "bf16" in caught.value.remedy


def test_its_example_works_and_nothing_is_pickled(saved: Path, closed: mlflow.pyfunc.PyFuncModel) -> None:
    example = mlflow.models.Model.load(str(saved)).load_input_example(str(saved))
    answer = closed.predict(example)
    assert answer["error"].isna().all()
    assert all(decode_mask(mask).shape == (32, 32) for mask in answer["mask"])
    assert not [path for path in saved.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]


def test_over_http_as_mlflow_serves_it(kind: str, closed: mlflow.pyfunc.PyFuncModel, picture: Path) -> None:
    rows = [
        {"image": data_uri(picture), **QUESTIONS[kind]},
        {"image": "data:image/png;base64,AAAA", **QUESTIONS[kind]},
        {"image": str(picture), **QUESTIONS[kind]},
    ]
    answer = TestClient(scoring_server.init(closed)).post("/invocations", json={"dataframe_records": rows})
    assert answer.status_code == 200, answer.text
    good, bad, path = answer.json()["predictions"]
    expected = closed.predict(rows[:1])["mask"][0]
    assert base64.b64decode(good["mask"]) == expected
    assert bad["error"].startswith("not_an_image: ") and bad["mask"] is None and bad["height"] is None
    assert path["error"].startswith("unsupported_uri: ")


ELSEWHERE = """\
import json, sys
import mlflow

model = mlflow.pyfunc.load_model(sys.argv[1])
out = model.predict([{"image": open(sys.argv[2], "rb").read(), **json.loads(sys.argv[3])}])
ours = [m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] in ("models", "pipeline")]
json.dump({"mask": out["mask"][0].hex(), "files": ours}, open(sys.argv[4], "w"))
"""


@pytest.mark.slow
def test_it_works_where_there_is_no_repository(
    kind: str, saved: Path, closed: mlflow.pyfunc.PyFuncModel, picture: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere.py").write_text(ELSEWHERE)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    question = json.dumps(QUESTIONS[kind])
    done = subprocess.run(
        # The script is in another folder: neither the repository nor this one is on the path.
        [sys.executable, "elsewhere.py", str(saved), str(picture), question, "answer.json"],
        cwd=tmp_path,
        env=environment | {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/none.db"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads((tmp_path / "answer.json").read_text())
    expected = closed.predict([{"image": picture.read_bytes(), **QUESTIONS[kind]}])["mask"][0]
    found, wanted = (decode_mask(data) for data in (bytes.fromhex(answer["mask"]), expected))
    assert np.mean(found == wanted) > 0.999
    files = [Path(file) for file in answer["files"] if file]
    assert files and all(saved in file.parents for file in files)
    check_requirements(files)


def check_requirements(files: list[Path]) -> None:
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
