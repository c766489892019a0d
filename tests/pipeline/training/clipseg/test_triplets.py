"""Triplets: what is drawn, how often, and how it looks, against counts and independent formulas."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest

from models.clipseg.visual_prompts import STYLES
from models.errors import MaskMillError
from pipeline.labelling.clipseg.options import PREFIXES
from pipeline.training.clipseg.crops import bilinear, nearest, object_window, support_image
from pipeline.training.clipseg.sources.base import IGNORED, OBJECT, OTHER, Example, Pairs, TripletSource
from pipeline.training.clipseg.triplets import (
    TripletSamples,
    TripletSettings,
    crop_by_settings,
    decode_phrase,
    encode_phrase,
)
from pipeline.training.samples.augment import MEAN_COLOUR

# Phrases of each image. "lamp" occurs once; "red cup" implies a cup.
TRUE: tuple[tuple[str, ...], ...] = (
    ("red cup", "plate"), ("cup", "plate", "fork"), ("fork",), ("red cup", "spoon"), ("cup", "lamp"),
    ("spoon", "plate"),
)  # fmt: skip
TEXTS = sorted(set(itertools.chain(*TRUE)))
# Not among the phrases of image 2, but possibly true of it.
UNSURE = (2, "spoon")
HEIGHT, WIDTH = 12, 20


def colour(image: int) -> tuple[int, int, int]:
    return (40 * image + 20, 255 - 40 * image, 128)


class Boxes(TripletSource):
    """Images of one colour each; the object of pair i spans columns i % 8 + 2 to the last but one."""

    def read(self, pair: int) -> Example:
        image = np.full((HEIGHT, WIDTH, 3), colour(int(self.pairs.image[pair])), np.uint8)
        mask = np.full((HEIGHT, WIDTH), OTHER, np.uint8)
        mask[2:9, pair % 8 + 2 : -1] = OBJECT
        mask[0] = IGNORED
        weight = np.tile(np.linspace(0.25, 1, WIDTH, dtype=np.float32), (HEIGHT, 1))
        return Example(image, mask, weight)


def source(true: tuple[tuple[str, ...], ...] = TRUE, **changes: Any) -> Boxes:
    image = [number for number, held in enumerate(true) for _ in held]
    texts = sorted(set(itertools.chain(*true)))
    phrase = [texts.index(text) for held in true for text in held]
    unsure = [(UNSURE[0], texts.index(UNSURE[1]))] if UNSURE[1] in texts else []
    pairs = Pairs.of([(text,) for text in texts], image, phrase, unsure=unsure)
    return Boxes("boxes", "0", replace(pairs, **changes))


SMALL = TripletSettings(size=10, support_size=8, prefix="plain", visual_prompt="overlay")
TEXT = SMALL.replace(with_visual=False)


def drawn(samples: TripletSamples, index: int, count: int) -> list[dict[str, Any]]:
    return [samples.load(index, np.random.default_rng((7, index, turn))) for turn in range(count)]


def may_hold(image: int, text: str) -> bool:
    """``Pairs.may_hold`` by its definition."""
    words = set(text.split())
    return (image, text) == UNSURE or any(words <= set(held.split()) for held in TRUE[image])


# --- negatives ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["absent", "other"])
@pytest.mark.parametrize("q_neg", [0.0, 0.2, 0.5, 1.0])
def test_share_of_negatives(q_neg: float, rule: str) -> None:
    samples = TripletSamples(source(), TEXT.replace(q_neg=q_neg, negative_rule=rule))
    count = 0
    for index, turns in itertools.product(range(len(samples.source.pairs)), [60]):
        own = samples.source.pairs.phrases[int(samples.source.pairs.phrase[index])][0]
        for found in drawn(samples, index, turns):
            negative = bool(found["negative"])
            count += negative
            assert (OBJECT in found["mask"]) != negative
            assert (decode_phrase(found["phrase"]) != own) == negative
            assert (found["mask"][0] == IGNORED).all() and not found["weight"][0].any()
    total = 60 * len(samples.source.pairs)
    assert abs(count - q_neg * total) <= 4 * np.sqrt(total * q_neg * (1 - q_neg))


@pytest.mark.parametrize("index", [0, 2, 5, 6])
def test_a_negative_is_never_true_and_all_others_are_equally_likely(index: int) -> None:
    pairs = source().pairs
    image, own = int(pairs.image[index]), pairs.phrases[int(pairs.phrase[index])][0]
    for rule, allowed in (
        ("absent", {text for text in TEXTS if not may_hold(image, text)}),
        ("other", set(TEXTS) - {own}),
    ):
        samples = TripletSamples(source(), TEXT.replace(q_neg=1.0, negative_rule=rule))
        counts = Counter(decode_phrase(found["phrase"]) for found in drawn(samples, index, 400))
        assert set(counts) == allowed
        assert chisquare([counts[text] for text in allowed]).pvalue > 1e-4


def test_without_an_allowed_phrase_there_are_no_negatives() -> None:
    samples = TripletSamples(source((("cup", "fork"), ("cup", "fork"))), TEXT.replace(q_neg=1.0))
    for found in drawn(samples, 0, 20):
        assert found["negative"] == 0 and OBJECT in found["mask"]
    # A phrase that random draws are unlikely to hit is found nevertheless.
    many = tuple(f"kind {number}" for number in range(600))
    samples = TripletSamples(source((many, ("rare",))), TEXT.replace(q_neg=1.0))
    assert {decode_phrase(found["phrase"]) for found in drawn(samples, 0, 2)} == {"rare"}


def test_the_reference_s_negatives_of_coco_contradict_the_phrase() -> None:
    samples = TripletSamples(source(), SMALL.replace(q_neg=1.0, negative_rule="support"))
    plain = TripletSamples(source(), SMALL.replace(q_neg=0.0))
    index = 1  # a plate, shown by two other images
    for found, usual in zip(drawn(samples, index, 20), drawn(plain, index, 20), strict=True):
        assert decode_phrase(found["phrase"]) == "plate" and found["negative"] == 0
        assert OBJECT in found["mask"]
        # Nothing is marked in the support, so "overlay" leaves only the mean colour.
        if found["text_weight"] < 1:
            assert (found["support"] == np.array(MEAN_COLOUR)[:, None, None]).all()
        assert (usual["support"] != np.array(MEAN_COLOUR)[:, None, None]).any()


# --- supports -----------------------------------------------------------------------------------------------


def shown_image(support: np.ndarray) -> int | None:
    """Which image a support of style ``overlay`` shows: its one colour that is not the mean."""
    pixels = {tuple(pixel) for pixel in support.reshape(3, -1).T.tolist()} - {MEAN_COLOUR}
    return None if not pixels else min(range(len(TRUE)), key=lambda i: abs(colour(i)[0] - min(pixels)[0]))


@pytest.mark.parametrize(
    ("rule", "index", "images"),
    [("other", 1, {1, 5}), ("any", 1, {0, 1, 5}), ("other", 5, {1}), ("any", 5, {1, 2})],
)
def test_supports_show_the_phrase_in_any_other_image(rule: str, index: int, images: set[int]) -> None:
    samples = TripletSamples(source(), SMALL.replace(q_neg=0.0, support=rule))
    counts = Counter(shown_image(found["support"]) for found in drawn(samples, index, 150))
    assert set(counts) == images
    assert len(images) == 1 or chisquare(list(counts.values())).pvalue > 1e-4


def test_supports_of_negatives_show_the_new_phrase() -> None:
    samples = TripletSamples(source(), SMALL.replace(q_neg=1.0))
    for found in drawn(samples, 0, 60):
        text, image = decode_phrase(found["phrase"]), shown_image(found["support"])
        if text == "lamp":  # occurs once: a support must not give negatives away
            assert image is None and found["text_weight"] == 1
        else:
            assert image is not None and text in TRUE[image] and found["text_weight"] < 1


def test_supports_come_from_the_query_s_block_where_it_has_any() -> None:
    blocks = np.array([0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1])
    plates = [1, 3, 11]
    samples = TripletSamples(source(block=blocks), SMALL.replace(q_neg=0.0))
    assert {shown_image(found["support"]) for found in drawn(samples, plates[0], 40)} == {5}
    # A pair alone in its block gets its support from other blocks, not from itself.
    for rule in ("other", "any"):
        samples = TripletSamples(source(block=blocks), SMALL.replace(q_neg=0.0, support=rule))
        found = {shown_image(found["support"]) for found in drawn(samples, plates[1], 40)}
        assert {0, 5} <= found <= {0, 1, 5}


def test_a_phrase_that_occurs_once_has_no_support() -> None:
    samples = TripletSamples(source(), SMALL.replace(q_neg=0.0))
    lamp = [
        index
        for index in range(12)
        if "lamp" in samples.source.pairs.phrases[samples.source.pairs.phrase[index]]
    ]
    assert len(lamp) == 1
    for found in drawn(samples, lamp[0], 10):
        assert found["text_weight"] == 1
        assert (found["support"] == np.array(MEAN_COLOUR)[:, None, None]).all()
    alone = TripletSamples(source(), SMALL.replace(only_visual=True))
    assert set(range(12)) - set(alone.order(0, 0).tolist()) == set(lamp)
    assert alone.num_samples == 11 == alone.record()["triplets"]
    assert all(decode_phrase(found["phrase"]) != "lamp" for found in drawn(alone, 0, 60))
    with pytest.raises(MaskMillError, match="occurs twice") as caught:
        TripletSamples(source((("cup",), ("fork",))), SMALL.replace(only_visual=True))
    assert caught.value.code == "too_few_images"


@pytest.mark.parametrize(
    "style", ["blur3_highlight01", "crop_blur_highlight352", "crop,context=0.5", "highlight2"]
)
def test_support_is_the_visual_prompt(style: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    inside = np.zeros((40, 40), bool)
    inside[10:30, 15:22] = True
    found = support_image(image, inside, style, np.random.default_rng(1))
    assert found.shape == (3, 40, 40) and found.dtype == np.uint8
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (image.transpose(2, 0, 1) / 255 - mean) / std
    if style == "highlight2":
        expected = (x / 2 + 0.1) * inside + 0.3 * x / 2
    else:
        made = {
            "blur3_highlight01": STYLES["blur3_highlight01"],
            "crop_blur_highlight352": replace(STYLES["crop_blur_highlight352"], size=40),
            "crop,context=0.5": replace(STYLES["crop"], context=0.5, size=40),
        }[style]
        expected = made(torch.from_numpy(x)[None].float(), torch.from_numpy(inside)[None])[0].numpy()
    expected = np.clip(expected * std + mean, 0, 1) * 255
    assert np.abs(found - expected).max() <= 0.51


def test_a_random_style_draws_from_the_sample_s_generator() -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    inside = np.zeros((24, 24), bool)
    made = [
        support_image(image, inside, "blur_highlight_random", np.random.default_rng(n)) for n in (1, 1, 2)
    ]
    assert np.array_equal(made[0], made[1]) and not np.array_equal(made[0], made[2])


# --- crops --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (20, 21), (16, 16), (1, 7)])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 1.0])
def test_windows_follow_the_paper_s_rule(shape: tuple[int, int], share: float) -> None:
    """Compare with the rule applied draw by draw."""
    maker = np.random.default_rng(3)
    side = min(shape)
    for seed in range(25):
        inside = maker.random(shape) < maker.choice([0.02, 0.2, 0.7])
        inside[:, : shape[1] // 2] &= maker.random() < 0.5
        found = object_window(inside, np.random.default_rng(seed), tries=6, share=share)
        expected, most = None, -1
        for start in np.random.default_rng(seed).integers(max(shape) - side + 1, size=6).tolist():
            box = (0, start, side, start + side) if shape[1] > shape[0] else (start, 0, start + side, side)
            pixels = int(inside[box[0] : box[2], box[1] : box[3]].sum())
            if pixels > share * shape[0] * shape[1]:
                expected = box
                break
            if pixels > most:
                expected, most = box, pixels
        assert found == expected


def test_crops_hold_the_object_of_a_long_image() -> None:
    inside = np.zeros((20, 400), bool)
    inside[:, 300:330] = True
    share = 0.04  # of the image: 16 of a crop's 20 columns; 19 of 381 positions have them
    held = []
    for seed in range(300):
        _, left, _, right = object_window(inside, np.random.default_rng(seed), tries=50, share=share)
        held.append(inside[:, left:right].sum() / inside.size)
    # 50 draws miss all 49 positions that touch the object with probability 0.1 %, and all 19 with 7.7 %.
    assert np.mean(np.array(held) > 0) > 0.98
    assert 0.85 < np.mean(np.array(held) > share) < 0.98


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("resize", ["corners", "antialias"])
def test_image_mask_and_weight_share_their_geometry(crop: bool, resize: str) -> None:
    side = 16
    setting = TripletSettings(size=side, crop=crop, resize=resize, flip=0.5)
    ramp = np.tile(np.arange(40, dtype=np.uint8) * 6, (16, 1))
    mask = np.where(ramp > 120, OBJECT, OTHER).astype(np.uint8)
    mask[:4] = IGNORED
    flipped = 0
    for seed in range(30):
        example = Example(np.repeat(ramp[:, :, None], 3, 2), mask, ramp / np.float32(255))
        image, found, weight = crop_by_settings(example, side, setting, np.random.default_rng(seed))
        assert image.shape == (side, side, 3) and found.shape == (side, side) == weight.shape
        assert (found[:4] == IGNORED).all() and not weight[:4].any()
        assert np.abs(weight[4:] * 255 - image[4:, :, 0]).max() <= 6 * (1 if crop else 40 / side)
        assert ((image[4:, :, 0] > 120) == (found[4:] == OBJECT)).mean() > 0.9
        flipped += int(image[8, 0, 0] > image[8, -1, 0])
    assert 5 <= flipped <= 25


@pytest.mark.parametrize(
    ("height", "width", "side"), [(7, 11, 5), (5, 5, 23), (31, 17, 17), (1, 3, 4), (6, 6, 1)]
)
def test_resizing_is_pytorch_s(height: int, width: int, side: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    expected = F.interpolate(x, (side, side), mode="bilinear", align_corners=True)[0].permute(1, 2, 0).numpy()
    assert np.abs(bilinear(image, side) - expected).max() <= 0.51
    expected = F.interpolate(x, (side, side), mode="nearest")[0, 0].numpy()
    assert np.array_equal(nearest(image[:, :, 0], side), expected)


# --- text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bounds", [(0.0, 0.5), (0.0, 1.0), (0.3, 0.4), (0.7, 0.7)])
def test_text_weight_is_uniform(bounds: tuple[float, float]) -> None:
    samples = TripletSamples(source(), SMALL.replace(size=2, support_size=2, text_weight=bounds))
    found = np.array([sample["text_weight"] for sample in drawn(samples, 1, 300)])
    found = found[found < 1]  # "lamp" as a negative has no support
    assert len(found) > 250
    if bounds[0] == bounds[1]:
        np.testing.assert_allclose(found, bounds[0], rtol=1e-6)
    else:
        assert kstest(found, "uniform", (bounds[0], bounds[1] - bounds[0])).pvalue > 1e-3
    assert {float(sample["text_weight"]) for sample in drawn(TripletSamples(source(), TEXT), 1, 5)} == {1.0}
    alone = TripletSamples(source(), SMALL.replace(only_visual=True, text_weight=bounds))
    assert {float(sample["text_weight"]) for sample in drawn(alone, 1, 5)} == {0.0}


@pytest.mark.parametrize("prefix", list(PREFIXES))
def test_templates_and_wordings_are_drawn_evenly(prefix: Any) -> None:
    pairs = Pairs.of([("cup", "mug")], [0, 1], [0, 0])
    samples = TripletSamples(Boxes("boxes", "0", pairs), TEXT.replace(size=1, prefix=prefix, q_neg=0.0))
    counts = Counter(decode_phrase(found["phrase"]) for found in drawn(samples, 0, 400))
    expected = {template.replace("{}", word) for template in PREFIXES[prefix] for word in ("cup", "mug")}
    assert set(counts) == expected
    assert chisquare(list(counts.values())).pvalue > 1e-4


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=400))
def test_phrases_are_truncated_between_characters(text: str) -> None:
    row = encode_phrase(text)
    assert row.shape == (256,) and row.dtype == np.uint8
    back = decode_phrase(row)
    assert text.startswith(back)
    rest = text[len(back) :]
    assert not rest or len((back + rest[0]).encode()) > 256


# --- the rest -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"with_visual": False}, {"only_visual": True}, {"crop": False, "flip": 0.5}]
)
def test_the_same_generator_gives_the_same_bytes(changes: dict[str, Any]) -> None:
    samples = TripletSamples(source(), SMALL.replace(**changes))
    copy = pickle.loads(pickle.dumps(samples))
    blank = samples.blank()
    different = 0
    for index in samples.order(0, 0).tolist():
        one, other = (made.load(index, np.random.default_rng(index)) for made in (samples, copy))
        third = samples.load(index, np.random.default_rng(index + 100))
        assert list(one) == list(other) == list(blank)
        for name, value in one.items():
            assert value.tobytes() == other[name].tobytes()
            assert (value.shape, value.dtype) == (blank[name].shape, blank[name].dtype)
            assert value.flags.c_contiguous
        different += any(one[name].tobytes() != third[name].tobytes() for name in one)
    assert different > 0


def test_a_blank_has_no_weight() -> None:
    blank = TripletSamples(source(), SMALL).blank()
    assert not blank["weight"].any() and (blank["mask"] == IGNORED).all()
    assert blank["text_weight"] == 1 and blank["negative"] == 0 and decode_phrase(blank["phrase"]) == ""


@pytest.mark.parametrize("grouped", [False, True])
def test_order(grouped: bool) -> None:
    samples = TripletSamples(source(), SMALL.replace(grouped=grouped))
    epochs = [samples.order(epoch, 5).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(12)) for order in epochs)
    assert samples.order(1, 5).tolist() == epochs[1] != samples.order(1, 6).tolist()
    images = samples.source.pairs.image[epochs[0]].tolist()
    runs = len(list(itertools.groupby(images)))
    if grouped:
        assert epochs[0] == epochs[1] == epochs[2] and runs == len(TRUE)
    else:
        assert epochs[0] != epochs[1] and runs > len(TRUE)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 0}, "size"),
        ({"q_neg": 1.2}, "q_neg"),
        ({"q_neg": float("nan")}, "q_neg"),
        ({"crop_share": -0.1}, "crop_share"),
        ({"resize": "best"}, "antialias"),
        ({"negative_rule": "none"}, "absent"),
        ({"prefix": "long"}, "shuffle"),
        ({"text_weight": (0.6, 0.5)}, "text_weight"),
        ({"text_weight": (0.0, 1.5)}, "text_weight"),
        ({"only_visual": True, "with_visual": False}, "with_visual"),
        ({"negative_rule": "support", "with_visual": False}, "with_visual"),
    ],
)
def test_wrong_settings(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(MaskMillError, match=says) as caught:
        TripletSettings(**changes)
    assert caught.value.code == "setting_invalid"


@pytest.mark.parametrize(
    ("style", "code"), [("sparkle", "setting_invalid"), ("blur_highlight,glow=1", "setting_invalid")]
)
def test_wrong_styles_are_refused_before_training(style: str, code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        TripletSamples(source(), SMALL.replace(visual_prompt=style))
    assert caught.value.code == code


def test_pairs_drop_phrases_without_an_image() -> None:
    pairs = Pairs.of([("a",), ("b",), ("c",)], [0, 1, 1], [2, 0, 2], unsure=[(0, 0), (0, 1)])
    assert pairs.phrases == (("a",), ("c",)) and pairs.phrase.tolist() == [1, 0, 1]
    assert pairs.unsure.tolist() == [[0, 0]]
    assert [pairs.members(phrase).tolist() for phrase in (0, 1)] == [[1], [0, 2]]
    with pytest.raises(MaskMillError) as caught:
        Pairs.of([("a",)], [], [])
    assert caught.value.code == "too_few_images"
