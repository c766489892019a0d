"""Augmentation against independent formulas, and invariants for any draw."""

from __future__ import annotations

import colorsys
import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.training.loop.protocols import GUESS, IGNORED
from pipeline.training.samples.augment import (
    MEAN_COLOUR,
    AugmentSettings,
    augment,
    choose_crop,
    is_varied,
    pad,
    photometric_distortion,
    random_resize,
)

FILL = {"labels": IGNORED, "teacher": IGNORED, "confidence": 0}


def example(seed: int, height: int, width: int) -> tuple[npt.NDArray[np.uint8], dict[str, npt.NDArray[Any]]]:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), np.uint8)
    maps = {
        "labels": rng.choice([GUESS, IGNORED, 0, 3, 7], (height, width)).astype(np.int32),
        "teacher": rng.choice([IGNORED, 1, 2], (height, width)).astype(np.int32),
        "confidence": rng.integers(10, 20, (height, width), np.uint8),
    }
    return image, maps


def run(seed: int, image: Any, maps: Any, config: AugmentSettings, judged: tuple[str, ...] = ()) -> Any:
    rng = np.random.default_rng(seed)
    return augment(image, maps, fill=FILL, settings=config, rng=rng, categories=judged)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 90), st.integers(1, 90), st.integers(1, 60), st.integers(1, 60))
def test_shapes_types_and_values(seed: int, height: int, width: int, tall: int, wide: int) -> None:
    image, maps = example(seed, height, width)
    before = image.copy()
    config = AugmentSettings(scale=(80, 40), crop=(tall, wide))
    crop, cut = run(seed, image, maps, config, ("labels", "teacher"))
    assert crop.shape == (tall, wide, 3) and crop.dtype == np.uint8 and crop.flags.c_contiguous
    for name, values in cut.items():
        assert values.shape == (tall, wide) and values.dtype == maps[name].dtype
        assert set(np.unique(values)) <= set(np.unique(maps[name])) | {FILL[name]}
    again, repeated = run(seed, image, maps, config, ("labels", "teacher"))
    assert crop.tobytes() == again.tobytes()
    assert all(cut[name].tobytes() == repeated[name].tobytes() for name in cut)
    assert np.array_equal(image, before)  # the caller's array is left alone


