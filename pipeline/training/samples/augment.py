"""Training crops: random scale, crop, flip and colours, as the loader of MaskCLIP+'s reference makes them.

Everything is a function of its arguments and an explicit random generator: the same generator state gives the
same bytes. Images are uint8 RGB (H, W, 3); maps are (H, W) arrays of ids, confidences and the like, which
share the image's geometry and never get a value that was not there or is not their filling.
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
"""What padding is filled with: ImageNet's mean, hence 0 after normalisation."""

_REDRAWS = 10
_BRIGHTNESS = 32.0
_STRETCH = (0.5, 1.5)  # of contrast and of saturation
_HUE = 18  # of OpenCV's 180 steps


class AugmentSettings(Settings):
    """How a training crop is made."""

    scale: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2048, 512)
    """Two numbers of pixels that the image is made to fit, whichever way round, times the ratio."""
    ratio_range: tuple[float, float] = (0.5, 2.0)
    """Least and greatest factor on ``scale``; one is drawn uniformly for each sample."""
    crop: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (512, 512)
    """(height, width) of the result in pixels; smaller images are padded at the right and the bottom."""
    max_category_share: Annotated[float, Field(gt=0, le=1)] = 0.75
    """A crop in which one class has this share of the counted pixels, or more, or in which there is only
    one class, is drawn again, up to 10 times; 1 takes the first crop."""
    guess_is_category: bool = False
    """Count pixels to be guessed as if they were a class of their own. That is a slip of the reference:
    without annotation every pixel is to be guessed, all redraws fail, and the crop is as good as unchecked.
    If False such pixels don't count, and where a crop has no known pixel the teacher's classes are counted
    instead."""
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Probability of a horizontal flip."""
    photometric: bool = True
    """Whether brightness, contrast, saturation and hue are changed."""

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
    """Scale, crop, flip, recolour and pad one image, and its maps in the same way.

    Args:
        image: uint8 (H, W, 3) RGB.
        maps: (H, W) each, by name.
        fill: per map the value of padding.
        settings: what may happen.
        rng: decides what happens.
        categories: names of the maps by which crops are judged (``settings.max_category_share``): the first,
            and the others in turn for crops of which those before know nothing. Class ids are >= 0; ``GUESS``
            is as the settings say; other negative numbers don't count. None: every crop is good.

    Returns:
        uint8 (crop height, crop width, 3), and the maps at that size with their own dtypes.
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
    """Fit image and maps into ``scale`` times a random ratio, their aspect kept: bilinear, maps nearest."""
    ratio = rng.uniform(*ratio_range)
    # The reference cuts the scaled numbers off before it fits the image in.
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
    """A crop, drawn again up to 10 times while ``is_varied`` says no; the last draw is taken as it is.

    Returns:
        top, left, bottom, right; at most ``settings.crop`` large, within the image of ``size``.
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
    """Whether several classes are in a crop, none with ``max_share`` of the counted pixels or more.

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
    OpenCV's 180 steps. Contrast comes before saturation and hue or after them, with probability 1/2 each.
    Every step rounds to uint8 (towards 0), as there.

    Args:
        image: uint8 (H, W, 3) RGB; not changed.
        rng: decides.
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
    """``values * alpha + beta``, cut off at 0 and 255; by table, for there are only 256 values."""
    table = np.clip(np.arange(256, dtype=np.float32) * np.float32(alpha) + np.float32(beta), 0, 255)
    return np.asarray(cv2.LUT(np.ascontiguousarray(values), table.astype(np.uint8)), dtype=np.uint8)


def pad(values: npt.NDArray[Any], size: tuple[int, int], fill: int | Sequence[int]) -> npt.NDArray[Any]:
    """``values`` (H, W, ...) in the upper left of an array of ``size``, the rest filled; always a copy."""
    height, width = values.shape[:2]
    out = np.empty((*size, *values.shape[2:]), values.dtype)
    out[:height, :width] = values
    out[height:] = fill
    out[:height, width:] = fill
    return out
