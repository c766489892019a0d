"""CLIPSeg as a Labeller, against a plain loop over the model and per-pixel arithmetic."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from models.clip.loading import load_clip
from models.clipseg.decoder import ClipSeg, mix, normalize
from models.clipseg.visual_prompts import STYLES, visual_prompt
from models.clipseg.weights import load_clipseg, save_decoder
from models.errors import MaskMillError
from pipeline.labelling.clipseg.labeller import Resolution, resolution_of, resolve
from pipeline.labelling.clipseg.model import ClipSegWeights, split_clip
from pipeline.labelling.clipseg.options import PREFIXES, ClipSegOptions
from pipeline.labelling.clipseg.pictures import Picture, read_picture
from pipeline.labelling.clipseg.prompting import (
    class_conditionals,
    embed_words,
    parse_style,
    shown_pixels,
    stretched,
    visual_prompt_of,
)
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld.scenes import generate

TOY = "toyclip:bundled"
OPTIONS = ClipSegOptions(clip=TOY, prefix="plain", example_size=64)


@pytest.fixture(scope="module")
def weights(clipseg_file: Path) -> Path:
    return clipseg_file


@pytest.fixture(scope="module")
def model(weights: Path) -> ClipSeg:
    return load_clipseg(weights, clip=load_clip("toyclip", "bundled"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an ontology that has examples, two of them, and a mask."""
    folder = tmp_path_factory.mktemp("examples")
    scenes, labels, _ = generate(11, 2, 96)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(folder / f"{index}.png")
    inside = labels[0] == np.bincount(labels[0].ravel()).argmax()
    Image.fromarray((inside * 200).astype(np.uint8)).save(folder / "mask.png")
    (folder / "shown.yaml").write_text(
        "background: [ground]\n"
        "classes:\n"
        "  - {name: zebra, synonyms: [a striped horse], threshold: 0.35}\n"
        "  - {name: that, examples: [{image: 0.png, mask: mask.png}, 1.png]}\n"
        "  - {name: fish, synonyms: [a scaly thing], merge: mean}\n"
    )
    return folder


def recipe(weights: Path | str, options: ClipSegOptions = OPTIONS, **fields: Any) -> LabelRecipe:
    wanted = {"scale": (64, 48), "keep_ratio": False, "resize": "antialias", "min_confidence": 0.4} | fields
    plain = LabelRecipe(name="test", model="clipseg", pretrained=str(weights), clipseg=options)
    return change_recipe(plain, wanted)


