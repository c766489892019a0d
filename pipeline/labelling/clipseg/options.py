"""Settings of CLIPSeg as a Labeller, beside those that every recipe has. Light: recipes import it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

RELEASED = "CIDAS/clipseg-rd64-refined"
"""The released weights that are taken unless others are named."""
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
"""The templates that the authors put around a phrase. Training draws from ``shuffle+``; of a set with several
the mean embedding is used here."""


@dataclass(frozen=True, kw_only=True)
class ClipSegOptions:
    """How an ontology is asked of CLIPSeg (arXiv 2112.10003), and what becomes of the answers.

    Attributes:
        clip: the CLIP beneath a file that holds a decoder only: NAME:PRETRAINED, as ``load_clip`` takes them.
        extract_layers: blocks of the tower that the decoder reads; None as the weights say, or (3, 6, 9).
        prefix: templates around names: ``plain``, ``fixed`` ("a photo of a {}.", Pascal-5i), ``shuffle``,
            ``shuffle+`` (training), or those of the ``ontology``.
        text_weight: of a class with examples, the share of its words in its prompt, the rest being the
            picture's: 0 is pictures alone, 1 words alone. The released models were trained with 0 to 0.5.
        visual_prompt: what is done to an example with a mask: see
        ``pipeline.labelling.clipseg.prompting.parse_style``.
        example_size: side in pixels of the square that examples are squeezed to, and then what is cut out of
            them, unless ``visual_prompt`` sets its size.
        background: class 0 is the ``rest``, where no class reaches its threshold, or is asked for by its
            ``words``. Without a class 0 the rest is ignored.
        background_factor: multiplies the background's probability before the highest is taken; the paper has
            3. For ``words`` only.
    """

    clip: str = CLIP
    extract_layers: tuple[int, ...] | None = None
    prefix: Prefix | Literal["ontology"] = "fixed"
    text_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    visual_prompt: str = "crop_blur_highlight352"
    example_size: Annotated[int, Field(ge=1)] = 352
    background: Literal["rest", "words"] = "rest"
    background_factor: Annotated[float, Field(gt=0)] = 3.0
