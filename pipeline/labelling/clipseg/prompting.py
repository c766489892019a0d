"""CLIPSeg in use: from words and pictures to what it is asked with, and from an image to probabilities.

Shapes: B images, P prompts, E joint embedding, H W pixels, S side of a visual prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.clip.templates import fill
from models.clipseg.decoder import ClipSeg, mix, normalize
from models.clipseg.visual_prompts import STYLES, VisualPrompt, visual_prompt
from models.errors import FailedWork, MaskMillError, WrongUse
from models.maskclip import IMAGENET_MEAN, IMAGENET_STD
from pipeline.files.images import ImageError, decode, fetch, resize, target_size

Style = Callable[[Tensor, Tensor], Tensor]
"""Normalised images (B, 3, H, W) and masks (B, H, W) to visual prompts (B, 3, S, S)."""

_SIMPLE_STYLES = ("highlight", "highlight2", "overlay", "image_only")
STYLE_NAMES = (*STYLES, *_SIMPLE_STYLES)
_KNOBS = tuple(field.name for field in dataclasses.fields(VisualPrompt))


# --- prompts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Picture:
    """An example.

    Attributes:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W), true on the object; None where the whole image shows it.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_] | None = None


def read_picture(image: str, mask: str | None = None) -> Picture:
    """Read an example.

    Args:
        image: path or URI.
        mask: of an image of the same size; what is not black is the object.

    Raises:
        MaskMillError: as ``decode_picture``.
    """
    return decode_picture(
        _fetched(image), None if mask is None else _fetched(mask), names=(image, mask or "")
    )


def decode_picture(
    image: bytes, mask: bytes | None = None, *, names: tuple[str, str] = ("given", "given")
) -> Picture:
    """An example from the bytes of its files.

    Args:
        image: of a picture.
        mask: of one of the same size; what is not black is the object.
        names: what to call the two where something is wrong with them.

    Raises:
        MaskMillError: ``example_unreadable``; ``mask_invalid`` if the sizes differ; ``mask_invalid``.
    """
    pixels = _decoded(image, names[0])
    if mask is None:
        return Picture(pixels)
    inside = np.asarray(_decoded(mask, names[1]).any(axis=2), np.bool_)
    if inside.shape != pixels.shape[:2]:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (inside.shape, pixels.shape)]
        raise WrongUse(
            "mask_invalid",
            f"The mask {names[1]} has {sizes[0]} pixels, and its image {names[0]} has {sizes[1]}.",
            "Give the mask in the image's size.",
        )
    if not inside.any():
        raise WrongUse(
            "mask_invalid",
            f"The mask {names[1]} is black everywhere.",
            "Paint the object in any other colour.",
        )
    return Picture(pixels, inside)


def _fetched(path: str) -> bytes:
    try:
        return fetch(path)
    except ImageError as error:
        raise _unreadable(path, error) from error


def _decoded(data: bytes, name: str) -> NDArray[np.uint8]:
    try:
        return decode(data)
    except ImageError as error:
        raise _unreadable(name, error) from error


def _unreadable(name: str, error: ImageError) -> MaskMillError:
    return WrongUse(
        "example_unreadable",
        f"The example {name} cannot be read: {error.message} ({error.code}).",
        "Give a picture such as a JPEG or PNG.",
    )


def parse_style(text: str, size: int | None = None) -> Style:
    """A way to make visual prompts, by name and changes to it.

    Args:
        text: one of ``STYLE_NAMES``, optionally followed by values for fields of ``VisualPrompt``:
            ``crop_blur_highlight352,blur=5,context=0.5``; ``context=none`` does not crop.
        size: S of a style that crops, unless ``text`` sets it; None is the style's own.

    Raises:
        MaskMillError: ``setting_invalid``; ``setting_invalid`` for a field or value.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name in _SIMPLE_STYLES:
        if changes:
            raise WrongUse(
                "setting_invalid",
                f"The visual prompt {name} has nothing to set, and {', '.join(changes)} is given.",
                f"Only these have: {', '.join(STYLES)}.",
            )
        return partial(visual_prompt, mode=name)
    if name not in STYLES:
        raise WrongUse(
            "setting_invalid",
            f"There is no visual prompt {name!r}.",
            f"Use one of {', '.join(STYLE_NAMES)}.",
        )
    own = {} if size is None else {"size": size}
    return dataclasses.replace(STYLES[name], **own | dict(_knob(change) for change in changes))


def _knob(change: str) -> tuple[str, Any]:
    key, _, value = change.partition("=")
    try:
        if key == "paint":
            return key, value
        if key == "size":
            return key, int(value)
        if key == "context" and value.lower() == "none":
            return key, None
        if key in _KNOBS:
            return key, float(value)
    except ValueError:
        pass
    raise WrongUse(
        "setting_invalid",
        f"{change!r} cannot be set for a visual prompt.",
        f"Write NAME=NUMBER with one of {', '.join(_KNOBS)}.",
    )


def visual_prompt_of(picture: Picture, style: Style, size: int) -> Tensor:
    """What CLIP gets to see of an example, fp32 (3, S, S), ImageNet-normalised.

    As in the reference the image is first squeezed to a square, its mask by nearest neighbour, and the style
    works on that; its blur is in pixels of the square. Without a mask the squeezed image is all there is.

    Args:
        picture: the example.
        style: of ``parse_style``.
        size: side of the square.
    """
    image = torch.from_numpy(np.ascontiguousarray(picture.image)).permute(2, 0, 1)[None]
    pixels = normalize(image, size)
    if picture.mask is None:
        return pixels[0]
    mask = torch.from_numpy(picture.mask.astype(np.float32))[None, None]
    mask = F.interpolate(mask, (size, size), mode="nearest")[:, 0]
    if not bool(mask.any()):  # an object thinner than the steps of the sampling
        mask = F.adaptive_max_pool2d(torch.from_numpy(picture.mask.astype(np.float32))[None], size)
    return style(pixels, mask)[0]


def shown_pixels(prompt: Tensor) -> NDArray[np.uint8]:
    """A visual prompt (3, S, S) as people see it, uint8 (S, S, 3)."""
    mean, std = (prompt.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    pixels = ((prompt * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


@torch.no_grad()
def embed_words(model: ClipSeg, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Conditionals fp32 (P, E) on the model's device: per word the mean over the templates, not normalised.

    Raises:
        MaskMillError: ``prompt_too_long``.
    """
    filled = [text for word in words for text in fill(templates, word)]
    return model.encode_text(filled).unflatten(0, (len(words), len(templates))).mean(1)


