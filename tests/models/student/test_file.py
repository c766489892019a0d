"""The file of a student: a round trip, and what is no student."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from models.clip.text import TextClassifier
from models.errors import MaskMillError
from models.settings import StudentConfig
from models.student.deeplab import DeepLab
from models.student.file import FILE, fingerprint, read_student, write_student

CONFIGS = [
    StudentConfig(
        decoder="light", backbone="light", embed_dim=16, width=4, depth=2, dilations=(1, 2), logit_scale=10.0
    ),
    StudentConfig(
        decoder="deeplabv3plus",
        backbone="light",
        embed_dim=16,
        width=4,
        learned_background=True,
        normalize_features=True,
    ),
    StudentConfig(decoder="deeplabv2", backbone="resnet50c", embed_dim=16),
]
IMAGES = torch.randint(0, 256, (2, 3, 37, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def student(config: StudentConfig = CONFIGS[0]) -> DeepLab:
    torch.manual_seed(0)
    text = TextClassifier(F.normalize(torch.randn(5, 16), dim=1), torch.tensor([0, 1, 1, 2, 2]), 3)
    model = DeepLab(config, text).train()
    with torch.no_grad():
        model(IMAGES)  # running statistics that are not the initial ones
    return model.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_student(tmp_path, student())


@pytest.mark.parametrize(
    ("config", "as_bytes"),
    [(CONFIGS[0], False), (CONFIGS[0], True), (CONFIGS[1], True), (CONFIGS[2], False)],
    ids=["light", "light from bytes", "deeplabv3plus from bytes", "resnet50c"],
)
def test_round_trip(config: StudentConfig, as_bytes: bool, tmp_path: Path) -> None:
    model = student(config)
    path = write_student(tmp_path / "run", model)
    assert path == tmp_path / "run" / FILE
    assert [entry.name for entry in path.parent.iterdir()] == [FILE]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = read_student(path.read_bytes() if as_bytes else path)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.config == config and not found.training
    state = model.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.state_dict().items())
    assert torch.equal(found.text.class_ids, model.text.class_ids)
    with torch.inference_mode():
        assert torch.equal(found(IMAGES), model(IMAGES))
    assert all(parameter.requires_grad for parameter in found.parameters())


def test_the_file_keeps_classes_that_came_later(tmp_path: Path) -> None:
    model = student()
    model.set_classifier(TextClassifier(F.normalize(torch.randn(7, 16), dim=1), torch.arange(7), 7))
    found = read_student(write_student(tmp_path, model))
    assert found.num_classes == 7
    with torch.inference_mode():
        assert torch.equal(found(IMAGES), model(IMAGES))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_leaves_the_classifier_exact(dtype: torch.dtype, file: Path) -> None:
    model, found = student(), read_student(file, "cpu", dtype)
    assert {parameter.dtype for parameter in found.parameters()} == {dtype}
    assert torch.equal(found.text.embeddings, model.text.embeddings)
    with torch.inference_mode():
        scores, expected = found(IMAGES), model(IMAGES)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (scores - expected).abs().max() < tolerance * expected.abs().max()


def test_fingerprint(file: Path) -> None:
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert fingerprint(file) == fingerprint(file.read_bytes()) == expected
    same = write_student(file.parent / "again", student())
    assert fingerprint(same) == expected


def test_writing_replaces_the_file_whole(file: Path) -> None:
    other = student(CONFIGS[1])
    write_student(file.parent, other)
    assert read_student(file).config == CONFIGS[1]
    assert [entry.name for entry in file.parent.iterdir()] == [FILE]


# --- what is no student -------------------------------------------------------------------------------------


def refusal(data: bytes | Path) -> MaskMillError:
    with pytest.raises(MaskMillError) as caught:
        read_student(data)
    assert caught.value.remedy
    return caught.value


def rewrite(file: Path, *, drop: str = "", extra: str = "", entry: object = None, **config: object) -> Path:
    """The same file with other tensors, another entry, or other settings in it."""
    tensors = load_file(file)
    tensors.pop(drop, None)
    if extra:
        tensors[extra] = torch.zeros(2)
    entry = entry or {"version": 1, "config": {**CONFIGS[0].model_dump(), **config}}
    save_file(tensors, file, {"maskmill_student": entry if isinstance(entry, str) else json.dumps(entry)})
    return file


def test_the_rewriter_changes_nothing_else(file: Path) -> None:
    assert read_student(rewrite(file)).config == CONFIGS[0]


def test_a_damaged_file(file: Path) -> None:
    data = file.read_bytes()
    generator = random.Random(0)
    for length in [0, 1, 8, 100, len(data) - 1, *(generator.randrange(len(data)) for _ in range(20))]:
        assert refusal(data[:length]).code == "model_damaged", length
    assert refusal(b"\xff" * 100).code == "model_damaged"


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=["none", "other"])
def test_a_foreign_file(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors", metadata)
    error = refusal(tmp_path / "w.safetensors")
    assert error.code == "model_damaged" and "w.safetensors" in error.message


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"entry": {"version": 2, "layers": []}}, "newer_version", "version 2"),
        ({"entry": {"config": {}}}, "newer_version", "version None"),
        ({"entry": {"version": 1}}, "model_damaged", "config"),
        ({"entry": "{"}, "model_damaged", "damaged"),
        ({"entry": "[]"}, "model_damaged", "something else"),
        ({"wings": 2}, "model_damaged", "wings"),
        ({"width": 8}, "model_damaged", "size mismatch"),
        ({"width": "wide"}, "model_damaged", "width"),
        ({"embed_dim": 32}, "model_damaged", "channels"),
        ({"drop": "decoder.skip.0.weight"}, "model_damaged", "decoder.skip.0.weight"),
        ({"drop": "text_rows"}, "model_damaged", "text_rows"),
        ({"extra": "decoder.more"}, "model_damaged", "decoder.more"),
    ],
)
def test_parts_that_do_not_fit(changes: dict[str, Any], code: str, words: str, file: Path) -> None:
    error = refusal(rewrite(file, **changes))
    assert error.code == code
    assert words in error.message
