"""Visual prompts: combine an example image and its object mask into one image for CLIP.

CLIPSeg (arXiv 2112.10003, §3.3 and Table 2) emphasises the object by darkening and blurring the background
and by cropping. As in the reference, this happens on ImageNet-normalised pixels, so darkening moves the
background towards the mean colour, a grey, not towards black; padding is that grey too.

Shapes: B batch, H W pixels, S side of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import WrongUse, did_you_mean
from models.maskclip import IMAGENET_MEAN, IMAGENET_STD, per_channel

BLUR_KERNEL = 15
DYE = (1.0, 0.2, 0.2)  # red, multiplied with the grey image inside the mask
OUTLINE = (1.0, 0.0, 0.0)
OUTLINE_WIDTH = 5

Paint = Literal["none", "dye", "outline"]


@dataclass(frozen=True)
class VisualPrompt:
    """One image operation: out = image * m + background * blur(image) * (1 - m), then the crop.

    Attributes:
        blur: sigma in pixels of the 15 x 15 Gaussian on the background; 0 disables it.
        background: factor on the background's normalised values; 0 gives the mean colour.
        context: crop to the mask's bounding box, each side extended by this share of the box's extent in that
            direction; None does not crop.
        size: side that a crop is resized to, by nearest neighbour.
        shift: constant added at the end.
        paint: ``dye`` makes the image grey and the object red; ``outline`` draws a red contour 5 pixels wide.
    """

    blur: float = 0.0
    background: float = 1.0
    context: float | None = None
    size: int = 224
    shift: float = 0.0
    paint: Paint = "none"

    def __post_init__(self) -> None:
        if self.blur < 0 or self.size < 1 or (self.context is not None and self.context < 0):
            raise WrongUse(
                "setting_invalid",
                f"A visual prompt cannot have blur {self.blur}, context {self.context} and size {self.size}.",
                "Use blur and context of at least 0 and a size of at least 1.",
            )
        if self.paint not in ("none", "dye", "outline"):
            raise WrongUse("setting_invalid", f"paint cannot be {self.paint!r}.", "Use none, dye or outline.")
        if self.paint != "none" and self.context is not None:
            raise WrongUse(
                "setting_invalid", f"A crop has no {self.paint}.", "Leave out either paint or context."
            )

    def __call__(self, images: Tensor, masks: Tensor) -> Tensor:
        """Make prompts.

        Args:
            images: float (B, 3, H, W), ImageNet-normalised; not changed.
            masks: (B, H, W), 1 on the object and 0 elsewhere, any dtype. With an empty mask a crop keeps the
                whole image; to everything else it means that there is no object.

        Returns:
            (B, 3, H, W), or (B, 3, size, size) if it crops, in the images' dtype.

        Raises:
            MaskMillError: ``mask_invalid`` if image and mask differ in size.
        """
        m = _inside(images, masks)
        if self.paint == "dye":
            return _dyed(images, m, self.background) + self.shift
        behind = gaussian_blur(images, self.blur) if self.blur > 0 else images
        out = images * m + self.background * behind * (1 - m)
        if self.context is not None:
            out = torch.cat(
                [
                    object_crop(image[None], mask, self.context, self.size)
                    for image, mask in zip(out, masks, strict=True)
                ]
            )
        if self.paint == "outline":
            out = _outlined(out, masks)
        return out + self.shift


def visual_prompt(
    images: Tensor,
    masks: Tensor,
    mode: str,
    *,
    size: int = 224,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Make visual prompts by the reference's name of the mode.

    Args:
        images: float (B, 3, H, W), ImageNet-normalised; not changed.
        masks: (B, H, W), 1 on the object and 0 elsewhere.
        mode: one of ``MODES``; CLIPSeg was trained with ``crop_blur_highlight352``.
        size: output side of ``crop`` and ``crop_blur_highlight``.
        generator: for ``blur_highlight_random``, which draws for each image.

    Returns:
        (B, 3, H, W), or (B, 3, S, S) from a mode that crops; (B, 4, H, W) from ``concat``, which no CLIP can
        read.

    Raises:
        MaskMillError: ``setting_invalid``; ``mask_invalid``.
    """
    if mode not in MODES:
        raise WrongUse(
            "setting_invalid",
            f"There is no visual prompt {mode!r}.",
            f"{did_you_mean(mode, MODES)}Use one of {', '.join(MODES)}.",
        )
    if mode == "blur_highlight_random":
        prompts = [_random_highlight(generator) for _ in images]
        return torch.cat(
            [
                prompt(image[None], mask[None])
                for prompt, image, mask in zip(prompts, images, masks, strict=True)
            ]
        )
    if mode in ("crop", "crop_blur_highlight"):
        return replace(STYLES[mode], size=size)(images, masks)
    if mode in STYLES:
        return STYLES[mode](images, masks)
    return _SIMPLE[mode](images, _inside(images, masks))


