"""``maskmill segment``: files, figures and pictures against the model, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console

from jobs.segment import Segment
from models.clip.loading import load_clip
from models.clipseg.decoder import ClipSeg, build_clipseg, mix, normalize
from models.clipseg.visual_prompts import STYLES
from models.clipseg.weights import save_decoder
from models.errors import MaskMillError
from models.settings import ClipSegConfig
from pipeline.labelling.clipseg.options import ClipSegOptions
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import LabelRecipe
from pipeline.ontology.ontology import Ontology
from pipeline.toyworld.scenes import generate

TOY = "toyclip:bundled"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model() -> ClipSeg:
    made = build_clipseg(
        load_clip("toyclip", "bundled"),
        ClipSegConfig(reduce_dim=16, extract_layers=(0, 1, 2), feedforward=32),
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in made.decoder.state_dict().items():
            if name.startswith("film") or name == "trans_conv.weight":
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * tensor.shape[0] ** -0.5)
    return made


@pytest.fixture(scope="module")
def data(model: ClipSeg, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights, three photographs (two of one name), a damaged one, an example and its mask."""
    folder = tmp_path_factory.mktemp("segment")
    save_decoder(model, folder / "toy.safetensors")
    for place in ("photos", "photos/more"):
        (folder / place).mkdir()
    first, second, third, example = generate(8, 4, 96)[0]
    Image.fromarray(first).resize((90, 70)).save(folder / "photos" / "a scene.png")
    Image.fromarray(second).resize((61, 83)).save(folder / "photos" / "tall.png")
    Image.fromarray(third).save(folder / "photos" / "more" / "tall.png")
    (folder / "photos" / "torn.png").write_bytes((folder / "photos" / "tall.png").read_bytes()[:200])
    Image.fromarray(example).save(folder / "example.png")
    mask = np.zeros((96, 96), np.uint8)
    mask[20:60, 30:90] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    return folder


def job(data: Path, output: Path, **fields: Any) -> Segment:
    wanted: dict[str, Any] = {
        "images": (str(data / "photos" / "a scene.png"),),
        "weights": str(data / "toy.safetensors"),
        "clip": TOY,
        "size": 64,
        "example_size": 64,
        "precision": "fp32",
    }
    return Segment(output=str(output), **(wanted | fields))


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_files_hold_what_the_model_says(model: ClipSeg, data: Path, tmp_path: Path) -> None:
    thresholds = (0.5, 0.45, 0.4)
    asked = job(
        data,
        tmp_path / "out",
        images=(str(data / "photos"), str(data / "photos" / "tall.png")),
        prompts=("a zebra", "fish/and: chips?"),
        prompt_images=(str(data / "example.png"),),
        prompt_masks=(str(data / "mask.png"),),
        thresholds=thresholds,
    )
    assert asked.run(QUIET) == 1, "an image is damaged"
    record = results(tmp_path / "out")
    assert record["counts"] == {"ok": 3, "truncated": 1}
    assert [Path(entry["uri"]).name for entry in record["images"]] == [
        "a scene.png", "tall.png", "tall.png", "torn.png"
    ]  # fmt: skip
    assert len({entry.get("overview") for entry in record["images"]}) == 4  # tall and tall-2 apart
    assert [one["title"] for one in record["prompts"]] == ["a zebra", "fish/and: chips?", "example"]
    assert record["model"]["fingerprint"] == model.fingerprint

    example = normalize(torch.from_numpy(pixels(data / "example.png").copy()).permute(2, 0, 1)[None], 64)
    mask = F.interpolate(torch.from_numpy(pixels(data / "mask.png").copy())[None, None].float(), (64, 64))[0]
    shown = replace(STYLES["crop_blur_highlight352"], size=64)(example, mask)
    conditionals = [*model.encode_text(["a zebra", "fish/and: chips?"]), model.encode_prompt_images(shown)[0]]
    seen = set()
    for entry in record["images"][:3]:
        image = Image.open(entry["uri"])
        size = (image.height, image.width)
        assert (entry["height"], entry["width"]) == size
        small = np.array(image.resize((64, 64), Image.Resampling.BILINEAR))
        for number, (one, threshold) in enumerate(zip(conditionals, thresholds, strict=True)):
            with torch.no_grad():
                logits = model(normalize(torch.from_numpy(small).permute(2, 0, 1)[None]), one[None])
            p = F.interpolate(logits.sigmoid(), size, mode="bilinear", align_corners=False)[0, 0].numpy()
            found = entry["prompts"][number]
            files = {kind: tmp_path / "out" / name for kind, name in found["files"].items()}
            heat, inside = pixels(files["heat"]), pixels(files["mask"])
            assert Image.open(files["heat"]).mode == "P", "colours for people, numbers for programs"
            assert np.abs(heat - 255 * p).max() < 0.51
            sure = np.abs(p - threshold) > 1e-5
            assert set(np.unique(inside)) <= {0, 255}
            assert ((inside == 255) == (p >= threshold))[sure].all()
            assert found["area"] == int((inside == 255).sum()) == round(found["share"] * p.size)
            assert found["max_probability"] == pytest.approx(p.max(), abs=1e-4)
            if found["area"]:
                x, y, width, height = found["bbox"]
                ys, xs = np.nonzero(inside)
                assert (x, y, x + width - 1, y + height - 1) == (xs.min(), ys.min(), xs.max(), ys.max())
            drawn = pixels(files["overlay"])
            assert drawn.shape == (*size, 3)
            if (inside == 0).any():
                assert (drawn == np.asarray(image)).all(2)[inside == 0].mean() < 0.2, "the rest is dim"
            seen.add(0 < found["share"] < 1)
        assert Image.open(tmp_path / "out" / entry["overview"]).width > 4 * 170
    assert True in seen, "masks that are empty or full everywhere would hide mistakes"


