"""The values of an image in any of Pillow's modes as 8-bit RGB."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STRIP_PIXELS = 1 << 20  # converted at a time


def to_rgb(image: Image.Image, value_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Convert any of Pillow's modes to RGB, a strip at a time: its copies stay small.

    Args:
        image: loaded.
        value_range: see ``pipeline.files.images.decode``.

    Returns:
        uint8 (H, W, 3).
    """
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    limits = (0.0, 255.0)
    if image.mode in ("I", "F"):
        limits = _scale_of(*(value_range or extremes(image)))
    for top, strip in _strips(image):
        rows = rgb[top : top + strip.height]
        if image.mode.startswith("I;16"):
            # The upper byte, as Pillow does for 16-bit RGB.
            rows[:] = (np.asarray(strip) >> 8).astype(np.uint8)[:, :, None]
        elif image.mode in ("I", "F"):
            rows[:] = _to_byte_range(np.asarray(strip, dtype=np.float64), *limits)[:, :, None]
        elif strip.has_transparency_data:
            rgba = strip.convert("RGBA")
            page = Image.new("RGB", strip.size, "white")
            page.paste(rgba, mask=rgba.getchannel("A"))
            rows[:] = np.asarray(page)
        else:
            rows[:] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image from top to bottom in strips of whole rows; their first rows and themselves."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if image.height <= rows:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def extremes(image: Image.Image) -> tuple[float, float]:
    """The lowest and the highest finite value; (inf, -inf) if there is none."""
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high


def _scale_of(low: float, high: float) -> tuple[float, float]:
    """The values that become 0 and 255, by the lowest and the highest; see ``decode`` of the images."""
    if low > high:
        return 0.0, 1.0
    if low >= 0:
        top = next((top for top in (1.0, 255.0, 65535.0) if high <= top), None)
        if top is not None:
            return 0.0, top
    return low, high


def _to_byte_range(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """Map values from ``low`` to ``high`` to 0…255; NaN is 0."""
    # Halved first, because the span of the whole float range overflows.
    unit = (values / 2 - low / 2) / max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    scaled = np.nan_to_num(unit, nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)
