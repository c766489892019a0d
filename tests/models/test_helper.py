"""Finding and loading helpers."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from models.errors import MaskMillError
from models.helper import Helper, find_helper, load_helper


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("models.hub.reachable", lambda _host: False)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))


def test_published_weights_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(MaskMillError) as told:
        find_helper("vit_base_patch16_224.dino", "", cache_dir=str(tmp_path))
    assert told.value.code == "weights_missing"
    assert "the helper vit_base_patch16_224.dino" in told.value.message
    for line in (
        "curl -fLO https://huggingface.co/timm/vit_base_patch16_224.dino/resolve/main/model.safetensors",
        "--set helper_weights=model.safetensors",
    ):
        assert line in told.value.remedy


def test_published_weights_in_the_cache(tmp_path: Path) -> None:
    kept = tmp_path / "models--timm--test_vit.r160_in1k"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc").mkdir(parents=True)
    tower = timm.create_model("test_vit", num_classes=1000)
    save_file(tower.state_dict(), kept / "snapshots" / "abc" / "model.safetensors")
    source = find_helper("test_vit.r160_in1k", "", cache_dir=str(tmp_path))
    assert source.path is not None and source.architecture == "test_vit"
    made = load_helper(source)  # its classifier is left out
    own = made.tower.state_dict()
    assert all(torch.equal(tensor, tower.state_dict()[name]) for name, tensor in own.items())


@pytest.mark.parametrize(
    ("name", "weights", "code", "message"),
    [
        ("vit_base_patch16_224", "", "name_unknown", "does not say which weights"),
        ("vit_base_patch16_224.dinoo", "", "name_unknown", "no weights 'dinoo'"),
        ("vit_base_patch16_22", "", "name_unknown", "no model named"),
        ("vit_bse_patch16_224.dino", "random:0", "name_unknown", "no model named"),
        ("vit_base_patch16_224", "random:x", "name_unknown", "not a whole number"),
        ("vit_base_patch16_224", "there/is/none.pth", "weights_missing", "There is no weights file"),
    ],
)
def test_names_that_are_not_known(
    name: str, weights: str, code: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(MaskMillError, match=message) as told:
        find_helper(name, weights, cache_dir=str(tmp_path))
    assert told.value.code == code


def test_by_file(tmp_path: Path) -> None:
    made = load_helper(find_helper("test_vit", "random:7"))
    save_file(made.tower.state_dict(), tmp_path / "own.safetensors")
    source = find_helper("test_vit", str(tmp_path / "own.safetensors"))
    again = load_helper(source)
    images = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    for kind in ("tokens", "values"):
        assert torch.equal(made.features(images, kind), again.features(images, kind))  # type: ignore[arg-type]
        assert made.features(images, kind).shape == (1, 64, 3, 4)  # type: ignore[arg-type]
    assert len(source.fingerprint) == 64
    assert find_helper("test_vit", "random:7").fingerprint == "random:7:test_vit"
    with pytest.raises(MaskMillError, match="are not those of timm's vit_tiny_patch16_224"):
        load_helper(find_helper("vit_tiny_patch16_224", str(tmp_path / "own.safetensors")))


def test_images_are_normalised_as_the_weights_want_it() -> None:
    """The tag says how, and the view starts from what was normalised for CLIP."""
    tower = load_helper(find_helper("test_vit", "random:0")).tower
    source = find_helper("vit_base_patch16_224.dino", "random:0")
    made = Helper(source, tower, torch.device("cpu"), torch.float32)
    assert made.mean == (0.485, 0.456, 0.406)
    images = torch.randint(0, 256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(0)).double()
    mean, std = (
        255 * torch.tensor(each).double()[:, None, None] for each in ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    )
    own = (images / 255 - torch.tensor(made.mean)[:, None, None]) / torch.tensor(made.std)[:, None, None]
    found = made.view(mean, std).features((images - mean) / std, "tokens")
    assert torch.allclose(found, made.features(own, "tokens"), atol=1e-5)


def test_towers_that_cannot_help() -> None:
    with pytest.raises(MaskMillError, match="does not take images of any size"):
        load_helper(find_helper("test_resnet", "random:0"))
    rotary = load_helper(find_helper("vit_small_patch16_dinov3", "random:0"))
    images = torch.zeros(1, 3, 32, 48)
    assert rotary.features(images, "tokens").shape == (1, 384, 2, 3)
    with pytest.raises(MaskMillError, match="values of vit_small_patch16_dinov3"):
        rotary.features(images, "values")
