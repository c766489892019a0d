"""Example pictures, with or without a mask. Imports no torch, because they are read before a model is loaded.

Shapes: H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.errors import WrongUse
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError, decode


@dataclass(frozen=True, eq=False)
class Picture:
    """An example.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W), true on the object; None if the whole image is the example.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None = None


def read_picture(image: str, mask: str | None = None) -> Picture:
    """Read an example.

    Args:
        image: path or URI.
        mask: path or URI of an image of the same size; the object is not black.

    Raises:
        MaskMillError: ``image_invalid``; as ``as_picture``.
    """
    return as_picture(_read(image), None if mask is None else _read(mask), names=(mask or "", image))


def as_picture(
    image: NDArray[np.uint8],
    mask: NDArray[np.uint8] | None = None,
    *,
    names: tuple[str, str] = ("of the example", "itself"),
) -> Picture:
    """Make an example from decoded images.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: uint8 (H, W, 3); the object is not black.
        names: names of the mask and the image in messages.

    Raises:
        MaskMillError: ``mask_invalid`` if the sizes differ, or the mask is black.
    """
    if mask is None:
        return Picture(image)
    inside = np.asarray(mask.any(axis=2), np.bool_)
    if inside.shape != image.shape[:2]:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (inside.shape, image.shape)]
        raise WrongUse(
            "mask_invalid",
            f"The mask {names[0]} has {sizes[0]} pixels, and the example {names[1]} has {sizes[1]}.",
            "Give the mask in the image's size.",
        )
    if not inside.any():
        raise WrongUse(
            "mask_invalid",
            f"The mask {names[0]} is black everywhere.",
            "Paint the object in any other colour, or leave the mask out.",
        )
    return Picture(image, inside)


def _read(path: str) -> NDArray[np.uint8]:
    try:
        return decode(fetch(path))
    except ImageError as error:
        raise WrongUse(
            "image_invalid",
            f"The example {path} cannot be read: {error.message} ({error.code}).",
            "Give a picture such as a JPEG or PNG.",
        ) from error