@pytest.mark.parametrize("seed", range(6))
def test_image_and_maps_share_their_geometry(seed: int) -> None:
    """With a ramp in both, each pixel of image and map encodes its source position."""
    height, width = 60, 100
    y, x = np.mgrid[:height, :width]
    image = np.stack([2 * x, 4 * y, np.full_like(x, 50)], -1).astype(np.uint8)
    config = AugmentSettings(scale=(200, 120), ratio_range=(0.8, 2.0), crop=(70, 90), photometric=False)
    maps = {"labels": (x * 1000 + y).astype(np.int32)}
    crop, cut = run(seed, image, maps, config)
    inside = cut["labels"] != IGNORED
    from_image = np.stack([crop[..., 0] / 2, crop[..., 1] / 4], -1)[inside]
    from_map = np.stack([cut["labels"] // 1000, cut["labels"] % 1000], -1)[inside]
    assert inside.mean() > 0.5
    assert np.abs(from_image - from_map).max() <= 1.01  # nearest against bilinear: up to a source pixel
    assert (crop[~inside] == MEAN_COLOUR).all()


@pytest.mark.parametrize(
    ("size", "scale", "ratio"),
    [
        ((500, 375), (2048, 512), 0.5),
        ((375, 500), (2048, 512), 1.7),
        ((100, 1000), (520, 520), 1.31),
        ((3, 999), (64, 64), 0.5),
    ],
)
def test_scale_follows_mmcv(size: tuple[int, int], scale: tuple[int, int], ratio: float) -> None:
    image = np.zeros((*size, 3), np.uint8)
    ratios = (ratio, ratio)
    found, maps = random_resize(image, {"labels": image[..., 0]}, scale, ratios, np.random.default_rng(0))
    # mmseg Resize.random_sample_ratio, then mmcv.rescale_size.
    wanted = int(scale[0] * ratio), int(scale[1] * ratio)
    factor = min(max(wanted) / max(size), min(wanted) / min(size))
    expected = tuple(max(1, int(side * float(factor) + 0.5)) for side in size)
    assert found.shape[:2] == maps["labels"].shape == expected


def test_ratios_fill_their_range() -> None:
    rng = np.random.default_rng(0)
    image = np.zeros((100, 100, 3), np.uint8)
    sides = [random_resize(image, {}, (100, 100), (0.5, 2.0), rng)[0].shape[0] for _ in range(300)]
    assert 50 <= min(sides) < 60 and 190 < max(sides) <= 200
    assert 115 < np.mean(sides) < 135  # uniform: 125


@pytest.mark.parametrize(
    ("values", "share", "as_category", "varied"),
    [
        ([0, 0, 0, 1], 0.75, False, False),  # exactly the maximum is refused, as in the reference
        ([0, 0, 1, 1], 0.75, False, True),
        ([0, 0, 0, 0], 0.75, False, False),
        ([0, 1, IGNORED, IGNORED], 0.75, False, True),
        ([0, 0, 0, 1, GUESS, GUESS], 0.75, False, False),
        ([0, 0, 0, 1, GUESS, GUESS], 0.75, True, True),
        ([GUESS] * 4, 0.75, True, False),
        ([GUESS, GUESS, 5, IGNORED], 0.75, True, True),
        ([IGNORED] * 4, 0.75, True, False),
    ],
)
def test_variety(values: list[int], share: float, as_category: bool, varied: bool) -> None:
    # The reference's rule: np.unique over valid pixels, more than one, the largest below the share.
    counted = [v for v in values if v >= 0 or (as_category and v == GUESS)]
    _, counts = np.unique(counted, return_counts=True)
    assert (len(counts) > 1 and counts.max() / counts.sum() < share) == varied
    assert is_varied([np.array([values], np.int32)], share, guess_is_category=as_category) == varied


def test_the_teacher_decides_if_no_pixel_is_known() -> None:
    unknown = np.full((2, 2), GUESS, np.int32)
    mixed = np.array([[1, 2], [1, 2]], np.int32)
    assert is_varied([unknown, mixed], 0.75, guess_is_category=False)
    assert not is_varied([unknown, np.ones_like(mixed)], 0.75, guess_is_category=False)
    assert not is_varied([unknown, mixed], 0.75, guess_is_category=True)  # the reference's bug
    assert not is_varied([np.zeros_like(mixed), mixed], 0.75, guess_is_category=False)  # truth comes first


class Counted(np.random.Generator):
    """Counts what it draws."""

    drawn = 0

    def integers(self, *args: Any, **kwargs: Any) -> Any:
        self.drawn += 1
        return super().integers(*args, **kwargs)


@pytest.mark.parametrize(
    ("values", "as_category", "draws"),
    [(0, False, 11), (GUESS, True, 11), (GUESS, False, 11), ("varied", False, 1)],
)
def test_a_crop_is_drawn_eleven_times_at_most(values: int | str, as_category: bool, draws: int) -> None:
    rng = Counted(np.random.PCG64(0))
    labels = np.indices((40, 40)).sum(0) % 2 if values == "varied" else np.full((40, 40), values)
    config = AugmentSettings(crop=(10, 10), guess_is_category=as_category)
    top, left, bottom, right = choose_crop([labels.astype(np.int32)], (40, 40), config, rng)
    assert rng.drawn == 2 * draws  # a row and a column each
    assert 0 <= top <= 30 and 0 <= left <= 30 and (bottom - top, right - left) == (10, 10)


def test_redrawing_finds_the_varied_corner() -> None:
    labels = np.zeros((200, 200), np.int32)
    labels[:, 100:] = 1
    share = {}
    for limit in (0.75, 1.0):
        found = []
        for seed in range(200):
            config = AugmentSettings(crop=(40, 40), max_category_share=limit)
            top, left, bottom, right = choose_crop([labels], (200, 200), config, np.random.default_rng(seed))
            found.append(is_varied([labels[top:bottom, left:right]], 0.75, guess_is_category=False))
        share[limit] = np.mean(found)
    plain = share[1.0]  # one draw: the border of the halves within reach
    assert 0.05 < plain < 0.25
    assert abs(share[0.75] - (1 - (1 - plain) ** 11)) < 0.12


def reference_photometric(image: Any, steps: list[tuple[str, float]]) -> Any:
    """mmseg's formulas, one after the other, colours by the definition of HSV instead of by OpenCV."""
    for name, value in steps:
        if name == "brightness":
            image = np.clip(image.astype(np.float32) + np.float32(value), 0, 255).astype(np.uint8)
        elif name == "contrast":
            image = np.clip(image.astype(np.float32) * np.float32(value), 0, 255).astype(np.uint8)
        else:
            hsv = np.array([colorsys.rgb_to_hsv(*(pixel / 255)) for pixel in image.reshape(-1, 3)])
            if name == "saturation":
                hsv[:, 1] = np.clip(hsv[:, 1] * value, 0, 1)
            else:
                hsv[:, 0] = (hsv[:, 0] + value / 180) % 1
            rgb = np.array([colorsys.hsv_to_rgb(*pixel) for pixel in hsv])
            image = np.rint(rgb * 255).astype(np.uint8).reshape(image.shape)
    return image


@pytest.mark.parametrize("seed", range(24))
def test_photometric_distortion_is_the_references(seed: int) -> None:
    image = np.random.default_rng(99).integers(0, 256, (12, 12, 3), np.uint8)
    mirror = np.random.default_rng(seed)  # the same numbers, drawn in the documented order
    steps: list[tuple[str, float]] = []
    if mirror.integers(2):
        steps.append(("brightness", mirror.uniform(-32, 32)))
    first = mirror.integers(2)
    if first and mirror.integers(2):
        steps.append(("contrast", mirror.uniform(0.5, 1.5)))
    if mirror.integers(2):
        steps.append(("saturation", mirror.uniform(0.5, 1.5)))
    if mirror.integers(2):
        steps.append(("hue", int(mirror.integers(-18, 18))))
    if not first and mirror.integers(2):
        steps.append(("contrast", mirror.uniform(0.5, 1.5)))
    found = photometric_distortion(image, np.random.default_rng(seed))
    difference = np.abs(found.astype(int) - reference_photometric(image, steps).astype(int))
    colour = any(name in ("saturation", "hue") for name, _ in steps)
    assert difference.max() <= (12 if colour else 0)  # OpenCV keeps hue in 180 steps, saturation in 256
    assert difference.mean() <= (3.0 if colour else 0)


def test_every_change_has_probability_one_half() -> None:
    grey = np.full((2, 2, 3), 100, np.uint8)
    changed = [
        photometric_distortion(grey, np.random.default_rng(seed))[0, 0, 0] != 100 for seed in range(400)
    ]
    # Only brightness and contrast can change grey: 1 - 1/2 * 1/2.
    assert abs(np.mean(changed) - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 400) + 0.02


def test_flip() -> None:
    image, maps = example(0, 20, 30)
    config = {"scale": (30, 20), "ratio_range": (1.0, 1.0), "crop": (20, 30), "photometric": False}
    plain, cut = run(0, image, maps, AugmentSettings(**config, flip=0.0))
    assert np.array_equal(plain, image) and np.array_equal(cut["labels"], maps["labels"])
    turned, cut = run(0, image, maps, AugmentSettings(**config, flip=1.0))
    assert np.array_equal(turned, cv2.flip(image, 1))
    assert np.array_equal(cut["confidence"], cv2.flip(maps["confidence"], 1))


def test_pad() -> None:
    found = pad(np.arange(6, dtype=np.int32).reshape(2, 3), (3, 4), IGNORED)
    assert found.tolist() == [[0, 1, 2, -100], [3, 4, 5, -100], [-100] * 4]
    colour = pad(np.zeros((1, 1, 3), np.uint8), (2, 1), MEAN_COLOUR)
    assert colour[:, 0].tolist() == [[0, 0, 0], [124, 116, 104]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": (0, 512)}, {"ratio_range": (2.0, 0.5)}, {"ratio_range": (0.0, 1.0)}, {"crop": (0, 5)},
        {"max_category_share": 0.0}, {"max_category_share": 1.5}, {"flip": -0.1}, {"flip": float("nan")},
    ],
)  # fmt: skip
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(MaskMillError) as caught:
        AugmentSettings(**wrong)
    assert caught.value.code == "setting_invalid" and next(iter(wrong)) in str(caught.value)