@torch.no_grad()
def embed_pictures(model: ClipSeg, prompts: Sequence[Tensor]) -> Tensor:
    """Conditionals fp32 (P, E) of visual prompts (3, S, S) each; S may differ between them."""
    clip = model.clip
    return torch.cat(
        [model.encode_prompt_images(prompt[None].to(clip.device, clip.dtype)) for prompt in prompts]
    )


@torch.no_grad()
def embed_prompts(
    model: ClipSeg,
    prompts: Sequence[tuple[str | None, Tensor | None]],
    templates: Sequence[str] = ("{}",),
    *,
    text_weight: float = 0.5,
) -> Tensor:
    """Conditionals fp32 (P, E) of prompts of every kind, in their order.

    Args:
        model: see there.
        prompts: of each its words, its visual prompt (3, S, S), or both, which are mixed.
        templates: put around words; their mean embedding is used.
        text_weight: share of the words where there are both.

    Raises:
        MaskMillError: ``prompt_too_long``.
    """
    words = [text for text, _ in prompts if text is not None]
    pictures = [picture for _, picture in prompts if picture is not None]
    of_words = iter(embed_words(model, words, templates) if words else ())
    of_pictures = iter(embed_pictures(model, pictures) if pictures else ())
    rows = []
    for text, picture in prompts:
        if text is not None and picture is not None:
            rows.append(mix(next(of_words), next(of_pictures), text_weight))
        else:
            rows.append(next(of_words if picture is None else of_pictures))
    return torch.stack(rows)


# --- images -------------------------------------------------------------------------------------------------


def network_pixels(images: Tensor, model: ClipSeg) -> Tensor:
    """uint8 (B, 3, H, W) at network size as the model reads them: normalised, on its device, in its dtype."""
    return normalize(images.to(model.clip.device)).to(model.clip.dtype)


def check_finite(logits: Tensor) -> None:
    """Refuse NaN and infinite logits.

    Raises:
        MaskMillError: ``scores_not_finite``.
    """
    if not bool(torch.isfinite(logits).all()):
        raise FailedWork(
            "scores_not_finite",
            "The logits hold NaN or infinite values.",
            "float16 overflows with some weights: use bfloat16 or float32. Else the weights are damaged.",
        )


@torch.inference_mode()
def probability_maps(
    model: ClipSeg, image: NDArray[np.uint8], conditionals: Tensor, *, size: int, keep_ratio: bool = False
) -> Tensor:
    """What is where in an image, fp32 (P, h, w) in [0, 1] at network size.

    ``pipeline.labelling.clipseg.labeller.stretched`` brings it to the image's size.

    Args:
        model: see there.
        image: uint8 (H, W, 3) RGB.
        conditionals: (P, E), what is asked.
        size: side of the square that the image is squeezed to.
        keep_ratio: instead its short side becomes ``size``, the long one at most four times that.

    Raises:
        MaskMillError: ``scores_not_finite``.
    """
    scale = (4 * size, size) if keep_ratio else (size, size)
    network = target_size(image.shape[0], image.shape[1], scale=scale, keep_ratio=keep_ratio)
    small = torch.from_numpy(np.array(resize(image, network, method="antialias"))).permute(2, 0, 1)
    logits = model(network_pixels(small[None], model), conditionals)[0]
    check_finite(logits)
    return logits.float().sigmoid()