def test_text_and_picture_are_mixed(model: ClipSeg, data: Path, tmp_path: Path) -> None:
    def highest(**fields: Any) -> float:
        where = tmp_path / str(len(list(tmp_path.iterdir())))
        assert job(data, where, **fields).run(QUIET) == 0
        (one,) = results(where)["images"][0]["prompts"]
        return float(one["mean_probability"])

    text, picture = ("a zebra",), (str(data / "example.png"),)
    mixed = highest(prompts=text, prompt_images=picture, text_weight=0.3)
    assert highest(prompts=text, prompt_images=picture, text_weight=1.0) == highest(prompts=text)
    assert highest(prompts=text, prompt_images=picture, text_weight=0.0) == highest(prompt_images=picture)

    shown = normalize(torch.from_numpy(pixels(data / "example.png").copy()).permute(2, 0, 1)[None], 64)
    one = mix(model.encode_text(text), model.encode_prompt_images(shown), 0.3)
    image = Image.open(data / "photos" / "a scene.png")
    small = torch.from_numpy(np.array(image.resize((64, 64), Image.Resampling.BILINEAR)))
    with torch.no_grad():
        p = model(normalize(small.permute(2, 0, 1)[None]), one).sigmoid()
    p = F.interpolate(p, (70, 90), mode="bilinear", align_corners=False)
    assert mixed == pytest.approx(float(p.mean()), abs=1e-5)


def test_the_same_as_the_labeller(data: Path, tmp_path: Path) -> None:
    """One class with a threshold is the mask of its prompt."""
    job(data, tmp_path / "out", prompts=("zebra",), prefix="fixed", thresholds=(0.5,)).run(QUIET)
    entry = results(tmp_path / "out")["images"][0]
    inside = pixels(tmp_path / "out" / entry["prompts"][0]["files"]["mask"]) == 255
    recipe = LabelRecipe(
        name="r",
        model="clipseg",
        pretrained=str(data / "toy.safetensors"),
        min_confidence=0.5,
        clipseg=ClipSegOptions(clip=TOY),
    )
    ontology = Ontology.from_dict({"name": "n", "classes": ["zebra"], "background": ["none"]})
    labeller = prepare_labeller(recipe, ontology, precision="fp32").build()
    small = np.array(Image.open(entry["uri"]).resize((64, 64), Image.Resampling.BILINEAR))
    (prediction,) = labeller.label([small], [(70, 90)])
    assert 0 < inside.mean() < 1
    assert (prediction.labels == inside).all()


