"""Settings of CLIPSeg as a Labeller. Imports nothing heavy, because recipes import it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from models.settings import Settings

RELEASED = "CIDAS/clipseg-rd64-refined"
"""The released weights, used by default."""
CLIP = "ViT-B-16-quickgelu:openai"
"""The CLIP that all released decoders were trained on."""

Prefix = Literal["plain", "fixed", "shuffle", "shuffle+"]
PREFIXES: Mapping[Prefix, tuple[str, ...]] = {
    "plain": ("{}",),
    "fixed": ("a photo of a {}.",),
    "shuffle": ("a photo of a {}.", "a photograph of a {}.", "an image of a {}.", "{}."),
    "shuffle+": (
        "a photo of a {}.", "a photograph of a {}.", "an image of a {}.", "{}.", "a cropped photo of a {}.",
        "a good photo of a {}.", "a photo of one {}.", "a bad photo of a {}.", "a photo of the {}.",
    ),
}  # fmt: skip
"""The authors' templates for phrases. Training draws from ``shuffle+``; here, the embeddings of a set are
averaged."""


class ClipSegOptions(Settings):
    """How to prompt CLIPSeg (arXiv 2112.10003) with an ontology, and how to merge the answers."""

    clip: str = CLIP
    """The CLIP under a decoder file: ``NAME:PRETRAINED``."""
    extract_layers: tuple[int, ...] | None = None
    """Blocks of the tower that the decoder reads; none takes those of the weights, or (3, 6, 9)."""
    prefix: Prefix | Literal["ontology"] = "fixed"
    """Templates around names: ``plain``, ``fixed`` ("a photo of a {}.", Pascal-5i), ``shuffle``,
    ``shuffle+`` (training), or those of the ``ontology``."""
    text_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the words in the prompt of a class with examples: 0 is only pictures, 1 only words. The
    released models were trained with 0 to 0.5."""
    visual_prompt: str = "crop_blur_highlight352"
    """Treatment of an example with a mask: a style of ``pipeline.labelling.clipseg.prompting``."""
    example_size: Annotated[int, Field(ge=1)] = 352
    """Side in pixels of the square that examples are resized to, and then their crops, unless
    ``visual_prompt`` sets a size."""
    background: Literal["rest", "words"] = "rest"
    """Class 0 is the ``rest``, where no class reaches its threshold, or is prompted by its ``words``."""
    background_factor: Annotated[float, Field(gt=0)] = 3.0
    """Multiplies the background's probability before the highest is taken (paper: 3); for ``words`` only."""
