"""Image corruptions for robustness measurements: eight kinds, five levels each.

Kinds and parameters come from ImageNet-C (Hendrycks and Dietterich, "Benchmarking Neural Network Robustness
to Common Corruptions and Perturbations", ICLR 2019), as selected for MaskCLIP's robustness table (Zhou et
al., ECCV 2022). They are applied to the decoded image at its original size, before resizing.

    gaussian_noise     additive Gaussian noise
    shot_noise         Poisson noise, as from photon counting
    impulse_noise      salt-and-pepper noise, per channel
    speckle_noise      multiplicative Gaussian noise
    gaussian_blur      Gaussian filter
    defocus_blur       disk filter, as from a lens out of focus
    spatter            drops of water on the lens (levels 1 to 3), mud (levels 4 and 5)
    jpeg_compression   low-quality JPEG

Shapes: H, W pixels. Images are uint8 RGB (H, W, 3); within this module float32 in [0, 1].
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from models.errors import MaskMillError, WrongUse

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

#: Levels of every corruption, mildest first.
LEVELS: Final = (1, 2, 3, 4, 5)

# Pale turquoise water and brown mud, RGB in [0, 1].
_WATER: Final = np.array([175 / 255, 238 / 255, 238 / 255], np.float32)
_MUD: Final = np.array([63 / 255, 42 / 255, 20 / 255], np.float32)

# The largest multiple of JPEG's block size within the encoder's limit of 65,500 pixels a side.
_JPEG_SIDE: Final = 65_488


def parse(text: str) -> tuple[str, int]:
    """Parse a corruption written as ``NAME:LEVEL``.

    Raises:
        MaskMillError: ``setting_invalid``, listing what is allowed.

    >>> parse("jpeg_compression:3")
    ('jpeg_compression', 3)
    """
    name, _, level = text.partition(":")
    if name not in _KINDS or not re.fullmatch("[1-5]", level):
        raise _invalid(repr(text))
    return name, int(level)


def corrupt(
    image: Bytes, name: str, level: int, *, seed: int, channels: Literal["rgb", "bgr"] = "rgb"
) -> Bytes:
    """Apply one corruption to an image.

    Deterministic. With the same seed, the Gaussian and the salt-and-pepper noise have the same pattern at all
    levels and differ only in strength.

    Args:
        image: uint8 (H, W, 3) RGB of any size from one pixel; not modified.
        name: one of :data:`CORRUPTIONS`.
        level: 1 (mildest) to 5.
        seed: non-negative; give each image its own.
        channels: ``rgb`` corrupts the image as it is. ``bgr`` corrupts it with red and blue swapped, as
            MaskCLIP's code did by accident: its mud is blue, and its JPEG preserves blue better than red.
            Input and output are RGB either way.

    Returns:
        A new uint8 (H, W, 3) RGB array, C-contiguous. Values are truncated, not rounded, as in the reference.

    Raises:
        MaskMillError: ``setting_invalid`` for a name or level that does not exist.
        ValueError: for another dtype or shape, or unknown ``channels``.
    """
    if name not in _KINDS or level not in LEVELS:
        raise _invalid(f"{name}:{level}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"expected a uint8 (H, W, 3) image, not {image.dtype} {image.shape}")
    if channels not in ("rgb", "bgr"):
        raise ValueError(f"unknown channels {channels!r}: rgb or bgr")
    order = 1 if channels == "rgb" else -1
    apply, parameters = _KINDS[name]
    source = np.ascontiguousarray(image[..., ::order])
    corrupted = apply(source, np.random.default_rng(seed), *parameters[level - 1])
    return np.array(corrupted[..., ::order], order="C")


def _invalid(given: str) -> MaskMillError:
    return WrongUse(
        "setting_invalid",
        f"There is no corruption {given}.",
        f"Write NAME:LEVEL with a level from 1 to 5; names: {', '.join(CORRUPTIONS)}.",
    )


def _unit(image: Bytes) -> Floats:
    return image / np.float32(255)


def _to_bytes(values: Floats) -> Bytes:
    """Convert [0, 1] to uint8, truncating, with 0.001 grey levels of tolerance for float32 rounding."""
    scaled = np.clip(values, 0, 1)
    scaled *= 255
    scaled += 1e-3
    return scaled.astype(np.uint8)


# --- noise ---


def _gaussian_noise(image: Bytes, rng: np.random.Generator, sigma: float) -> Bytes:
    noise = rng.standard_normal(image.shape, np.float32)
    noise *= sigma
    return _to_bytes(_unit(image) + noise)


def _speckle_noise(image: Bytes, rng: np.random.Generator, sigma: float) -> Bytes:
    noise = rng.standard_normal(image.shape, np.float32)
    noise *= sigma
    noise += 1
    return _to_bytes(_unit(image) * noise)


def _shot_noise(image: Bytes, rng: np.random.Generator, photons: float) -> Bytes:
    """``photons`` is the mean count of a white value."""
    counts = rng.poisson(_unit(image) * photons)
    return _to_bytes((counts / photons).astype(np.float32))


def _impulse_noise(image: Bytes, rng: np.random.Generator, amount: float) -> Bytes:
    """Set the share ``amount`` of all values, half to 0 and half to 255; channels are independent."""
    draw = rng.random(image.shape, np.float32)
    noisy = image.copy()
    noisy[draw < amount / 2] = 0
    noisy[draw >= 1 - amount / 2] = 255
    return noisy


# --- blur ---


def _smooth(values: Floats, sigma: float) -> Floats:
    """Gaussian filter, truncated at four sigma, with replicated borders."""
    import cv2

    side = 2 * int(4 * sigma + 0.5) + 1
    smooth = cv2.GaussianBlur(values, (side, side), sigma, borderType=cv2.BORDER_REPLICATE)
    return np.asarray(smooth, dtype=np.float32)


def _gaussian_blur(image: Bytes, rng: np.random.Generator, sigma: float) -> Bytes:
    return _to_bytes(_smooth(_unit(image), sigma))


def _defocus_blur(image: Bytes, rng: np.random.Generator, radius: int, alias_sigma: float) -> Bytes:
    import cv2

    return _to_bytes(cv2.filter2D(_unit(image), -1, _disk(radius, alias_sigma)))


def _disk(radius: int, alias_sigma: float) -> Floats:
    """A disk kernel with a soft rim and sum 1: 17 × 17, or (2 radius + 1)² for a radius above 8."""
    import cv2

    reach, side = (8, 3) if radius <= 8 else (radius, 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = cv2.GaussianBlur((x**2 + y**2 <= radius**2).astype(np.float32), (side, side), alias_sigma)
    # Normalised after softening: a disk that touches the grid's edge would brighten the image by 1 %.
    return np.asarray(disk / disk.sum(), dtype=np.float32)


# --- the rest ---


def _spatter(
    image: Bytes,
    rng: np.random.Generator,
    mean: float,
    std: float,
    sigma: float,
    threshold: float,
    blend: float,
    mud: bool,
) -> Bytes:
    """Drops where smoothed normal noise exceeds a threshold.

    ``blend`` is the maximum opacity of water, or the sigma that softens the rim of mud.
    """
    liquid = rng.standard_normal(image.shape[:2], np.float32)
    liquid *= std
    liquid += mean
    liquid = _smooth(liquid, sigma)
    if mud:
        cover = _smooth((liquid > threshold).astype(np.float32), blend)[..., None]
        cover[cover < 0.8] = 0
        return _to_bytes(_unit(image) * (1 - cover) + _MUD * cover)
    liquid[liquid < threshold] = 0
    return _to_bytes(_unit(image) + blend * _glints(_to_bytes(liquid))[..., None] * _WATER)


def _glints(drops: Bytes) -> Floats:
    """Brightness of each pixel of the drops, in [0, 1].

    An emboss filter over the equalised distance to the rim gives each drop a lit and a dark side.

    Args:
        drops: uint8 (H, W), thickness of the water; 0 is no water.
    """
    import cv2

    distance = cv2.distanceTransform(255 - cv2.Canny(drops, 50, 150), cv2.DIST_L2, 5)
    relief = cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], np.float32)
    lit = cv2.blur(cv2.filter2D(cv2.equalizeHist(relief), cv2.CV_8U, emboss), (3, 3))
    glints = drops.astype(np.float32) * lit
    return glints / max(float(glints.max()), 1.0)  # avoids 0 / 0 without drops


def _jpeg_compression(image: Bytes, rng: np.random.Generator, quality: int) -> Bytes:
    axis = int(image.shape[1] > image.shape[0])
    if image.shape[axis] > _JPEG_SIDE:
        parts = np.split(image, range(_JPEG_SIDE, image.shape[axis], _JPEG_SIDE), axis)
        return np.concatenate([_jpeg_compression(part, rng, quality) for part in parts], axis)
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    with Image.open(file) as compressed:
        return np.asarray(compressed)


_KINDS: Final[dict[str, tuple[Callable[..., Bytes], tuple[tuple[Any, ...], ...]]]] = {
    "gaussian_noise": (_gaussian_noise, ((0.08,), (0.12,), (0.18,), (0.26,), (0.38,))),
    "shot_noise": (_shot_noise, ((60,), (25,), (12,), (5,), (3,))),
    "impulse_noise": (_impulse_noise, ((0.03,), (0.06,), (0.09,), (0.17,), (0.27,))),
    "speckle_noise": (_speckle_noise, ((0.15,), (0.2,), (0.35,), (0.45,), (0.6,))),
    "gaussian_blur": (_gaussian_blur, ((1,), (2,), (3,), (4,), (6,))),
    "defocus_blur": (_defocus_blur, ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))),
    "spatter": (
        _spatter,
        (
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ),
    ),
    "jpeg_compression": (_jpeg_compression, ((25,), (18,), (15,), (10,), (7,))),
}
#: Names of the corruptions.
CORRUPTIONS: Final = tuple(_KINDS)
