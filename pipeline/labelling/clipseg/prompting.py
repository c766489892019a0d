"""CLIPSeg prompt by prompt: from words and pictures to conditionals, from an image to probability maps.

Shapes: B images, P prompts, E joint embedding, H W pixels, S side of a visual prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from models.clip.templates import fill, get_templates
from models.clipseg.decoder import ClipSeg, mix, normalize
from models.clipseg.visual_prompts import STYLES, VisualPrompt, visual_prompt
from models.device import DTYPES, best_device, native_precision
from models.errors import FailedWork, WrongUse, did_you_mean
from models.maskclip import IMAGENET_MEAN, IMAGENET_STD, per_channel
from pipeline.files.images import MAX_PIXELS, ImageSettings, fit
from pipeline.labelling.clipseg.model import VISUAL_PROMPT, ClipSegWeights
from pipeline.labelling.clipseg.options import PREFIXES, ClipSegOptions
from pipeline.labelling.clipseg.pictures import Picture, read_picture
from pipeline.ontology.ontology import Ontology

Style = Callable[[Tensor, Tensor], Tensor]
"""Normalised images (B, 3, H, W) and masks (B, H, W) to visual prompts (B, 3, S, S)."""

_SIMPLE_STYLES = ("highlight", "highlight2", "overlay", "image_only")
STYLE_NAMES = (*STYLES, *_SIMPLE_STYLES)
_KNOBS = tuple(field.name for field in dataclasses.fields(VisualPrompt))


# --- prompts ------------------------------------------------------------------------------------------------


def parse_style(text: str, size: int | None = None) -> Style:
    """Parse a style of visual prompts: a name and optional changes.

    Args:
        text: one of ``STYLE_NAMES``, optionally followed by values for fields of ``VisualPrompt``:
            ``crop_blur_highlight352,blur=5,context=0.5``; ``context=none`` disables cropping.
        size: S of a style that crops, unless ``text`` sets it; None keeps the style's own.

    Raises:
        MaskMillError: ``setting_invalid`` for an unknown name, field or value.
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
            f"{did_you_mean(name, STYLE_NAMES)}Use one of {', '.join(STYLE_NAMES)}.",
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
    """The visual prompt of an example, fp32 (3, S, S), ImageNet-normalised.

    As in the reference, the image is first resized to a square, its mask by nearest neighbour, and the style
    is applied to the square; its blur is in pixels of the square. Without a mask, the square is the prompt.

    Args:
        picture: the example.
        style: from ``parse_style``.
        size: side of the square.
    """
    image = torch.from_numpy(np.ascontiguousarray(picture.image)).permute(2, 0, 1)[None]
    pixels = normalize(image, size)
    if picture.mask is None:
        return pixels[0]
    mask = torch.from_numpy(picture.mask.astype(np.float32))[None, None]
    mask = F.interpolate(mask, (size, size), mode="nearest")[:, 0]
    if not bool(mask.any()):  # an object too thin for nearest-neighbour sampling
        mask = F.adaptive_max_pool2d(torch.from_numpy(picture.mask.astype(np.float32))[None], size)
    return style(pixels, mask)[0]