def scenes(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    return np.stack(
        [np.asarray(Image.fromarray(s).resize((width, height))) for s in generate(3, count, 96)[0]]
    )


# --- one label of many answers ------------------------------------------------------------------------------


def by_hand(p: np.ndarray, how: Resolution, thresholds: Sequence[float]) -> tuple[int, float]:
    """Label and confidence of one pixel."""
    candidates = [k for k in range(len(p)) if p[k] >= np.float32(thresholds[k])]
    weighted = [p[k] * np.float32(how.factors[k]) for k in range(len(p))]
    if candidates:
        best = max(candidates, key=lambda k: (weighted[k], -k))
        return how.class_ids[best], float(p[best])
    if how.none_is_a_class:
        return how.none_id, 1 - float(max(p))
    return how.none_id, float(p[int(np.argmax(weighted))])


@pytest.mark.parametrize(
    ("ids", "thresholds", "factors", "none_id", "left"),
    [
        ((0, 1, 2), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 255, False),
        ((0, 1, 2), (0.5, 0.7, 0.2), (1.0, 1.0, 1.0), 255, False),
        ((0, 1, 2), (0.5, 0.5, 0.5), (3.0, 1.0, 1.0), 255, False),
        ((1, 2, 5), (0.6, 0.3, 0.9), (1.0, 1.0, 1.0), 0, True),
        ((1, 2, 300), (0.6, 0.3, 0.9), (1.0, 1.0, 1.0), 0, True),
        ((1,), (0.5,), (1.0,), 0, True),
    ],
)
def test_resolution_is_that_of_every_pixel(
    ids: tuple[int, ...], thresholds: tuple[float, ...], factors: tuple[float, ...], none_id: int, left: bool
) -> None:
    how = Resolution(ids, factors, none_id, left)
    # Probabilities of few values, so that ties and values equal to a threshold occur.
    p = torch.from_numpy(
        np.random.default_rng(0).integers(0, 11, (len(ids), 23, 31)).astype(np.float32) / np.float32(10)
    )
    labels, confidence = resolve(p, (23, 31), how, thresholds)
    assert labels.dtype == torch.int32 and confidence.dtype == torch.uint8
    for y in range(23):
        for x in range(31):
            label, sure = by_hand(p[:, y, x].numpy(), how, thresholds)
            assert labels[y, x] == label
            assert abs(int(confidence[y, x]) - 255 * sure) <= 0.51
    assert not left or set(ids) | {none_id} >= set(labels.unique().tolist())


@pytest.mark.parametrize("size", [(48, 64), (7, 5), (200, 333), (1, 1), (1000, 3)])
def test_stretched_is_interpolate_cut_into_bands(size: tuple[int, int]) -> None:
    maps = torch.rand(3, 48, 64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    edges = sorted({0, size[0] // 3, size[0] // 2, size[0]})
    bands = [stretched(maps, size, a, b) for a, b in itertools.pairwise(edges)]
    torch.testing.assert_close(torch.cat(bands, 1), expected, atol=5e-6, rtol=0)


def test_large_images_are_labelled_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.rand(4, 16, 16, generator=torch.Generator().manual_seed(1))
    how, thresholds = Resolution((0, 1, 2, 3), (1.0,) * 4, 255, False), (0.5,) * 4
    whole = resolve(p, (150, 90), how, thresholds)
    monkeypatch.setattr("pipeline.labelling.clipseg.labeller.BAND_BYTES", {"cpu": 4 * 4 * 90 * 7})
    cut = resolve(p, (150, 90), how, thresholds)
    assert torch.equal(whole[0], cut[0]) and torch.equal(whole[1], cut[1])


# --- the labeller -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", ["rest", "words"])
def test_labels_are_those_of_a_plain_loop_over_prompts(
    weights: Path, model: ClipSeg, pictures: Path, background: str
) -> None:
    ontology = load_ontology(pictures / "shown.yaml")
    options = ClipSegOptions(clip=TOY, prefix="fixed", example_size=64, background=background)  # type: ignore[arg-type]
    labeller = prepare_labeller(recipe(weights, options), ontology).build(precision="fp32")
    images, sizes = scenes(3), [(40, 52), (24, 32), (30, 17)]
    predictions = labeller.label(list(images), sizes)

    crop = dataclasses.replace(STYLES["crop_blur_highlight352"], size=64)
    example = crop(
        normalize(torch.from_numpy(np.array(Image.open(pictures / "0.png"))).permute(2, 0, 1)[None], 64),
        F.interpolate(
            torch.from_numpy(np.asarray(Image.open(pictures / "mask.png")) > 0)[None, None].float(), (64, 64)
        )[0],
    )
    plain = normalize(torch.from_numpy(np.array(Image.open(pictures / "1.png"))).permute(2, 0, 1)[None], 64)
    ground, zebra, striped, that, fish, scaly = model.encode_text(
        [
            f"a photo of a {word}."
            for word in ("ground", "zebra", "a striped horse", "that", "fish", "a scaly thing")
        ]
    )
    asked = {
        0: [ground],
        1: [zebra, striped],
        2: [mix(that, model.encode_prompt_images(shown)[0], 0.5) for shown in (example, plain)],
        3: [(fish + scaly) / 2],
    }
    if background == "rest":
        del asked[0]
        how, thresholds = Resolution((1, 2, 3), (1.0,) * 3, 0, True), [0.35, 0.4, 0.4]
    else:
        how = Resolution((0, 1, 2, 3), (3.0, 1.0, 1.0, 1.0), 255, False)
        thresholds = [0.4, 0.35, 0.4, 0.4]
    seen: set[int] = set()
    for image, size, prediction in zip(images, sizes, predictions, strict=True):
        pixels = normalize(torch.from_numpy(image).permute(2, 0, 1)[None])
        answers = []
        with torch.no_grad():
            for conditionals in asked.values():
                each = [model(pixels, one[None])[:, 0].sigmoid() for one in conditionals]
                answers.append(torch.stack(each).amax(0))
            p = F.interpolate(torch.stack(answers, 1), size, mode="bilinear", align_corners=False)[0].numpy()
        assert prediction.labels.shape == prediction.confidence.shape == size
        expected = [[by_hand(p[:, y, x], how, thresholds) for x in range(size[1])] for y in range(size[0])]
        labels = np.array([[label for label, _ in row] for row in expected])
        confidence = np.array([[255 * sure for _, sure in row] for row in expected])
        same = prediction.labels == labels
        assert same.mean() > 0.998  # two probabilities may agree to the last digit
        assert np.abs(prediction.confidence[same] - confidence[same]).max() < 0.6
        seen |= set(np.unique(labels).tolist())
    assert len(seen) >= 3, "an image with one label would hide mistakes"


def test_absent_objects_are_not_made_up(weights: Path, tmp_path: Path) -> None:
    """Low probabilities stay low: no rescaling to the range of an image or to the other classes."""
    model = load_clipseg(weights, clip=load_clip("toyclip", "bundled"))
    with torch.no_grad():
        model.decoder.state_dict()["trans_conv.bias"].fill_(-30)
    save_decoder(model, tmp_path / "low.safetensors")
    for background, label, confidence in ((["ground"], 0, 255), (None, 255, 0)):
        ontology = Ontology.from_dict({"name": "n", "classes": ["zebra", "fish"], "background": background})
        prepared = prepare_labeller(recipe(tmp_path / "low.safetensors"), ontology, precision="fp32")
        labeller = prepared.build()
        prediction = labeller.label([scenes(1)[0]], [(20, 30)])[0]
        assert (prediction.labels == label).all()
        assert (prediction.confidence == confidence).all()


# --- what is asked ------------------------------------------------------------------------------------------


def test_words_and_pictures_make_the_prompts_of_a_class(model: ClipSeg, pictures: Path) -> None:
    ontology = load_ontology(pictures / "shown.yaml")
    text = model.encode_text(["that"])[0]

    def asked(**changes: Any) -> torch.Tensor:
        options = ClipSegOptions(**({"prefix": "plain", "example_size": 64} | changes))
        return class_conditionals(model, ontology, 2, options)

    shown, words = asked(text_weight=0.0), asked(text_weight=1.0)
    assert shown.shape == (2, model.clip.embed_dim)
    torch.testing.assert_close(words, text.expand(2, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(asked(text_weight=0.25), 0.25 * text + 0.75 * shown, atol=1e-5, rtol=0)
    other = asked(text_weight=0.0, visual_prompt="image_only")
    assert not torch.allclose(shown[0], other[0], atol=1e-3)
    torch.testing.assert_close(shown[1], other[1])  # no mask, nothing to do
    mean = Ontology.from_dict(
        {**ontology.to_dict(), "classes": [{**ontology.to_dict()["classes"][1], "merge": "mean"}]}
    )
    options = ClipSegOptions(text_weight=0.0, example_size=64)
    torch.testing.assert_close(class_conditionals(model, mean, 1, options), shown.mean(0, keepdim=True))


@pytest.mark.parametrize(
    ("style", "side"),
    [("crop_blur_highlight352", 64), ("crop", 64), ("crop,size=96", 96), ("blur3_highlight", 64)],
)
def test_examples_are_cut_to_the_example_size(
    model: ClipSeg, pictures: Path, monkeypatch: pytest.MonkeyPatch, style: str, side: int
) -> None:
    sides: list[int] = []
    encode = model.encode_prompt_images
    monkeypatch.setattr(
        model, "encode_prompt_images", lambda pixels: sides.append(pixels.shape[-1]) or encode(pixels)
    )
    options = ClipSegOptions(text_weight=0.0, visual_prompt=style, example_size=64)
    class_conditionals(model, load_ontology(pictures / "shown.yaml"), 2, options)
    assert sides == [side, 64]  # the second example is shown whole


@pytest.mark.parametrize("prefix", [*PREFIXES, "ontology"])
def test_prefixes_average_their_templates(model: ClipSeg, prefix: Any) -> None:
    ontology = load_ontology("toyworld")
    templates = PREFIXES.get(prefix) or ("a photo of a {}", "a photo of {}", "a {}", "{}")
    expected = torch.stack([model.encode_text([t.format("zebra")])[0] for t in templates]).mean(0)
    found = class_conditionals(model, ontology, ontology.names.index("zebra"), ClipSegOptions(prefix=prefix))
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=0)
    assert not math.isclose(float(found[0].norm()), 1, abs_tol=0.05), "embeddings are not normalised"


def test_braces_in_a_prompt_are_words(model: ClipSeg) -> None:
    torch.testing.assert_close(embed_words(model, ["a {b}"], ("{}",)), model.encode_text(["a {b}"]))


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("crop", "crop"),
        ("overlay", "overlay"),
        ("crop_blur_highlight,size=352", "crop_blur_highlight352"),
        ("blur_highlight, blur=3,background=0.1", "blur3_highlight01"),
        ("crop_blur_highlight,context=none,background=0.5,shift=-0.01", "blur3_highlight"),
    ],
)
def test_styles_by_name_and_change(text: str, same_as: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image, mask = torch.randn(1, 3, 40, 40, generator=generator), torch.zeros(1, 40, 40)
    mask[:, 10:25, 5:30] = 1
    torch.testing.assert_close(parse_style(text)(image, mask), visual_prompt(image, mask, same_as))


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("sharpen", "setting_invalid"),
        ("concat", "setting_invalid"),
        ("crop,blurr=3", "setting_invalid"),
        ("crop,blur=much", "setting_invalid"),
        ("crop,blur=-1", "setting_invalid"),
        ("crop,paint=dye", "setting_invalid"),
        ("overlay,blur=3", "setting_invalid"),
    ],
)
def test_wrong_styles(text: str, code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        parse_style(text)
    assert caught.value.code == code


def test_a_visual_prompt_brings_out_the_object() -> None:
    image = np.full((50, 80, 3), 200, np.uint8)
    mask = np.zeros((50, 80), bool)
    mask[10:20, 40:60] = True
    image[mask] = (10, 20, 30)
    shown = shown_pixels(visual_prompt_of(Picture(image, mask), parse_style("overlay"), 64))
    assert shown.shape == (64, 64, 3)
    assert (shown[16, 40] == (10, 20, 30)).all()
    assert np.abs(shown[50, 10].astype(int) - (124, 116, 104)).max() <= 1  # the mean colour
    whole = shown_pixels(visual_prompt_of(Picture(image), parse_style("overlay"), 64))
    assert (whole[50, 10] == 200).all()


def test_an_object_thinner_than_the_sampling_is_not_lost() -> None:
    image, mask = np.zeros((640, 640, 3), np.uint8), np.zeros((640, 640), bool)
    mask[:, 5] = True
    image[mask] = 255
    prompt = visual_prompt_of(Picture(image, mask), parse_style("crop,blur=0,context=0"), 64)
    assert prompt.shape[-2:] == (224, 224)
    assert float(prompt.amax()) > float(normalize(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).amax())


# --- what is refused ----------------------------------------------------------------------------------------


def refused(weights: Path, options: ClipSegOptions = OPTIONS, ontology: Any = None, **fields: Any) -> str:
    ontology = ontology or load_ontology("toyworld")
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(recipe(weights, options, **fields), ontology)
    return caught.value.code


def test_settings_without_a_meaning_are_refused(weights: Path) -> None:
    beside = Ontology.from_dict({"name": "n", "classes": ["cat"], "background": ["wall"]})
    assert refused(weights, head="value") == "setting_invalid"
    assert refused(weights, window=64, window_stride=32) == "setting_invalid"
    assert refused(weights, temperature=1.0) == "setting_invalid"
    assert refused(weights, ontology=beside, min_confidence=0.0) == "setting_invalid"
    assert refused(weights, ClipSegOptions(clip=TOY, visual_prompt="sharpen")) == "setting_invalid"
    asked = ClipSegOptions(clip=TOY, background="words")
    assert resolution_of(beside, asked, (0.0, 0.0)).factors == (3.0, 1.0)


def test_weights_are_checked_before_anything_is_embedded(weights: Path, model: ClipSeg) -> None:
    def other(fingerprint: str) -> None:
        assert fingerprint == model.fingerprint
        raise MaskMillError("output_differs", "", "")

    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(recipe(weights), load_ontology("toyworld"), check_weights=other)
    assert caught.value.code == "output_differs"
    assert refused(weights.with_name("none.pth")) == "weights_missing"
    assert refused(weights, ClipSegOptions(clip="toyclip:random:3")) == "weights_do_not_fit"


def test_labellers_that_read_names_only_refuse_examples(pictures: Path) -> None:
    with pytest.raises(MaskMillError, match="examples for that") as caught:
        prepare_labeller(RECIPES["toy"], load_ontology(pictures / "shown.yaml"))
    assert caught.value.code == "model_unsupported"


def test_a_recipe_names_clipseg_by_its_model(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError) as caught:
        prepare_labeller(recipe(tmp_path / "none.safetensors"), load_ontology("toyworld"))
    assert (caught.value.code, str(tmp_path) in caught.value.message) == ("weights_missing", True)


def test_a_changed_example_is_found(model: ClipSeg, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes((pictures / "0.png").read_bytes())
    (tmp_path / "own.yaml").write_text("classes: [{name: that, examples: [0.png]}]")
    ontology = load_ontology(tmp_path / "own.yaml")
    class_conditionals(model, ontology, 0, OPTIONS)
    (tmp_path / "0.png").write_bytes((pictures / "1.png").read_bytes())
    with pytest.raises(MaskMillError) as caught:
        class_conditionals(model, ontology, 0, OPTIONS)
    assert caught.value.code == "image_invalid"


@pytest.mark.parametrize(
    ("mask", "code"),
    [
        (Image.new("L", (96, 95), 255), "mask_invalid"),
        (Image.new("L", (96, 96), 0), "mask_invalid"),
        (None, "image_invalid"),
    ],
)
def test_wrong_masks(pictures: Path, tmp_path: Path, mask: Image.Image | None, code: str) -> None:
    path = tmp_path / "mask.png"
    if mask is not None:
        mask.save(path)
    with pytest.raises(MaskMillError) as caught:
        read_picture(str(pictures / "0.png"), str(path))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("text", "name", "pretrained"),
    [
        ("ViT-B-16-quickgelu:openai", "ViT-B-16-quickgelu", "openai"),
        ("ViT-B-16:random:7", "ViT-B-16", "random:7"),
        ("ViT-B-16:/data/my:clip.pt", "ViT-B-16", "/data/my:clip.pt"),
        ("hf-hub:org/repo", "hf-hub:org/repo", None),
    ],
)
def test_how_a_clip_is_written(text: str, name: str, pretrained: str | None) -> None:
    assert split_clip(text) == (name, pretrained)


def test_seeded_decoders_are_told_apart() -> None:
    device = torch.device("cpu")
    prints = [
        ClipSegWeights(f"random:{seed}", TOY, (0, 1, 2)).load(device=device).fingerprint for seed in (0, 0, 1)
    ]
    assert prints[0] == prints[1] != prints[2]
