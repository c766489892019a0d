"""Crops of CLIPSeg's training examples, and the visual prompts (supports) made from them.

Crops follow the reference's PhraseCut reader. ``models.clipseg.visual_prompts`` renders supports from
normalised pixels; they are converted back to bytes, so brightness is rounded to 1/255.

Shapes: H W pixels, S side of the result.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from pipeline.files import images
from pipeline.training.clipseg.sources.base import IGNORED, OBJECT, Example
from pipeline.training.samples.augment import Box

if TYPE_CHECKING:
    from pipeline.labelling.clipseg.prompting import Style

Resize = Literal["corners", "antialias"]
_RANDOM_STYLE = "blur_highlight_random"


def crop_example(
    example: Example,
    side: int,
    rng: np.random.Generator,
    *,
    crop: bool,
    tries: int,
    share: float,
    resize: Resize,
    flip: float,
) -> Example:
    """Crop an example to a square around the object, or squeeze it, and flip it with probability ``flip``.

    Args:
        side: S.
        crop: crop instead of squeezing; see ``object_window`` for ``tries`` and ``share``.
        resize: see ``TripletSettings.resize``.

    Returns:
        Image (S, S, 3), mask (S, S), and always a weight (S, S), which is 0 where the mask is ignored.
    """
    image, mask, weight = example
    if weight is None:
        weight = np.ones(mask.shape, np.float32)
    if crop:
        top, left, bottom, right = object_window(mask == OBJECT, rng, tries=tries, share=share)
        window = slice(top, bottom), slice(left, right)
        image, mask, weight = image[window], mask[window], weight[window]
    if resize == "corners":
        image = bilinear(image, side)
    else:
        image = images.resize(np.ascontiguousarray(image), (side, side), method="antialias")
    mask, weight = nearest(mask, side), nearest(weight, side)
    if rng.random() < flip:
        image, mask, weight = image[:, ::-1], mask[:, ::-1], weight[:, ::-1]
    weight = np.where(mask == IGNORED, np.float32(0), weight)
    return Example(np.ascontiguousarray(image), np.ascontiguousarray(mask), np.ascontiguousarray(weight))


def object_window(
    inside: npt.NDArray[np.bool_], rng: np.random.Generator, *, tries: int, share: float
) -> Box:
    """Draw a square as large as the short side, with enough of the object in it.

    Args:
        inside: bool (H, W), true on the object.
        tries: number of random positions; the first with enough of the object wins, else the one with the
            most.
        share: enough means more than this share of the H * W pixels.

    Returns:
        top, left, bottom, right.
    """
    height, width = inside.shape
    side = min(height, width)
    wide = width > height
    # Such a square only moves along the long side, so prefix sums along it suffice.
    total = np.concatenate([[0], np.cumsum(inside.sum(axis=0 if wide else 1))])
    starts = rng.integers(abs(width - height) + 1, size=tries)
    object_pixels = total[starts + side] - total[starts]
    enough = np.flatnonzero(object_pixels > share * inside.size)
    start = int(starts[enough[0] if len(enough) else object_pixels.argmax()])
    return (0, start, side, start + side) if wide else (start, 0, start + side, side)


def bilinear(image: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """Resize (H, W, 3) to (S, S, 3) with aligned corners, without antialiasing."""
    x = image.astype(np.float32)
    for axis in (0, 1):
        at = np.linspace(0, x.shape[axis] - 1, side) if side > 1 else np.zeros(1)
        low = np.floor(at).astype(np.intp)
        high = np.minimum(low + 1, x.shape[axis] - 1)
        part = np.expand_dims((at - low).astype(np.float32), (1, 2) if axis == 0 else (0, 2))
        first = x.take(low, axis)
        x = first + part * (x.take(high, axis) - first)
    return (x + np.float32(0.5)).astype(np.uint8)


def nearest(values: npt.NDArray[Any], side: int) -> npt.NDArray[Any]:
    """Resize (H, W) to (S, S) with nearest-neighbour sampling."""
    values = np.ascontiguousarray(values)
    return np.asarray(cv2.resize(values, (side, side), interpolation=cv2.INTER_NEAREST))


def support_image(
    image: npt.NDArray[np.uint8], inside: npt.NDArray[np.bool_], style: str, rng: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Render a visual prompt.

    Args:
        image: uint8 (S, S, 3) RGB.
        inside: bool (S, S), the object; all false if the example shows none.
        style: see ``pipeline.labelling.clipseg.prompting.parse_style``.
        rng: only used by random styles.

    Returns:
        uint8 (3, S, S).
    """
    import torch

    from models.clipseg.decoder import normalize
    from models.clipseg.visual_prompts import visual_prompt
    from pipeline.labelling.clipseg.prompting import shown_pixels

    pixels = normalize(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None])
    mask = torch.from_numpy(inside.astype(np.float32))[None]
    if style == _RANDOM_STYLE:
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        prompt = visual_prompt(pixels, mask, style, generator=generator)
    else:
        prompt = support_style(style, len(image))(pixels, mask)
    return np.ascontiguousarray(shown_pixels(prompt[0]).transpose(2, 0, 1))


@lru_cache(maxsize=8)
def support_style(text: str, side: int) -> Style:
    """Parse a style of visual prompts; cropping styles yield S pixels a side as well.

    Raises:
        MaskMillError: ``setting_invalid``.
    """
    from models.clipseg.visual_prompts import VisualPrompt
    from pipeline.labelling.clipseg.prompting import parse_style

    style = parse_style(text)
    return dataclasses.replace(style, size=side) if isinstance(style, VisualPrompt) else style