def shown_pixels(prompt: Tensor) -> NDArray[np.uint8]:
    """A visual prompt (3, S, S) as a displayable image, uint8 (S, S, 3)."""
    mean, std = per_channel(IMAGENET_MEAN, prompt), per_channel(IMAGENET_STD, prompt)
    pixels = ((prompt * std + mean).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(1, 2, 0).cpu().numpy()


@torch.no_grad()
def embed_words(model: ClipSeg, words: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Conditionals fp32 (P, E) on the model's device: the mean over the templates per word, not normalised.

    Raises:
        MaskMillError: ``prompt_invalid``.
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
    """Conditionals fp32 (P, E) of prompts of any kind, in order.

    Args:
        model: must include its text tower if there are words.
        prompts: each is words, a visual prompt (3, S, S), or both, which are mixed.
        templates: templates for words; their embeddings are averaged.
        text_weight: weight of the words in a mixed prompt.

    Raises:
        MaskMillError: ``prompt_invalid``.
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


@torch.no_grad()
def class_conditionals(model: ClipSeg, ontology: Ontology, class_id: int, options: ClipSegOptions) -> Tensor:
    """The conditionals of a class, fp32 (P, E).

    Without examples, there is one prompt per word. With examples, there is one per example: the picture's
    embedding, mixed with the mean embedding of the words (``text_weight``). A class that merges by mean has
    one prompt, the mean.

    Raises:
        MaskMillError: ``prompt_invalid``; as ``read_picture``; ``image_invalid`` if a picture has
            changed since the ontology was made.
    """
    prefix = options.prefix
    templates = get_templates(ontology.templates) if prefix == "ontology" else PREFIXES[prefix]
    examples = ontology.examples()[class_id]
    for example in examples:
        example.check_unchanged()
    embedded = None
    if not examples or options.text_weight:
        embedded = embed_words(model, ontology.prompts()[class_id], templates)
    if examples:
        style = parse_style(options.visual_prompt, options.example_size)
        pictures = [read_picture(example.image, example.mask) for example in examples]
        shown = [visual_prompt_of(picture, style, options.example_size) for picture in pictures]
        of_pictures = embed_pictures(model, shown)
        embedded = (
            of_pictures if embedded is None else mix(embedded.mean(0), of_pictures, options.text_weight)
        )
    assert embedded is not None, "a class has a name"
    return embedded.mean(0, keepdim=True) if ontology.merges()[class_id] == "mean" else embedded


# --- images -------------------------------------------------------------------------------------------------


def network_pixels(images: Tensor, model: ClipSeg) -> Tensor:
    """Normalise uint8 (B, 3, H, W) images at network size; the result has the model's device and dtype."""
    return normalize(images.to(model.clip.device)).to(model.clip.dtype)


def check_finite(logits: Tensor) -> None:
    """Check logits for NaN and infinite values.

    Raises:
        MaskMillError: ``labelling_failed``.
    """
    if not bool(torch.isfinite(logits).all()):
        raise FailedWork(
            "labelling_failed",
            "The logits hold NaN or infinite values.",
            "float16 overflows with some weights: use bfloat16 or float32. Else the weights are damaged.",
        )


def stretched(maps: Tensor, size: tuple[int, int], top: int = 0, bottom: int | None = None) -> Tensor:
    """Rows ``top`` to ``bottom`` of ``F.interpolate(maps, size, bilinear, align_corners=False)``.

    Args:
        maps: float (K, h, w).
        size: (H, W) of the whole.
        top: first row.
        bottom: one past the last row; None is H.

    Returns:
        (K, bottom - top, W).
    """
    height, width = size
    source = maps.shape[1]
    wanted = torch.arange(top, height if bottom is None else bottom, device=maps.device, dtype=torch.float64)
    position = ((wanted + 0.5) * (source / height) - 0.5).clamp_(min=0)
    low = position.floor().long().clamp_(max=source - 1)
    part = (position - low).to(maps.dtype)[:, None]
    high = (low + 1).clamp_(max=source - 1)
    between = torch.lerp(maps[:, low], maps[:, high], part)
    return F.interpolate(between[None], (len(wanted), width), mode="bilinear", align_corners=False)[0]


def levels(probability: NDArray[np.float32]) -> NDArray[np.uint8]:
    """round(255 p), the format in which probability maps are shown and stored."""
    return np.rint(probability * 255).astype(np.uint8)


class Finder:
    """CLIPSeg with a probability map for each prompt, for ``segment``, the page and MLflow.

    Args:
        weights: which CLIPSeg; loaded on first use of ``model``.
        precision: ``auto``, ``fp32``, ``bf16`` or ``fp16``.
        size: side of the square that images are resized to; None is the training size.
        keep_ratio: keep the aspect ratio: the short side becomes ``size``, the long one at most 4 times it.
        example_size: side of the square that examples are resized to; None is the training size.
        visual_prompt: treatment of an example with a mask; see ``parse_style``.

    Raises:
        MaskMillError: ``setting_invalid`` for the visual prompt; as ``ClipSegWeights.sizes``.
    """

    def __init__(
        self,
        weights: ClipSegWeights,
        *,
        precision: str = "auto",
        size: int | None = None,
        keep_ratio: bool = False,
        example_size: int | None = None,
        visual_prompt: str = VISUAL_PROMPT,
    ) -> None:
        self._weights = weights
        self._device = best_device()
        self.precision = native_precision(self._device) if precision == "auto" else precision
        trained, trained_example = weights.sizes()
        self.size, self.example_size = size or trained, example_size or trained_example
        self.images = ImageSettings(
            scale=(4 * self.size if keep_ratio else self.size, self.size),
            keep_ratio=keep_ratio,
            resize="antialias",
            max_pixels=MAX_PIXELS,
        )
        self._style = parse_style(visual_prompt, self.example_size)

    @cached_property
    def model(self) -> ClipSeg:
        """The model, loaded on first use.

        Raises:
            MaskMillError: as ``ClipSegWeights.load``.
        """
        return self._weights.load(device=self._device, dtype=DTYPES[self.precision])

    def show(self, picture: Picture) -> Tensor:
        """The visual prompt of an example, fp32 (3, S, S); does not load the model."""
        return visual_prompt_of(picture, self._style, self.example_size)

    def embed(
        self,
        prompts: Sequence[tuple[str | None, Tensor | None]],
        templates: Sequence[str] = ("{}",),
        *,
        text_weight: float = 0.5,
    ) -> Tensor:
        """Conditionals (P, E); see ``embed_prompts``."""
        return embed_prompts(self.model, prompts, templates, text_weight=text_weight)

    @torch.inference_mode()
    def find(
        self, image: NDArray[np.uint8], conditionals: Tensor, size: tuple[int, int]
    ) -> Iterator[NDArray[np.float32]]:
        """Compute the probability of each prompt at each pixel.

        Args:
            image: uint8 (h, w, 3) RGB.
            conditionals: (P, E), from ``embed``.
            size: (H, W) of the maps.

        Yields:
            P maps, fp32 (H, W) in [0, 1].

        Raises:
            MaskMillError: ``labelling_failed``.
        """
        small = torch.from_numpy(np.array(fit(image, self.images))).permute(2, 0, 1)
        logits = self.model(network_pixels(small[None], self.model), conditionals)[0]
        check_finite(logits)
        for p in logits.float().sigmoid():
            yield stretched(p[None], size)[0].clamp(0, 1).cpu().numpy()
