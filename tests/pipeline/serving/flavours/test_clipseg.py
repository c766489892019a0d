"""A trained CLIPSeg as an MLflow model says what the model says, wherever it is loaded."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.clip.loading import load_clip
from models.clipseg.baselines import ClipDeconvConfig, build_clip_deconv
from models.clipseg.decoder import ClipSeg, build_clipseg, mix, normalize
from models.clipseg.visual_prompts import VisualPrompt
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.serving.flavours.clipseg import ClipSegModel, save_clipseg_model
from pipeline.table.labels import decode_confidence, decode_mask
from pipeline.toyworld.scenes import generate
from pipeline.trained.clipseg import write_clipseg_folder

SIDE = 64
COLUMNS = tuple(ClipSegModel.columns())


def _write(folder: Path, model: ClipSeg, kind: str = "clipseg") -> Path:
    write_clipseg_folder(
        folder, model, kind=kind, recipe={"triplets": {"size": SIDE}}, data={}, metrics={}, training={},
        versions={},
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def network() -> ClipSeg:
    config = ClipSegConfig(reduce_dim=16, extract_layers=(0, 1, 2), feedforward=32)
    made = build_clipseg(load_clip("toyclip", "bundled"), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in made.decoder.state_dict().items():
            if name.startswith("film") or name == "trans_conv.weight":
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[0] ** -0.5)
    return made


@pytest.fixture(scope="module")
def saved(network: ClipSeg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clipseg")
    save_clipseg_model(_write(folder / "run", network), folder / "model")
    for file in (folder / "run").iterdir():  # the saved model has to do without it
        file.unlink()
    return folder / "model"


@pytest.fixture(scope="module")
def model(saved: Path) -> mlflow.pyfunc.PyFuncModel:
    return mlflow.pyfunc.load_model(str(saved), model_config={"precision": "fp32", "paths": True})


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two scenes of different shapes, an example with a mask, and a mask of another size."""
    folder = tmp_path_factory.mktemp("pictures")
    scenes = generate(8, 3, 96).images
    mask = np.zeros((96, 96), np.uint8)
    mask[20:60, 30:90] = 1
    for name, pixels in {
        "a": scenes[0][:70, :90], "b": scenes[1], "example": scenes[2], "mask": mask, "small": mask[:50],
    }.items():  # fmt: skip
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return {path.stem: path for path in folder.iterdir()}


