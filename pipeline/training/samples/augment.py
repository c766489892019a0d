"""Training crops with random scale, crop, flip and colours, as in MaskCLIP+'s reference.

Everything is a function of its arguments and an explicit random generator: the same generator state gives the
same bytes. Images are uint8 RGB (H, W, 3). Maps are (H, W) arrays of ids, confidences and the like; they
follow the image's geometry without interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Final

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field, field_validator

from models.settings import Settings
from pipeline.files.images import resize, target_size
from pipeline.training.loop.protocols import GUESS

Image = npt.NDArray[np.uint8]
Map = npt.NDArray[Any]
Box = tuple[int, int, int, int]

MEAN_COLOUR: Final = (124, 116, 104)
"""Padding colour: ImageNet's mean, which is 0 after normalisation."""

_REDRAWS = 10
_BRIGHTNESS = 32.0
_STRETCH = (0.5, 1.5)  # of contrast and of saturation
_HUE = 18  # of OpenCV's 180 steps


class AugmentSettings(Settings):
    """How to augment and crop."""

    scale: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2048, 512)
    """Long and short side in pixels, in either order, to fit the image into, times the random ratio."""
    ratio_range: tuple[float, float] = (0.5, 2.0)
    """Minimum and maximum factor on ``scale``, drawn uniformly per sample."""
    crop: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (512, 512)
    """(height, width) of the result in pixels; smaller images are padded at the right and the bottom."""
    max_category_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Redraw a crop, up to 10 times, if one class has at least this share of the counted pixels or is the
    only one; 1 takes the first crop."""
    guess_is_category: bool = False
    """Count pixels to be guessed as a class. This is a bug of the reference: without annotation every pixel
    is to be guessed, so every redraw fails and crops are effectively unchecked. If False, such pixels do not
    count, and in a crop without known pixels the teacher's classes are counted instead."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Vary brightness, contrast, saturation and hue."""

    @field_validator("ratio_range")
    @classmethod
    def _ordered(cls, ratio_range: tuple[float, float]) -> tuple[float, float]:
        if not 0 < ratio_range[0] <= ratio_range[1] < float("inf"):
            raise ValueError("give two positive numbers, the lesser first")
        return ratio_range


def augment(
    image: Image,
    maps: Mapping[str, Map],
    *,
    fill: Mapping[str, int],
    settings: AugmentSettings,
    rng: np.random.Generator,
    categories: Sequence[str] = (),
) -> tuple[Image, dict[str, Map]]:
    """Scale, crop, flip, recolour and pad an image, and its maps in the same way.

    Args:
        image: uint8 (H, W, 3) RGB.
        maps: (H, W) each, by name.
        fill: padding value of each map.
        categories: names of the maps that judge crops (``settings.max_category_share``); later ones are only
            used if earlier ones have no counted pixel in the crop. Class ids are >= 0; the settings decide on
            ``GUESS``; other negative values do not count. Without any, every crop is accepted.

    Returns:
        uint8 (crop height, crop width, 3), and the maps at that size with unchanged dtypes.
    """
    image, scaled = random_resize(image, maps, settings.scale, settings.ratio_range, rng)
    box = choose_crop([scaled[name] for name in categories], image.shape[:2], settings, rng)
    top, left, bottom, right = box
    image = image[top:bottom, left:right]
    scaled = {name: values[top:bottom, left:right] for name, values in scaled.items()}
    if rng.random() < settings.flip:
        image = image[:, ::-1]
        scaled = {name: values[:, ::-1] for name, values in scaled.items()}
    image = np.ascontiguousarray(image)
    if settings.photometric:
        image = photometric_distortion(image, rng)
    padded = {name: pad(values, settings.crop, fill[name]) for name, values in scaled.items()}
    return pad(image, settings.crop, MEAN_COLOUR), padded


