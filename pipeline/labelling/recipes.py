"""Recipes: every knob that changes a result, typed, named and hashed.

A recipe is written whole into what it produces. Start from a name (``--recipe maskclip``) or a YAML file
(``--recipe my.yaml``, with an optional ``base: NAME``), then change single knobs with ``--set key=value``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from models.errors import MaskMillError, WrongUse
from pipeline.files import corruptions
from pipeline.files.recipes import Recipe, RecipeBook
from pipeline.labelling.clipseg.options import RELEASED, ClipSegOptions


@dataclass(frozen=True, kw_only=True)
class LabelRecipe(Recipe):
    """How images become pseudo-labels. Section numbers are those of Zhou et al., ECCV 2022.

    Attributes:
        model: open_clip architecture, or ``hf-hub:…``/``local-dir:…``.
        pretrained: open_clip tag, a local weights file, ``random:SEED``, or None for hub names.
        scale: (a, b) in pixels: keep-ratio resize so that the long side is at most the larger and the short
            side at most the smaller of the two (the reference's ``img_scale``).
        keep_ratio: False squashes to exactly ``scale`` (width, height).
        resize: ``opencv`` bilinear without antialiasing as the reference, or ``antialias``.
        max_pixels: larger images are not decoded but recorded as ``too_large``.
        corruption: ``NAME:LEVEL`` of ``pipeline.files.corruptions`` (``jpeg_compression:3``), done to the
        decoded
            image before it is resized, for robustness measurements; empty is none.
        head: which reading of CLIP's last block (``models.clip.heads``): ``maskclip`` as the reference's
        code,
            ``value`` without its residual and MLP, ``plain`` unmodified.
        image_stats: normalise with ``imagenet`` statistics, as the reference does, or with ``clip``'s own.
        profile: ``reference`` runs the visual tower with exact GELU and LayerNorm eps 1e-6, as the paper's
            code does; ``weights`` as the weights were trained.
        window: side of square sliding windows in pixels; 0 is the whole image at once.
        window_stride: step between windows in pixels.
        ks_threshold: key smoothing for pixels below this confidence (paper: 1.0); 0 is off (section 3.3).
        ks_axis: normalise keys along the ``token`` axis (the published code) or ``channel`` (the paper).
        ks_source: keys ``projected`` by out_proj (the published code) or ``raw``.
        pd_threshold: prompt denoising: drop classes never above this confidence (paper: 0.5); 0 is off.
        temperature: multiplies cosines before every softmax, the confidence included.
        precision: ``auto`` is bf16 where the processor computes it natively (fp16 on older GPUs), else fp32.
        batch_size: images per forward pass; 0 chooses 1 on a CPU, 16 on a GPU. Does not change the labels.
        min_confidence: pixels below it become ``ignore_index``; a class's own threshold takes precedence.
        clipseg: how CLIPSeg is asked, where ``model`` is ``clipseg`` and ``pretrained`` names its weights.
    """

    model: str = "ViT-B-16-quickgelu"
    pretrained: str | None = "openai"
    scale: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2048, 512)
    keep_ratio: bool = True
    resize: Literal["opencv", "antialias"] = "opencv"
    max_pixels: Annotated[int, Field(ge=1)] = 100_000_000
    corruption: str = ""
    head: Literal["maskclip", "value", "plain"] = "maskclip"
    image_stats: Literal["imagenet", "clip"] = "imagenet"
    profile: Literal["reference", "weights"] = "reference"
    window: Annotated[int, Field(ge=0)] = 0
    window_stride: Annotated[int, Field(ge=0)] = 0
    ks_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    ks_axis: Literal["token", "channel"] = "token"
    ks_source: Literal["projected", "raw"] = "projected"
    pd_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 100.0
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    batch_size: Annotated[int, Field(ge=0, le=4096)] = 0
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    clipseg: ClipSegOptions = field(default_factory=ClipSegOptions)


def _check(recipe: LabelRecipe, where: str) -> None:
    if recipe.corruption:
        try:
            corruptions.parse(recipe.corruption)
        except MaskMillError as error:
            raise WrongUse("recipe_invalid", f"{where}: corruption: {error.message}", error.remedy) from error
    if recipe.head == "plain" and recipe.ks_threshold:
        raise WrongUse(
            "recipe_invalid",
            f"{where}: key smoothing (ks_threshold {recipe.ks_threshold:g}) needs keys; head plain has none.",
            "Add --set head=maskclip, or --set ks_threshold=0.",
        )
    if recipe.model != "clipseg" and recipe.clipseg != ClipSegOptions():
        raise WrongUse(
            "recipe_invalid",
            f"{where}: the settings clipseg.… mean nothing to {recipe.model}.",
            "Leave them out, or begin with --recipe clipseg.",
        )
    if recipe.window and not 0 < recipe.window_stride <= recipe.window:
        raise WrongUse(
            "recipe_invalid",
            f"{where}: window {recipe.window} needs 0 < window_stride <= window, not {recipe.window_stride}.",
            f"Add --set window_stride={max(1, recipe.window // 2)}.",
        )


LABEL_RECIPES = RecipeBook(
    LabelRecipe,
    (
        # The paper's protocol (spec: seed protocol), training-free rows without refinement.
        LabelRecipe(name="maskclip"),
        LabelRecipe(name="maskclip-refined", ks_threshold=1.0, pd_threshold=0.5),
        LabelRecipe(name="maskclip-rn50", model="RN50-quickgelu"),
        # Windows at native resolution, the protocol of MaskCLIP's successors.
        LabelRecipe(
            name="maskclip-windows",
            scale=(2048, 336),
            window=224,
            window_stride=112,
            image_stats="clip",
            profile="weights",
        ),
        # CLIPSeg with a list of prompts; what no class claims is the rest.
        LabelRecipe(
            name="clipseg",
            model="clipseg",
            pretrained=RELEASED,
            scale=(352, 352),
            keep_ratio=False,
            resize="antialias",
            min_confidence=0.3,
        ),
        # Its paper's generalised zero-shot protocol: background is a prompt of its own.
        LabelRecipe(
            name="clipseg-zero-shot",
            model="clipseg",
            pretrained=RELEASED,
            scale=(352, 352),
            keep_ratio=False,
            resize="antialias",
            clipseg=ClipSegOptions(prefix="plain", background="words"),
        ),
        # The embedded default: the bundled small CLIP. A toy: it knows the toy world only.
        LabelRecipe(
            name="toy",
            model="toyclip",
            pretrained="bundled",
            scale=(512, 128),
            head="value",
            image_stats="clip",
            profile="weights",
        ),
    ),
    default="maskclip",
    check=_check,
)
RECIPES = LABEL_RECIPES.recipes
load_recipe = LABEL_RECIPES.load
parse_settings = LABEL_RECIPES.parse
change_recipe = LABEL_RECIPES.change
recipe_from_dict = LABEL_RECIPES.from_dict
