"""Visual prompts against a re-derivation in NumPy and OpenCV, image by image and pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch

from models.clipseg.visual_prompts import (
    MODES,
    STYLES,
    TABLE2,
    VisualPrompt,
    gaussian_blur,
    object_crop,
    visual_prompt,
)
from models.errors import MaskMillError

MEAN = np.array([0.485, 0.456, 0.406], np.float32)
STD = np.array([0.229, 0.224, 0.225], np.float32)
SIZES = [(48, 48), (40, 61), (70, 33)]


def example(height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An ImageNet-normalised image (H, W, 3) and a ragged mask (H, W)."""
    rng = np.random.default_rng(seed)
    image = (rng.random((height, width, 3), np.float32) - MEAN) / STD
    mask = np.zeros((height, width), np.float32)
    mask[height // 5 : height // 2, width // 3 : width // 3 + width // 4] = 1
    mask[height // 2, width // 3] = 1
    mask[height // 4, width // 3 + 2] = 0
    return image, mask


def run(prompt: VisualPrompt | str, image: np.ndarray, mask: np.ndarray, **options: object) -> np.ndarray:
    images, masks = torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(mask)[None]
    kept = images.clone()
    if isinstance(prompt, str):
        out = visual_prompt(images, masks, prompt, **options)  # type: ignore[arg-type]
    else:
        out = prompt(images, masks)
    assert torch.equal(images, kept), "the image was changed"
    return out[0].permute(1, 2, 0).numpy()


def behind(image: np.ndarray, mask: np.ndarray, blur: float, factor: float) -> np.ndarray:
    blurred = cv2.GaussianBlur(image, (15, 15), blur) if blur else image
    return np.where(mask[..., None] > 0, image, factor * blurred)


def cropped(image: np.ndarray, mask: np.ndarray, context: float, size: int) -> np.ndarray:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if rows.size == 0:
        rows, columns = np.arange(mask.shape[0]), np.arange(mask.shape[1])
    box = []
    for found, length in ((rows, mask.shape[0]), (columns, mask.shape[1])):
        low, high = int(found.min()), int(found.max()) + 1
        margin = context * (high - low)
        box += [int(max(0.0, low - margin)), int(min(float(length), high + margin))]
    cut = image[box[0] : box[1], box[2] : box[3]]
    height, width = cut.shape[:2]
    side = max(height, width)
    square = np.zeros((side, side, image.shape[2]), np.float32)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = cut
    out = np.empty((size, size, image.shape[2]), np.float32)
    for i in range(size):
        for j in range(size):
            out[i, j] = square[math.floor(i * side / size), math.floor(j * side / size)]
    return out


# blur sigma, background factor, crop context, crop size, shift: section 2.4 of the reference's description
REFERENCE_MODES = {
    "blur_highlight": (1, 0.5, None, 0, -0.01),
    "blur3_highlight": (3, 0.5, None, 0, -0.01),
    "blur3_highlight01": (3, 0.1, None, 0, -0.01),
    "crop": (1, 1.0, 0.1, 224, 0.0),
    "crop_blur_highlight": (3, 0.1, 0.1, 224, 0.0),
    "crop_blur_highlight352": (3, 0.1, 0.1, 352, 0.0),
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", REFERENCE_MODES)
def test_modes(mode: str, size: tuple[int, int]) -> None:
    image, mask = example(*size)
    blur, factor, context, side, shift = REFERENCE_MODES[mode]
    expected = behind(image, mask, blur, factor)
    if context is not None:
        expected = cropped(expected, mask, context, side)
    np.testing.assert_allclose(run(mode, image, mask), expected + shift, atol=2e-5)


NOTEBOOK = {
    "image": (0, 1.0, None),
    "intensity50": (0, 0.5, None),
    "intensity10": (0, 0.1, None),
    "intensity0": (0, 0.0, None),
    "blur": (3, 1.0, None),
    "blur_intensity10": (3, 0.1, None),
    "crop_large_context": (0, 1.0, 0.5),
    "crop": (0, 1.0, 0.1),
    "crop_blur": (3, 1.0, 0.5),
    "crop_intensity10": (3, 0.1, None),
    "crop_blur_intensity10": (3, 0.1, 0.1),
}


@pytest.mark.parametrize("name", NOTEBOOK)
def test_table_2(name: str) -> None:
    image, mask = example(45, 60, seed=1)
    blur, factor, context = NOTEBOOK[name]
    expected = behind(image, mask, blur, factor)
    if context is not None:
        expected = cropped(expected, mask, context, 224)
    np.testing.assert_allclose(run(TABLE2[name], image, mask), expected, atol=2e-5)


def test_every_mode_is_tested() -> None:
    assert set(STYLES) == set(REFERENCE_MODES)
    assert set(TABLE2) == {*NOTEBOOK, "dye", "outline"}
    assert set(MODES) == {*REFERENCE_MODES, *SIMPLE, "blur_highlight_random"}


SIMPLE = {
    "highlight": lambda image, m: image * m * 0.85 + 0.15 * image,
    "highlight2": lambda image, m: (image / 2 + 0.1) * m + 0.3 * (image / 2),
    "overlay": lambda image, m: image * m,
    "shape": lambda image, m: np.repeat(m, 3, axis=2),
    "concat": lambda image, m: np.concatenate([image, m], axis=2),
    "image_only": lambda image, m: image,
    "image_black": lambda image, m: 0 * image,
}


@pytest.mark.parametrize("mode", SIMPLE)
def test_simple_modes(mode: str) -> None:
    image, mask = example(40, 61)
    np.testing.assert_allclose(run(mode, image, mask), SIMPLE[mode](image, mask[..., None]), atol=1e-6)


def test_random_highlight() -> None:
    image, mask = example(40, 40)
    draws, factors, blurs = 30, [], set()
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        out = run("blur_highlight_random", image, mask, generator=generator) + 0.01
        np.testing.assert_allclose(out[mask > 0], image[mask > 0], atol=1e-5)
        fits = []
        for blur in (0, 1, 2):  # which of the three, and with what factor?
            base = behind(image, 0 * mask, blur, 1.0)[mask == 0].ravel()
            factor = float(base @ out[mask == 0].ravel() / (base @ base))
            fits.append((float(np.abs(factor * base - out[mask == 0].ravel()).max()), blur, factor))
        error, blur, factor = min(fits)
        assert error < 1e-4
        blurs.add(blur)
        factors.append(factor)
    assert blurs == {0, 1, 2}
    assert 0.1 <= min(factors) < 0.25
    assert 0.75 < max(factors) < 0.9
    again = [
        run("blur_highlight_random", image, mask, generator=torch.Generator().manual_seed(7))
        for _ in range(2)
    ]
    np.testing.assert_array_equal(again[0], again[1])


def test_dye_and_outline() -> None:
    image, mask = example(45, 60)
    rgb = np.clip(image * STD + MEAN, 0, 1).astype(np.float32)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None]
    dyed = np.where(mask[..., None] > 0, grey * np.array([1, 0.2, 0.2]), grey)
    np.testing.assert_allclose(run(TABLE2["dye"], image, mask), (dyed - MEAN) / STD, atol=5e-5)

    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    line = np.zeros(mask.shape, np.uint8)
    cv2.drawContours(line, contours, -1, 255, 5)
    outlined = np.where(line[..., None] > 0, np.array([1.0, 0, 0]), rgb)
    np.testing.assert_allclose(run(TABLE2["outline"], image, mask), (outlined - MEAN) / STD, atol=5e-5)
    assert 0 < (line > 0).mean() < 0.5


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 9), (8, 30), (40, 25)])
@pytest.mark.parametrize("sigma", [0.6, 1, 3])
def test_blur_is_opencvs(height: int, width: int, sigma: float) -> None:
    image = np.random.default_rng(0).standard_normal((height, width, 3), np.float32)
    out = gaussian_blur(torch.from_numpy(image).permute(2, 0, 1)[None], sigma)[0].permute(1, 2, 0)
    np.testing.assert_allclose(out.numpy(), cv2.GaussianBlur(image, (15, 15), sigma), atol=1e-5)


