"""Images and masks as CLIPSeg's benchmarks resize them, each in its own way.

In floating point and without rounding between steps, unlike ``pipeline.files.images.fit``: published numbers
are reproduced to the digit only that way.

Shapes: H W pixels of an image's own size, S = 352.
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
    """Bilinear resize and ImageNet statistics: uint8 RGB (H, W, 3) to fp32 (3, *size)."""
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    # PyTorch does not take both options; antialiasing has no aligned corners.
    x = F.interpolate(x, size, mode="bilinear", align_corners=align_corners, antialias=antialias)
    return normalize(x)[0]


def nearest(labels: npt.NDArray[np.generic], size: tuple[int, int]) -> npt.NDArray[np.float32]:
    """Nearest neighbour as in PyTorch and OpenCV; ids up to 2**24 are exact."""
    x = torch.from_numpy(labels.astype(np.float32))[None, None]
    return F.interpolate(x, size, mode="nearest")[0, 0].numpy()


def squeezed_labels(labels: Labels) -> Labels:
    """(H, W) to (S, S)."""
    return nearest(labels, (IMAGE_SIZE, IMAGE_SIZE)).astype(labels.dtype)


def squeezed_mask(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(H, W) to (S, S)."""
    return nearest(mask, (IMAGE_SIZE, IMAGE_SIZE)) == 1


def example_prompt(image: Tensor, mask: npt.NDArray[np.bool_], style: str) -> Tensor:
    """The visual prompt of an example (3, S, S) with the mask of its object (S, S)."""
    return visual_prompt(image[None], torch.from_numpy(mask)[None], style)[0]


def on_black(image: npt.NDArray[np.uint8], side: int = IMAGE_SIZE) -> Tensor:
    """PFENet's geometry: (H, W, 3) to (3, side, side).

    The image goes to the top left of a black square. With ``side`` S it keeps its size, or is scaled down if
    its longer side exceeds S, both sides rounded down to multiples of 8. With another ``side`` it covers the
    same share of the square, so that predictions map back in the same way.
    """
    height, width = (max(1, round(own * side / IMAGE_SIZE)) for own in _fitting(*image.shape[:2]))
    black = np.zeros((1, 1, 3), np.uint8)
    square = pixels(black, (1, 1)).expand(3, side, side).clone()
    square[:, :height, :width] = pixels(image, (height, width))
    return square


def mask_on_black(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The mask to ``on_black``: (H, W) to (S, S)."""
    height, width = _fitting(*mask.shape)
    square = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.bool_)
    square[:height, :width] = nearest(mask, (height, width)) == 1
    return square


def _fitting(height: int, width: int) -> tuple[int, int]:
    """Of the image within (S, S)."""
    longer = max(height, width)
    if longer <= IMAGE_SIZE:
        return height, width
    ratio = IMAGE_SIZE / longer
    new = (IMAGE_SIZE, int(width * ratio)) if height >= width else (int(height * ratio), IMAGE_SIZE)
    return max(8, new[0] // 8 * 8), max(8, new[1] // 8 * 8)