@pytest.mark.parametrize(("size", "network"), [(64, [64, 82]), (33, [33, 42])])
def test_images_may_keep_their_shape(data: Path, tmp_path: Path, size: int, network: list[int]) -> None:
    job(data, tmp_path / "out", prompts=("fish",), keep_ratio=True, size=size).run(QUIET)
    entry = results(tmp_path / "out")["images"][0]
    assert entry["network_size"] == network
    assert pixels(tmp_path / "out" / entry["prompts"][0]["files"]["mask"]).shape == (70, 90)


def test_nothing_is_overwritten_unasked(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job(data, out, prompts=("fish",)).run(QUIET)
    (out / "a-scene" / "mine.txt").write_text("kept")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for folder, code in (
        (out, "output_exists"),
        (data, "output_not_ours"),
        (data / "mask.png", "output_not_ours"),
    ):
        with pytest.raises(MaskMillError) as caught:
            job(data, folder, prompts=("zebra",), overwrite=folder == data).run(QUIET)
        assert caught.value.code == code
    with pytest.raises(MaskMillError):  # weights that are not there cost nothing that was
        job(data, out, prompts=("zebra",), weights=str(data / "no.pth"), overwrite=True).run(QUIET)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    job(data, out, prompts=("zebra",), overwrite=True).run(QUIET)
    names = sorted(path.name for path in out.rglob("*") if path.is_file())
    assert names == [
        "01-zebra-heat.png", "01-zebra-mask.png", "01-zebra-overlay.png", "mine.txt", "overview.png",
        "results.json",
    ]  # fmt: skip


def test_a_record_that_names_files_elsewhere_deletes_none(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    job(data, out, prompts=("fish",)).run(QUIET)
    (tmp_path / "precious.txt").write_text("kept")
    record = results(out)
    record["images"][0]["overview"] = "../precious.txt"
    (out / "results.json").write_text(json.dumps(record))
    job(data, out, prompts=("fish",), overwrite=True).run(QUIET)
    assert (tmp_path / "precious.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({}, "wrong_use", "Nothing is asked"),
        ({"prompts": (" ",)}, "wrong_use", "empty"),
        ({"images": (), "prompts": ("a",)}, "wrong_use", "No image"),
        ({"prompts": ("a", "b"), "thresholds": (0.1, 0.2, 0.3)}, "wrong_use", "3 thresholds and 2 prompts"),
        ({"prompts": ("a",), "thresholds": (30.0,)}, "wrong_use", "between 0 and 1"),
        ({"prompts": ("a",), "prompt_masks": ("m.png",)}, "wrong_use", "1 --prompt-mask and 0"),
        ({"prompts": ("a",), "text_weight": 0.5}, "wrong_use", "there are 1 and 0"),
        ({"prompts": ("a",), "size": 0}, "wrong_use", "below 1"),
        ({"prompts": ("a",), "visual_prompt": "sharpen"}, "setting_invalid", "sharpen"),
        ({"prompts": ("a",), "images": ("nowhere.jpg",)}, "input_missing", "nowhere.jpg"),
        ({"prompt_images": ("nowhere.jpg",)}, "image_invalid", "nowhere.jpg"),
        ({"prompts": ("a",), "weights": "nowhere.pth"}, "weights_missing", "nowhere.pth"),
        ({"prompts": ("word " * 80,)}, "prompt_invalid", "word"),
    ],
)
def test_wrong_use(data: Path, tmp_path: Path, fields: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(MaskMillError, match=words) as caught:
        job(data, tmp_path / "out", **fields).run(QUIET)
    assert caught.value.code == code
    assert not (tmp_path / "out").exists()
