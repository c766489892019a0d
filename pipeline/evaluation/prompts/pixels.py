"""Resizing of images and masks in CLIPSeg's benchmarks, which differs between them.

Unlike ``pipeline.files.images.fit``, it works in floating point without rounding between steps; only this
reproduces published numbers to the digit.

Shapes: H W pixels at the image's original size, S = 352.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clipseg.decoder import IMAGE_SIZE, normalize
from models.clipseg.visual_prompts import visual_prompt
from pipeline.datasets.base import Labels


def pixels(
    image: npt.NDArray[np.uint8],
    size: tuple[int, int],
    *,
    align_corners: bool = False,
    antialias: bool = False,
) -> Tensor:
    """Resize bilinearly and normalise by ImageNet statistics: uint8 RGB (H, W, 3) to float32 (3, *size)."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    # PyTorch supports only one of the two options at a time.
    x = F.interpolate(x, size, mode="bilinear", align_corners=align_corners, antialias=antialias)
    return normalize(x)[0]


def nearest(labels: npt.NDArray[np.generic], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Resize by nearest neighbour, as PyTorch and OpenCV do; ids up to 2**24 are exact."""
    x = torch.from_numpy(labels.astype(np.float32))[None, None]
    return F.interpolate(x, size, mode="nearest")[0, 0].numpy()


def squeezed_labels(labels: Labels) -> Labels:
    """Resize labels from (H, W) to (S, S), ignoring the aspect ratio."""
    return nearest(labels, (IMAGE_SIZE, IMAGE_SIZE)).astype(labels.dtype)


def squeezed_mask(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Resize a mask from (H, W) to (S, S), ignoring the aspect ratio."""
    return nearest(mask, (IMAGE_SIZE, IMAGE_SIZE)) == 1


def example_prompt(image: Tensor, mask: npt.NDArray[np.bool_], style: str) -> Tensor:
    """The visual prompt (3, S, S) for an example image (3, S, S) and its object's mask (S, S)."""
    return visual_prompt(image[None], torch.from_numpy(mask)[None], style)[0]


def on_black(image: npt.NDArray[np.uint8], side: int = IMAGE_SIZE) -> Tensor:
    """Place an image in PFENet's geometry: (H, W, 3) to (3, side, side).

    The image goes to the top left of a black square. With ``side`` = S it keeps its size; if its longer side
    exceeds S, it is scaled down, with both sides rounded down to multiples of 8. With another ``side`` it
    covers the same share of the square, so that predictions map back in the same way.
    """
    height, width = (max(1, round(fitted * side / IMAGE_SIZE)) for fitted in _fitting(*image.shape[:2]))
    black = np.zeros((1, 1, 3), np.uint8)
    square = pixels(black, (1, 1)).expand(3, side, side).clone()
    square[:, :height, :width] = pixels(image, (height, width))
    return square


def mask_on_black(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask for ``on_black``: (H, W) to (S, S)."""
    height, width = _fitting(*mask.shape)
    square = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
    square[:height, :width] = nearest(mask, (height, width)) == 1
    return square


def _fitting(height: int, width: int) -> tuple[int, int]:
    """Height and width of the image within (S, S)."""
    longer = max(height, width)
    if longer <= IMAGE_SIZE:
        return height, width
    ratio = IMAGE_SIZE / longer
    new = (IMAGE_SIZE, int(width * ratio)) if height >= width else (int(height * ratio), IMAGE_SIZE)
    return max(8, new[0] // 8 * 8), max(8, new[1] // 8 * 8)
