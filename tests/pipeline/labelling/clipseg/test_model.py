"""Which CLIPSeg is meant: the CLIP beneath, the size it was trained on, and that every form of it loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from models.clip.loading import Clip, load_clip
from models.clipseg.baselines import ClipDeconvConfig, build_clip_deconv
from models.clipseg.decoder import ClipSeg, build_clipseg
from models.clipseg.weights import save_clipseg, save_decoder
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.labelling.clipseg.model import ClipSegWeights, split_clip
from pipeline.trained.clipseg import write_clipseg_folder

SMALL = ClipSegConfig(reduce_dim=16, extract_layers=(0, 2), feedforward=32)
TOY, PAPER = ("toyclip", "bundled"), ("ViT-B-16-quickgelu", "openai")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy CLIP with a decoder in every form: alone, in a training's folder, in Hugging Face's."""
    folder = tmp_path_factory.mktemp("clipseg")
    clip: Clip = load_clip(*TOY)
    model = build_clipseg(clip, SMALL, seed=2)
    save_decoder(model, folder / "toy.safetensors")
    save_clipseg(model, folder / "hub")
    (folder / "rd64.pth").write_bytes(b"")
    small = ClipDeconvConfig(reduce_dim=8, reduce2_dim=8, extract_layer=1)
    for name, made, kind in (
        ("run", model, "clipseg"),
        (
            "deconv",
            build_clip_deconv(clip, small, seed=2),
            "clip-deconv",
        ),
    ):
        _write(folder / name, made, kind)
    return {path.name: path for path in folder.iterdir()}


def _write(folder: Path, model: ClipSeg, kind: str) -> None:
    recipe = {"name": "x", "triplets": {"size": 96, "support_size": 64}}
    write_clipseg_folder(
        folder, model, kind=kind, recipe=recipe, data={}, metrics={}, training={}, versions={}
    )


@pytest.mark.parametrize(
    ("place", "clip", "beneath", "sizes"),
    [
        ("toy.safetensors", None, TOY, (128, 128)),
        ("toy.safetensors", "ViT-B-16:random:0", ("ViT-B-16", "random:0"), (352, 352)),
        ("rd64.pth", None, PAPER, (352, 352)),
        ("rd64.pth", "hf-hub:org/name", ("hf-hub:org/name", None), (352, 352)),
        ("run", None, TOY, (96, 64)),
        ("deconv", None, TOY, (96, 64)),
        ("hub", None, None, (352, 352)),
        ("CIDAS/clipseg-rd64-refined", None, None, (352, 352)),
        ("random:0", None, PAPER, (352, 352)),
        ("random:0", "toyclip:bundled", TOY, (128, 128)),
    ],
)
def test_what_is_known_before_it_is_loaded(
    places: dict[str, Path],
    place: str,
    clip: str | None,
    beneath: tuple[str, str | None] | None,
    sizes: tuple[int, int],
) -> None:
    weights = ClipSegWeights(str(places.get(place, place)), clip)
    assert weights.known_clip() == beneath and weights.sizes() == sizes


@pytest.mark.parametrize("place", ["toy.safetensors", "run"])
def test_weights_in_the_home_folder(
    places: dict[str, Path], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HOME", str(places[place].parent))
    weights = ClipSegWeights(f"~/{place}")
    assert weights == ClipSegWeights(str(places[place])) and weights.known_clip() == TOY


@pytest.mark.parametrize("place", ["toy.safetensors", "run", "hub", "deconv"])
def test_every_form_loads(places: dict[str, Path], place: str) -> None:
    model = ClipSegWeights(str(places[place])).load(device=torch.device("cpu"))
    assert type(model.decoder).__name__ == ("ClipDeconvDecoder" if place == "deconv" else "ClipSegDecoder")
    if place != "deconv":  # one model in three forms
        file = ClipSegWeights(str(places["toy.safetensors"])).load(device=torch.device("cpu"))
        assert model.decoder.film_mul.weight.equal(file.decoder.film_mul.weight)
        other = ClipSegWeights(str(places[place]), extract_layers=(0, 1)).load(device=torch.device("cpu"))
        assert model.decoder.extract_layers == (0, 2) and other.decoder.extract_layers == (0, 1)
    else:
        with pytest.raises(MaskMillError) as caught:
            ClipSegWeights(str(places[place]), extract_layers=(0,)).load(device=torch.device("cpu"))
        assert caught.value.code == "setting_invalid"


def test_a_changed_folder_is_noticed(places: dict[str, Path], tmp_path: Path) -> None:
    for file in places["run"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    record = json.loads((tmp_path / "clipseg.json").read_text()) | {"fingerprint": "0" * 64}
    (tmp_path / "clipseg.json").write_text(json.dumps(record))
    with pytest.raises(MaskMillError) as caught:
        ClipSegWeights(str(tmp_path)).load(device=torch.device("cpu"))
    assert caught.value.code == "model_damaged"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("ViT-B-16-quickgelu:openai", PAPER),
        ("toyclip:random:3", ("toyclip", "random:3")),
        ("toyclip", ("toyclip", None)),
        ("local-dir:/weights/a:b", ("local-dir:/weights/a:b", None)),
    ],
)
def test_names_of_clips(text: str, parts: tuple[str, str | None]) -> None:
    assert split_clip(text) == parts
