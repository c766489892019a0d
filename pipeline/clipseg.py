"""CLIPSeg in use: from names to a model, and from words and pictures to what it is asked with.

Shapes: B images, P prompts, E joint embedding, H W pixels, S side of a visual prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.clip import Towers, load_clip
from models.clipseg import ClipSeg, ClipSegConfig, build_clipseg, normalize
from models.clipseg_weights import load_clipseg
from models.errors import MaskMillError
from models.maskclip import IMAGENET_MEAN, IMAGENET_STD
from models.templates import fill
from models.visual_prompts import STYLES, VisualPrompt, visual_prompt
from pipeline.clipseg_options import CLIP
from pipeline.images import ImageError, decode, fetch

Style = Callable[[Tensor, Tensor], Tensor]
"""Normalised images (B, 3, H, W) and masks (B, H, W) to visual prompts (B, 3, S, S)."""

_SIMPLE_STYLES = ("highlight", "highlight2", "overlay", "image_only")
STYLE_NAMES = (*STYLES, *_SIMPLE_STYLES)
_KNOBS = tuple(field.name for field in dataclasses.fields(VisualPrompt))
_SCHEMES = ("hf-hub:", "local-dir:")


# --- the model ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipSegWeights:
    """Which CLIPSeg; picklable, so that every worker can load it.

    Attributes:
        weights: a decoder file, a folder in Hugging Face's layout, a hub name, or ``random:SEED`` for a
            decoder that proves the path and nothing else.
        clip: NAME:PRETRAINED of the CLIP beneath a decoder alone; a folder or hub name brings its own.
        extract_layers: None takes what the weights say.
    """

    weights: str
    clip: str = CLIP
    extract_layers: tuple[int, ...] | None = None

    def load(
        self,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        towers: Towers = "both",
    ) -> ClipSeg:
        """The model in evaluation mode.

        Args:
            device: where it goes.
            dtype: of CLIP and decoder.
            towers: ``visual`` where no text will be embedded.

        Raises:
            MaskMillError: as ``load_clipseg`` and ``load_clip``.
        """
        seed = self.weights.removeprefix("random:")
        is_random = seed != self.weights and seed.isdecimal()
        if not is_random and not Path(self.weights).expanduser().is_file():
            return load_clipseg(self.weights, extract_layers=self.extract_layers, device=device, dtype=dtype)
        name, pretrained = split_clip(self.clip)
        clip = load_clip(name, pretrained, device=device, dtype=dtype, towers=towers)
        if is_random:
            config = ClipSegConfig(extract_layers=self.extract_layers or ClipSegConfig().extract_layers)
            model = build_clipseg(clip, config, seed=int(seed))
            model.decoder.to(dtype)
            return model
        return load_clipseg(self.weights, clip=clip, extract_layers=self.extract_layers, dtype=dtype)


def split_clip(text: str) -> tuple[str, str | None]:
    """``NAME:PRETRAINED`` as ``load_clip`` wants it; names of the hub and of folders bring their weights."""
    if text.startswith(_SCHEMES):
        return text, None
    name, _, pretrained = text.partition(":")
    return name, pretrained or None


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
        MaskMillError: ``example_unreadable``; ``mask_does_not_fit`` if the sizes differ; ``mask_empty``.
    """
    pixels = _read(image)
    if mask is None:
        return Picture(pixels)
    inside = np.asarray(_read(mask).any(axis=2), np.bool_)
    if inside.shape != pixels.shape[:2]:
        sizes = [f"{shape[1]} x {shape[0]}" for shape in (inside.shape, pixels.shape)]
        raise MaskMillError(
            "mask_does_not_fit",
            f"The mask {mask} has {sizes[0]} pixels, and its image {image} has {sizes[1]}.",
            "Give the mask in the image's size.",
        )
    if not inside.any():
        raise MaskMillError(
            "mask_empty", f"The mask {mask} is black everywhere.", "Paint the object in any other colour."
        )
    return Picture(pixels, inside)


def _read(path: str) -> NDArray[np.uint8]:
    try:
        return decode(fetch(path))
    except ImageError as error:
        raise MaskMillError(
            "example_unreadable",
            f"The example {path} cannot be read: {error.message} ({error.code}).",
            "Give a picture such as a JPEG or PNG.",
        ) from error


def parse_style(text: str) -> Style:
    """A way to make visual prompts, by name and changes to it.

    Args:
        text: one of ``STYLE_NAMES``, optionally followed by values for fields of ``VisualPrompt``:
            ``crop_blur_highlight352,blur=5,context=0.5``; ``context=none`` does not crop.

    Raises:
        MaskMillError: ``visual_prompt_unknown``; ``setting_invalid`` for a field or value.
    """
    name, *changes = (part.strip() for part in text.split(","))
    if name in _SIMPLE_STYLES:
        if changes:
            raise MaskMillError(
                "setting_invalid",
                f"The visual prompt {name} has nothing to set, and {', '.join(changes)} is given.",
                f"Only these have: {', '.join(STYLES)}.",
            )
        return partial(visual_prompt, mode=name)
    if name not in STYLES:
        raise MaskMillError(
            "visual_prompt_unknown",
            f"There is no visual prompt {name!r}.",
            f"Use one of {', '.join(STYLE_NAMES)}.",
        )
    return dataclasses.replace(STYLES[name], **dict(_knob(change) for change in changes))


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
    raise MaskMillError(
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
        raise MaskMillError(
            "scores_not_finite",
            "The logits hold NaN or infinite values.",
            "float16 overflows with some weights: use bfloat16 or float32. Else the weights are damaged.",
        )
