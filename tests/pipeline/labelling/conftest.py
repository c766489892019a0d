from __future__ import annotations

from pathlib import Path

import pytest
import torch

from models.clip.loading import load_clip
from models.clipseg.decoder import build_clipseg
from models.clipseg.weights import save_decoder
from models.settings import ClipSegConfig
from tests.pipeline.trained.test_student import toy_student


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "run"
    toy_student(path)
    return path


@pytest.fixture(scope="session")
def clipseg_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder over the bundled CLIP whose answers differ between prompts, and leave some pixels to none."""
    model = build_clipseg(
        load_clip("toyclip", "bundled"),
        ClipSegConfig(reduce_dim=16, extract_layers=(0, 1, 2), feedforward=32),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.decoder.state_dict().items():
            if name.startswith("film") or name == "trans_conv.weight":
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[0] ** -0.5)
        model.decoder.state_dict()["trans_conv.bias"].fill_(-0.5)
    path = tmp_path_factory.mktemp("clipseg") / "toy.safetensors"
    save_decoder(model, path)
    return path