STYLES: dict[str, VisualPrompt] = {
    "blur_highlight": VisualPrompt(blur=1, background=0.5, shift=-0.01),
    "blur3_highlight": VisualPrompt(blur=3, background=0.5, shift=-0.01),
    "blur3_highlight01": VisualPrompt(blur=3, background=0.1, shift=-0.01),
    "crop": VisualPrompt(blur=1, context=0.1),
    "crop_blur_highlight": VisualPrompt(blur=3, background=0.1, context=0.1),
    "crop_blur_highlight352": VisualPrompt(blur=3, background=0.1, context=0.1, size=352),
}
"""The reference's modes that are a fixed ``VisualPrompt``."""

TABLE2: dict[str, VisualPrompt] = {
    "image": VisualPrompt(),
    "dye": VisualPrompt(paint="dye"),
    "outline": VisualPrompt(paint="outline"),
    "intensity50": VisualPrompt(background=0.5),
    "intensity10": VisualPrompt(background=0.1),
    "intensity0": VisualPrompt(background=0.0),
    "blur": VisualPrompt(blur=3),
    "blur_intensity10": VisualPrompt(blur=3, background=0.1),
    "crop_large_context": VisualPrompt(context=0.5),
    "crop": VisualPrompt(context=0.1),
    "crop_blur": VisualPrompt(blur=3, context=0.5),
    "crop_intensity10": VisualPrompt(blur=3, background=0.1),
    "crop_blur_intensity10": VisualPrompt(blur=3, background=0.1, context=0.1),
}
"""The image operations of the paper's Table 2 as its notebook runs them: "crop & blur" has the large context,
and "crop & intensity 10 %" does not crop, so it equals "blur & intensity 10 %"."""


def _random_highlight(generator: torch.Generator | None) -> VisualPrompt:
    blur = int(torch.randint(0, 3, (), generator=generator))
    background = 0.1 + 0.8 * float(torch.rand((), generator=generator))
    return VisualPrompt(blur=blur, background=background, shift=-0.01)


_SIMPLE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "highlight": lambda image, m: 0.85 * image * m + 0.15 * image,
    "highlight2": lambda image, m: (image / 2 + 0.1) * m + 0.3 * image / 2,
    "overlay": lambda image, m: image * m,
    "shape": lambda image, m: m.expand_as(image).clone(),
    "concat": lambda image, m: torch.cat([image, m], dim=1),
    "image_only": lambda image, m: image.clone(),
    "image_black": lambda image, m: torch.zeros_like(image),
}
MODES: tuple[str, ...] = (*STYLES, "blur_highlight_random", *_SIMPLE)
"""All modes of ``visual_prompt``. The reference's ``separate`` modes are missing: they pass on image and mask
unchanged or blank, and make no prompt."""


