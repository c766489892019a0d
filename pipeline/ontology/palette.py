"""Colours for any number of classes, distinct also for people with colour blindness.

Each colour is chosen as far as possible from all earlier ones. The distance of two colours is the smallest of
their Oklab distance in normal vision and twice that in protan and deutan vision (Machado et al. 2009,
severity 1). The result depends only on the given colours and the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

#: Colour of the background class.
BACKGROUND_GREY = (56, 56, 60)

# Machado, Oliveira, Fernandes: A physiologically-based model for simulation of color vision deficiency, 2009.
_PROTAN = np.array(
    [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
)
_DEUTAN = np.array(
    [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
)
# Ottosson, "A perceptual color space for image processing", 2020: linear sRGB -> LMS -> Oklab.
_TO_LMS = np.array(
    [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
     [0.0883024619, 0.2817188376, 0.6299787005]]
)  # fmt: skip
_TO_LAB = np.array(
    [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
     [0.0259040371, 0.7827717662, -0.8086757660]]
)  # fmt: skip

# Farthest-point selection is slow and runs out of candidates; beyond this number, colours are merely unique.
_MAX_SPREAD = 512


def oklab(rgb: npt.ArrayLike) -> Array:
    """Oklab coordinates (..., 3) of sRGB colours (..., 3) in 0..255."""
    return _linear_to_oklab(_linear(np.asarray(rgb, dtype=np.float64)))


def perceived(rgb: npt.ArrayLike) -> Array:
    """Oklab coordinates (..., 3, 3) of sRGB colours (..., 3) in normal, protan and deutan vision."""
    linear = _linear(np.asarray(rgb, dtype=np.float64))
    views = [linear, np.clip(linear @ _PROTAN.T, 0, 1), np.clip(linear @ _DEUTAN.T, 0, 1)]
    return np.stack([_linear_to_oklab(view) for view in views], axis=-2)


def palette(given: Sequence[tuple[int, int, int] | None]) -> npt.NDArray[np.uint8]:
    """Choose the missing colours.

    Args:
        given: sRGB colour (0..255) per class, or None to choose one.

    Returns:
        uint8 (N, 3): the given colours unchanged; the chosen ones differ from them and from each other.
    """
    chosen = iter(_choose(sum(color is None for color in given), tuple(c for c in given if c is not None)))
    rows = [next(chosen) if color is None else color for color in given]
    return np.array(rows, dtype=np.uint8).reshape(-1, 3)


@lru_cache(maxsize=32)
def _choose(count: int, taken: tuple[tuple[int, int, int], ...]) -> tuple[tuple[int, int, int], ...]:
    axis = np.linspace(0, 255, 16).round().astype(np.int64)
    candidates = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(-1, 3)
    lightness, a, b = oklab(candidates).T
    # Very dark or very light overlays hide the image or look like missing pixels. The most saturated colours
    # draw the eye to their class; leaving them out costs a sixth of the minimum distance.
    candidates = candidates[(lightness > 0.38) & (lightness < 0.93) & (np.hypot(a, b) < 0.18)]
    seen = perceived(candidates)
    avoid = [*taken, (0, 0, 0), (255, 255, 255), BACKGROUND_GREY]
    nearest = np.full(len(candidates), np.inf)
    for color in avoid:
        nearest = np.minimum(nearest, _distance(seen, perceived(color)))
    result: list[tuple[int, int, int]] = []
    used = set(taken)
    for _ in range(min(count, _MAX_SPREAD)):
        best = int(nearest.argmax())
        color = (int(candidates[best, 0]), int(candidates[best, 1]), int(candidates[best, 2]))
        nearest = np.minimum(nearest, _distance(seen, seen[best]))
        nearest[best] = -1.0
        result.append(color)
        used.add(color)
    index = 0
    while len(result) < count:
        index += 1
        # An odd factor permutes the 24-bit numbers, so no colour repeats before all have been used.
        value = index * 0x9E3779 % (1 << 24)
        color = (value >> 16, value >> 8 & 255, value & 255)
        if color not in used:
            result.append(color)
    return tuple(result)


def _distance(seen: Array, one: Array) -> Array:
    per_vision = np.sqrt(((seen - one) ** 2).sum(-1))
    # Dichromats see fewer distinct colours. Half the distance is what they can get at no cost to normal
    # vision (measured against other weights for 14 to 171 colours).
    return np.minimum(per_vision[..., 0], 2 * per_vision.min(-1))


def _linear(rgb: Array) -> Array:
    scaled = rgb / 255.0
    return np.where(scaled <= 0.04045, scaled / 12.92, ((scaled + 0.055) / 1.055) ** 2.4)


def _linear_to_oklab(linear: Array) -> Array:
    return np.cbrt(linear @ _TO_LMS.T) @ _TO_LAB.T
