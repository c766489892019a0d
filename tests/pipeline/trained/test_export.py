from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from jobs.export import OF_STUDENTS
from models.errors import MaskMillError
from models.student.deeplab import DeepLab
from pipeline.ontology.reading import parse_classes
from pipeline.trained.export import EXPORTERS, OPSET, SMALLEST, to_onnx, write_checked
from pipeline.trained.student import load_student, read_student_record
from tests.pipeline.trained.test_student import toy_student

SIZES = [(1, SMALLEST, SMALLEST), (1, 64, 200), (2, 97, 33), (5, 17, 48)]


def model_of(folder: Path) -> DeepLab:
    return load_student(read_student_record(folder), device=torch.device("cpu"), dtype=torch.float32)


def pixels(shape: tuple[int, int, int]) -> np.ndarray:
    batch, height, width = shape
    return np.random.default_rng(1).integers(0, 256, (batch, 3, height, width), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a learned background and two rows for a class: all that a last layer may have."""
    path = tmp_path_factory.mktemp("student") / "run"
    ontology = parse_classes("zebra, sky, grass", background=["thing"], templates="toyworld")
    fields = ontology.to_dict()
    fields["classes"][1]["synonyms"] = ["cloud", "blue"]
    toy_student(path, ontology=type(ontology).from_dict(fields), learned_background=True)
    return path


@pytest.fixture(scope="module")
def onnx_file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return to_onnx(folder, tmp_path_factory.mktemp("onnx") / "student.onnx").path


@pytest.mark.slow
def test_onnx_gives_the_students_logits_at_any_size(folder: Path, onnx_file: Path) -> None:
    model = model_of(folder)
    session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
    for shape in SIZES:
        images = pixels(shape)
        (logits,) = session.run(None, {"images": images})
        with torch.inference_mode():
            wanted = model(torch.from_numpy(images)).numpy()
        assert logits.dtype == np.float32 and logits.shape == (shape[0], 4, *shape[1:])
        assert np.abs(logits - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_the_command_offers_every_format() -> None:
    assert set(OF_STUDENTS) == set(EXPORTERS)


def test_onnx_says_what_it_is(folder: Path, onnx_file: Path) -> None:
    made = onnx.load(onnx_file)
    onnx.checker.check_model(made, full_check=True)
    assert {entry.domain: entry.version for entry in made.opset_import}[""] == OPSET
    (given,), (out,) = made.graph.input, made.graph.output
    assert (given.name, out.name) == ("images", "logits")
    assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    axes = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    described = json.loads({entry.key: entry.value for entry in made.metadata_props}["maskmill"])
    record = read_student_record(folder)
    assert described["classes"] == ["background", "zebra", "sky", "grass"]
    assert described["fingerprint"] == record.fingerprint and described["ignore_index"] == 255
    assert described["labelling"]["scale"] == [512, 96]


@pytest.mark.parametrize(
    "harm", [lambda logits: logits * 1.001, lambda logits: logits[..., 1:], lambda logits: logits * np.nan]
)
def test_a_program_that_differs_is_not_written(
    folder: Path, tmp_path: Path, harm: Callable[[np.ndarray], np.ndarray]
) -> None:
    def write(model: DeepLab, metadata: str, target: Path) -> None:
        target.write_text(metadata)

    def load(target: Path) -> Callable[[np.ndarray], np.ndarray]:
        model = model_of(folder).requires_grad_(False)
        return lambda images: harm(model(torch.from_numpy(images)).numpy())

    with pytest.raises(MaskMillError) as caught:
        write_checked(folder, tmp_path / "student.onnx", "a format", ".onnx", False, write, load)
    assert caught.value.code == "export_failed" and not list(tmp_path.iterdir())


def test_what_the_exporter_raises_is_one_line(folder: Path, tmp_path: Path) -> None:
    def write(*_: object) -> None:
        raise RuntimeError("no such operator\nmore\nand more")

    with pytest.raises(MaskMillError) as caught:
        write_checked(folder, tmp_path / "a.onnx", "a format", ".onnx", False, write, lambda _: np.copy)
    assert caught.value.code == "export_failed" and not list(tmp_path.iterdir())
    assert "RuntimeError: no such operator." in caught.value.message


def test_without_onnx_the_command_to_install_it_is_said(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else found(name)
    )
    with pytest.raises(MaskMillError) as caught:
        to_onnx(folder, tmp_path / "student.onnx")
    assert caught.value.code == "package_missing"
    assert caught.value.remedy == "pip install onnx onnxscript onnxruntime"