def random_resize(
    image: Image,
    maps: Mapping[str, Map],
    scale: tuple[int, int],
    ratio_range: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[Image, dict[str, Map]]:
    """Fit image (bilinear) and maps (nearest) into ``scale`` times a random ratio, keeping the aspect."""
    ratio = rng.uniform(*ratio_range)
    # Like the reference, truncate the scaled sides before fitting.
    long, short = (max(1, int(side * ratio)) for side in scale)
    height, width = target_size(*image.shape[:2], scale=(long, short))
    resized = {
        name: np.asarray(cv2.resize(values, (width, height), interpolation=cv2.INTER_NEAREST))
        for name, values in maps.items()
    }
    return resize(image, (height, width)), resized


def choose_crop(
    judged: Sequence[Map], size: tuple[int, ...], settings: AugmentSettings, rng: np.random.Generator
) -> Box:
    """Draw a crop, up to 10 times more until ``is_varied`` accepts it; the last draw is not checked.

    Returns:
        top, left, bottom, right: at most ``settings.crop`` large, within the image of ``size``.
    """
    box = _random_box(size, settings.crop, rng)
    if not judged or settings.max_category_share >= 1:
        return box
    for _ in range(_REDRAWS):
        top, left, bottom, right = box
        window = [values[top:bottom, left:right] for values in judged]
        if is_varied(window, settings.max_category_share, guess_is_category=settings.guess_is_category):
            break
        box = _random_box(size, settings.crop, rng)
    return box


def is_varied(judged: Sequence[Map], max_share: float, *, guess_is_category: bool) -> bool:
    """Whether a crop has several classes, all below ``max_share`` of the counted pixels.

    Args:
        judged: maps of the crop; the first with any counted pixel decides.
        max_share: in (0, 1].
        guess_is_category: whether ``GUESS`` is counted as a class.
    """
    for values in judged:
        counts = np.bincount(values[values >= 0])
        if guess_is_category:
            counts = np.append(counts, np.count_nonzero(values == GUESS))
        total = int(counts.sum())
        if total:
            return int(np.count_nonzero(counts)) > 1 and int(counts.max()) < max_share * total
    return False


def _random_box(size: tuple[int, ...], crop: tuple[int, int], rng: np.random.Generator) -> Box:
    top, left = (int(rng.integers(max(have - want, 0) + 1)) for have, want in zip(size, crop, strict=True))
    return top, left, min(top + crop[0], size[0]), min(left + crop[1], size[1])


def photometric_distortion(image: Image, rng: np.random.Generator) -> Image:
    """Change brightness, contrast, saturation and hue, each with probability 1/2, as mmsegmentation does.

    Brightness by up to 32 of 255; contrast and saturation by a factor of 0.5 to 1.5; hue by -18 to 17 of
    OpenCV's 180 steps. Contrast comes before or after saturation and hue, with probability 1/2 each. Every
    step truncates to uint8, as in mmsegmentation.

    Args:
        image: uint8 (H, W, 3) RGB; not changed.
    """
    if _coin(rng):
        image = _mapped(image, beta=rng.uniform(-_BRIGHTNESS, _BRIGHTNESS))
    contrast_first = _coin(rng)
    if contrast_first:
        image = _random_contrast(image, rng)
    if _coin(rng):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 1] = _mapped(hsv[:, :, 1], alpha=rng.uniform(*_STRETCH))
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)
    if _coin(rng):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        turn = int(rng.integers(-_HUE, _HUE))
        hue = np.ascontiguousarray(hsv[:, :, 0])
        hsv[:, :, 0] = cv2.LUT(hue, ((np.arange(256) + turn) % 180).astype(np.uint8))
        image = np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), dtype=np.uint8)
    return image if contrast_first else _random_contrast(image, rng)


def _random_contrast(image: Image, rng: np.random.Generator) -> Image:
    return _mapped(image, alpha=rng.uniform(*_STRETCH)) if _coin(rng) else image


def _coin(rng: np.random.Generator) -> bool:
    return bool(rng.integers(2))


def _mapped(values: Image, *, alpha: float = 1.0, beta: float = 0.0) -> Image:
    """Compute ``values * alpha + beta`` clipped to 0..255, by lookup table."""
    table = np.clip(np.arange(256, dtype=np.float32) * np.float32(alpha) + np.float32(beta), 0, 255)
    return np.asarray(cv2.LUT(np.ascontiguousarray(values), table.astype(np.uint8)), dtype=np.uint8)


def pad(values: npt.NDArray[Any], size: tuple[int, int], fill: int | Sequence[int]) -> npt.NDArray[Any]:
    """Pad ``values`` (H, W, ...) to ``size`` at the bottom and right; always a copy."""
    height, width = values.shape[:2]
    out = np.empty((*size, *values.shape[2:]), values.dtype)
    out[:height, :width] = values
    out[height:] = fill
    out[:height, width:] = fill
    return out