MASKS = {
    "empty": (slice(0, 0), slice(0, 0)),
    "full": (slice(None), slice(None)),
    "pixel": (slice(7, 8), slice(20, 21)),
    "corner": (slice(0, 9), slice(30, 45)),
    "tall": (slice(2, 29), slice(10, 14)),
    "wide": (slice(12, 15), slice(3, 40)),
}


@pytest.mark.parametrize("where", MASKS)
@pytest.mark.parametrize("context", [0.0, 0.1, 0.5])
def test_crop(where: str, context: float) -> None:
    image, _ = example(31, 45)
    mask = np.zeros((31, 45), np.float32)
    mask[MASKS[where]] = 1
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    out = object_crop(tensor, torch.from_numpy(mask), context, 37)[0].permute(1, 2, 0)
    np.testing.assert_array_equal(out.numpy(), cropped(image, mask, context, 37))


def test_a_batch_is_its_images() -> None:
    pairs = [example(40, 52, seed) for seed in range(3)]
    pairs[1] = (pairs[1][0], np.roll(pairs[1][1], 9, axis=1))
    images = torch.from_numpy(np.stack([image for image, _ in pairs])).permute(0, 3, 1, 2)
    masks = torch.from_numpy(np.stack([mask for _, mask in pairs]))
    for kind in (masks, masks.bool(), masks.to(torch.uint8)):
        out = STYLES["crop_blur_highlight"](images, kind)
        assert out.shape == (3, 3, 224, 224)
        for row, (image, mask) in zip(out, pairs, strict=True):
            alone = run("crop_blur_highlight", image, mask)
            np.testing.assert_allclose(row.permute(1, 2, 0).numpy(), alone, atol=1e-6)


def test_wrong_use() -> None:
    images, masks = torch.zeros(1, 3, 8, 8), torch.zeros(1, 8, 9)
    calls: list[tuple[str, Callable[[], object]]] = [
        ("mask_invalid", lambda: STYLES["crop"](images, masks)),
        ("setting_invalid", lambda: visual_prompt(images, masks, "darken")),
        ("setting_invalid", lambda: VisualPrompt(context=-0.1)),
    ]
    for code, call in calls:
        with pytest.raises(MaskMillError) as caught:
            call()
        assert caught.value.code == code
    for wrong in ({"blur": -1}, {"size": 0}, {"paint": "gold"}, {"paint": "dye", "context": 0.1}):
        with pytest.raises(MaskMillError):
            VisualPrompt(**wrong)  # type: ignore[arg-type]