def gaussian_blur(images: Tensor, sigma: float) -> Tensor:
    """Blur (B, C, H, W) with a 15 x 15 Gaussian; the border is reflected as by OpenCV's REFLECT_101.

    Args:
        images: float.
        sigma: in pixels, above 0.
    """
    reach = BLUR_KERNEL // 2
    exact = torch.promote_types(images.dtype, torch.float32)
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float64)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).to(images.device, exact)
    x = images.to(exact)
    # Indexing instead of torch's reflect padding, which rejects images smaller than the reach.
    x = x[..., _mirrored(images.shape[-2], reach, images.device), :]
    x = x[..., _mirrored(images.shape[-1], reach, images.device)]
    flat = x.flatten(0, 1)[:, None]
    flat = F.conv2d(F.conv2d(flat, kernel[None, None, :, None]), kernel[None, None, None, :])
    return flat[:, 0].unflatten(0, images.shape[:2]).to(images.dtype)


def _mirrored(length: int, reach: int, device: torch.device) -> Tensor:
    """Indices -reach .. length + reach - 1, reflected into 0 .. length - 1."""
    index = torch.arange(-reach, length + reach, device=device)
    if length == 1:
        return torch.zeros_like(index)
    period = 2 * (length - 1)
    index = index % period
    return torch.minimum(index, period - index)


def object_crop(image: Tensor, mask: Tensor, context: float, size: int) -> Tensor:
    """Crop to an object, pad to a square with zeros, and resize by nearest neighbour.

    The crop is centred; an odd pixel of padding goes right or below.

    Args:
        image: (1, C, H, W).
        mask: (H, W); an empty one keeps the whole image.
        context: extend each side of the box by this share of its extent, clipped at the image's border.
        size: S.

    Returns:
        (1, C, S, S).
    """
    top, bottom = _extended(mask.any(1), context)
    left, right = _extended(mask.any(0), context)
    cut = image[..., top:bottom, left:right]
    height, width = bottom - top, right - left
    side = max(height, width)
    above, before = (side - height) // 2, (side - width) // 2
    cut = F.pad(cut, (before, side - width - before, above, side - height - above))
    return F.interpolate(cut, size=(size, size), mode="nearest")


def _extended(present: Tensor, context: float) -> tuple[int, int]:
    """Extended range [first, last) of a box along an axis.

    The reference clips both axes at the image's height, which is right for its square images; here each axis
    has its own limit.
    """
    where = present.nonzero().flatten()
    length = len(present)
    first, last = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, length)
    margin = context * (last - first)
    return max(0, math.floor(first - margin)), min(length, math.floor(last + margin))


def _inside(images: Tensor, masks: Tensor) -> Tensor:
    """The masks as (B, 1, H, W) in the images' dtype."""
    if masks.shape != (images.shape[0], *images.shape[-2:]):
        raise WrongUse(
            "mask_invalid",
            f"Masks {tuple(masks.shape)} do not belong to images {tuple(images.shape)}.",
            "Give one mask per image, in the image's size.",
        )
    return masks[:, None].to(images)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    return per_channel(IMAGENET_MEAN, images), per_channel(IMAGENET_STD, images)


def _dyed(images: Tensor, m: Tensor, background: float) -> Tensor:
    mean, std = _statistics(images)
    weights = per_channel((0.299, 0.587, 0.114), images)
    grey = ((images * std + mean).clamp(0, 1) * weights).sum(1, keepdim=True)
    red = per_channel(DYE, images)
    return (red * grey * m + background * grey * (1 - m) - mean) / std


def _outlined(images: Tensor, masks: Tensor) -> Tensor:
    import cv2
    import numpy as np

    mean, std = _statistics(images)
    lines = []
    for mask in masks:
        line = np.zeros(tuple(mask.shape), np.uint8)
        object_ = (mask != 0).to(torch.uint8).cpu().numpy()
        contours, _ = cv2.findContours(object_, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        cv2.drawContours(line, contours, -1, 1, thickness=OUTLINE_WIDTH)
        lines.append(torch.from_numpy(line))
    drawn = torch.stack(lines)[:, None].to(images)
    red = per_channel(OUTLINE, images)
    return (red * drawn + (images * std + mean).clamp(0, 1) * (1 - drawn) - mean) / std