def _pixels(path: Path) -> torch.Tensor:
    squeezed = np.array(Image.open(path).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return normalize(torch.from_numpy(squeezed).permute(2, 0, 1)[None])


def _wanted(network: ClipSeg, path: Path, conditional: torch.Tensor) -> np.ndarray:
    """Probabilities at image size, by the network itself."""
    with torch.no_grad():
        p = network(_pixels(path), conditional[None]).sigmoid()
    size = Image.open(path).size[::-1]
    return F.interpolate(p, size, mode="bilinear", align_corners=False)[0, 0].numpy()


def _conditionals(network: ClipSeg, pictures: dict[str, Path]) -> dict[str, torch.Tensor]:
    """Of words, of the example as a whole, and of what is marked in it."""
    example = torch.from_numpy(np.array(Image.open(pictures["example"]))).permute(2, 0, 1)[None]
    mask = torch.from_numpy(np.array(Image.open(pictures["mask"])))[None, None].float()
    whole = normalize(example, SIDE)
    style = VisualPrompt(blur=3, background=0.1, context=0.1, size=SIDE)
    with torch.no_grad():
        return {
            "words": network.encode_text(["a zebra"])[0],
            "whole": network.encode_prompt_images(whole)[0],
            "marked": network.encode_prompt_images(style(whole, F.interpolate(mask, (SIDE, SIDE))[0]))[0],
        }


def test_words_examples_and_mixtures(
    network: ClipSeg, model: mlflow.pyfunc.PyFuncModel, pictures: dict[str, Path]
) -> None:
    data = pictures["b"].read_bytes()
    example = {"example": str(pictures["example"])}
    marked = example | {"example_mask": pictures["mask"].as_uri()}
    rows = [
        {"image": str(pictures["a"]), "text": "a zebra"},
        {"image": data, "text": "a zebra"},
        {"image": str(pictures["a"]), **example},
        {"image": "data:image/png;base64," + base64.b64encode(data).decode(), **marked},
        {"image": str(pictures["a"]), "text": "a zebra", **marked},
    ]
    out = model.predict(
        pd.DataFrame(rows, index=[9, 7, 5, 3, 1]), params={"threshold": 0.5, "text_weight": 0.3}
    )
    assert list(out.index) == [9, 7, 5, 3, 1] and tuple(out.columns) == COLUMNS
    assert out["error"].isna().all(), out["error"].tolist()
    assert out["height"].tolist() == [70, 96, 70, 96, 70] and out["width"].tolist() == [90, 96, 90, 96, 90]
    known = _conditionals(network, pictures)
    words, whole, marked_ones = known["words"], known["whole"], known["marked"]
    asked = [words, words, whole, marked_ones, mix(words, marked_ones, 0.3)]
    for row, place, conditional in zip(out.itertuples(), "ababa", asked, strict=True):
        p = _wanted(network, pictures[place], conditional)
        assert np.abs(decode_confidence(row.probability) - 255 * p).max() < 0.6
        mask, sure = decode_mask(row.mask), np.abs(p - 0.5) > 1e-3
        assert set(np.unique(mask)) <= {0, 255} and ((mask == 255) == (p >= 0.5))[sure].all()
        assert row.max_probability == pytest.approx(p.max(), abs=1e-3)
    assert out["probability"].nunique() == 5


def test_the_threshold_is_the_usual_one_unless_given(
    model: mlflow.pyfunc.PyFuncModel, pictures: dict[str, Path]
) -> None:
    (row,) = model.predict([{"image": str(pictures["a"]), "text": "a zebra"}]).itertuples()
    assert ((decode_mask(row.mask) == 255) == (decode_confidence(row.probability) >= 0.3 * 255)).mean() > 0.99
    for params in ({"threshold": 1.5}, {"text_weight": -1.0}):
        with pytest.raises(MaskMillError) as caught:
            model.predict([{"image": str(pictures["a"]), "text": "a zebra"}], params=params)
        assert caught.value.code == "setting_invalid" and next(iter(params)) in caught.value.message


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"text": "a"}, "not_an_image"),
        ({"image": "{a}"}, "prompt_invalid"),
        ({"image": "{a}", "text": ""}, "prompt_invalid"),
        ({"image": "{a}", "text": pd.NA, "example": float("nan")}, "prompt_invalid"),
        ({"image": pd.NA, "text": "a"}, "not_an_image"),
        ({"image": "{a}", "text": "a", "example_mask": "{small}"}, "prompt_invalid"),
        ({"image": "{a}", "text": "many words " * 40}, "prompt_invalid"),
        ({"image": "{a}", "example": "/nowhere/at/all.png"}, "not_found"),
        ({"image": "{a}", "example": b"no image"}, "not_an_image"),
        ({"image": "{a}", "example": "{a}", "example_mask": "{small}"}, "mask_invalid"),
    ],
)
def test_a_bad_row_is_a_row_with_an_error(
    model: mlflow.pyfunc.PyFuncModel, pictures: dict[str, Path], row: dict[str, Any], code: str
) -> None:
    filled = {
        name: cell.format(**pictures) if isinstance(cell, str) else cell
        for name, cell in ({"image": None} | row).items()
    }
    out = model.predict(pd.DataFrame([filled, {"image": str(pictures["a"]), "text": "a zebra"}]))
    assert out["error"][0].startswith(f"{code}: "), out["error"][0]
    assert out.loc[0, list(COLUMNS[:-1])].isna().all()
    assert out["error"].isna()[1] and decode_mask(out["mask"][1]).shape == (70, 90)


def test_what_is_in_the_folder(saved: Path) -> None:
    described = mlflow.models.Model.load(str(saved))
    assert described.signature.inputs.input_names() == ["image", "text", "example", "example_mask"]
    assert [param.name for param in described.signature.params.params] == ["threshold", "text_weight"]
    assert described.metadata["clip"] == "toyclip"
    names = {path.name for path in (saved / "artifacts" / "clipseg").iterdir()}
    assert {"clipseg.json", "decoder.safetensors", "model.safetensors"} <= names


def test_decoders_without_their_clip(
    network: ClipSeg, model: mlflow.pyfunc.PyFuncModel, pictures: dict[str, Path], tmp_path: Path
) -> None:
    """Over the toy CLIP, which is in the code, they are complete; over others they are not saved."""
    baseline = build_clip_deconv(network.clip, ClipDeconvConfig(reduce_dim=8, reduce2_dim=8, extract_layer=1))
    save_clipseg_model(_write(tmp_path / "run", baseline, "clip-deconv"), tmp_path / "model")
    (tmp_path / "run").rename(tmp_path / "gone")
    loaded = mlflow.pyfunc.load_model(
        str(tmp_path / "model"), model_config={"precision": "fp32", "paths": True}
    )
    (row,) = loaded.predict([{"image": str(pictures["a"]), "text": "a zebra"}]).itertuples()
    p = _wanted(baseline, pictures["a"], _conditionals(network, pictures)["words"])
    assert np.abs(decode_confidence(row.probability) - 255 * p).max() < 0.6
    record = json.loads((tmp_path / "gone" / "clipseg.json").read_text())
    record["clip"]["model"] = "ViT-B-32"
    (tmp_path / "gone" / "clipseg.json").write_text(json.dumps(record))
    with pytest.raises(MaskMillError) as caught:
        save_clipseg_model(tmp_path / "gone", tmp_path / "other")
    assert caught.value.code == "model_unsupported" and not (tmp_path / "other").exists()
