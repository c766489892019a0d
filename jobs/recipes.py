"""Recipes: every knob that changes a result, typed, named and hashed.

A recipe is written whole into what it produces. Start from a name (``--recipe maskclip``) or a YAML file
(``--recipe my.yaml``, with an optional ``base: NAME``), then change single knobs with ``--set key=value``.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from models.errors import MaskMillError
from pipeline import corruptions


@dataclass(frozen=True, kw_only=True)
class LabelRecipe:
    """How images become pseudo-labels. Section numbers are those of Zhou et al., ECCV 2022.

    Attributes:
        name: what the recipe is called; not part of the hash.
        model: open_clip architecture, or ``hf-hub:…``/``local-dir:…``.
        pretrained: open_clip tag, a local weights file, ``random:SEED``, or None for hub names.
        scale: (a, b) in pixels: keep-ratio resize so that the long side is at most the larger and the short
            side at most the smaller of the two (the reference's ``img_scale``).
        keep_ratio: False squashes to exactly ``scale`` (width, height).
        resize: ``opencv`` bilinear without antialiasing as the reference, or ``antialias``.
        max_pixels: larger images are not decoded but recorded as ``too_large``.
        corruption: ``NAME:LEVEL`` of ``pipeline.corruptions`` (``jpeg_compression:3``), done to the decoded
            image before it is resized, for robustness measurements; empty is none.
        head: which reading of CLIP's last block (``models.dense``): ``maskclip`` as the reference's code,
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
    """

    name: str
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

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @property
    def hash(self) -> str:
        """Sha256 (hex) of every field but the name."""
        fields = self.to_dict()
        del fields["name"]
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


RECIPES: Mapping[str, LabelRecipe] = {
    recipe.name: recipe
    for recipe in (
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
    )
}
DEFAULT_RECIPE = "maskclip"

_ADAPTER: TypeAdapter[LabelRecipe] = TypeAdapter(LabelRecipe)
_FIELDS = tuple(field.name for field in dataclasses.fields(LabelRecipe))


def load_recipe(name_or_path: str, settings: Sequence[str] = ()) -> LabelRecipe:
    """A recipe by name or YAML file, with ``key=value`` changes applied in order.

    Args:
        name_or_path: a key of ``RECIPES`` or a YAML file of fields; ``base`` names the recipe it starts from.
        settings: ``key=value`` strings; the value is read as YAML.

    Raises:
        MaskMillError: ``recipe_unknown`` or ``recipe_invalid``, naming the key and what is allowed.
    """
    fields = _base_fields(name_or_path) | parse_settings(settings)
    return _validated(fields, where=name_or_path)


def parse_settings(settings: Sequence[str]) -> dict[str, Any]:
    """``key=value`` strings as fields of a recipe; the values are read as YAML.

    Raises:
        MaskMillError: ``recipe_invalid``, naming the key and what is allowed.
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        key = key.strip()
        if not separator:
            raise MaskMillError(
                "recipe_invalid",
                f"--set {setting!r} is not of the form key=value.",
                "Write --set window=224.",
            )
        _check_key(key, where=f"--set {setting}")
        try:
            fields[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            fields[key] = value
    return fields


def change_recipe(recipe: LabelRecipe, fields: Mapping[str, Any]) -> LabelRecipe:
    """The recipe with other fields, checked as one from a file is.

    Raises:
        MaskMillError: ``recipe_invalid``.
    """
    return _validated(recipe.to_dict() | dict(fields), where=recipe.name)


def recipe_from_dict(fields: Mapping[str, Any]) -> LabelRecipe:
    """The recipe that ``to_dict`` wrote."""
    return _validated(dict(fields), where="the recorded recipe")


def _base_fields(name_or_path: str) -> dict[str, Any]:
    if name_or_path in RECIPES:
        return RECIPES[name_or_path].to_dict()
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        near = difflib.get_close_matches(name_or_path, RECIPES, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise MaskMillError(
            "recipe_unknown",
            f"There is no recipe {name_or_path!r}.",
            f"{hint}Known: {', '.join(RECIPES)}; or give a YAML file.",
        )
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise MaskMillError(
            "recipe_invalid", f"{path} cannot be read as YAML: {error}", "Give a YAML file of recipe fields."
        ) from error
    if not isinstance(written, dict):
        raise MaskMillError(
            "recipe_invalid", f"{path} holds no fields.", "Write lines such as `window: 224`."
        )
    base = written.pop("base", DEFAULT_RECIPE)
    if base not in RECIPES:
        raise MaskMillError(
            "recipe_invalid", f"{path}: base {base!r} is not a recipe.", f"Known: {', '.join(RECIPES)}."
        )
    for key in written:
        _check_key(str(key), where=str(path))
    return RECIPES[base].to_dict() | {"name": path.stem} | written


def _check_key(key: str, *, where: str) -> None:
    if key not in _FIELDS:
        near = difflib.get_close_matches(key, _FIELDS, n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise MaskMillError(
            "recipe_invalid", f"{where}: there is no field {key!r}.", f"{hint}Fields: {', '.join(_FIELDS)}."
        )


def _validated(fields: dict[str, Any], *, where: str) -> LabelRecipe:
    try:
        recipe = _ADAPTER.validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MaskMillError(
            "recipe_invalid",
            f"{where}: {place} = {first['input']!r}: {first['msg']}.",
            "Correct the value, or leave it out.",
        ) from error
    if recipe.corruption:
        try:
            corruptions.parse(recipe.corruption)
        except MaskMillError as error:
            raise MaskMillError(
                "recipe_invalid", f"{where}: corruption: {error.message}", error.remedy
            ) from error
    if recipe.head == "plain" and recipe.ks_threshold:
        raise MaskMillError(
            "recipe_invalid",
            f"{where}: key smoothing (ks_threshold {recipe.ks_threshold:g}) needs keys; head plain has none.",
            "Add --set head=maskclip, or --set ks_threshold=0.",
        )
    if recipe.window and not 0 < recipe.window_stride <= recipe.window:
        raise MaskMillError(
            "recipe_invalid",
            f"{where}: window {recipe.window} needs 0 < window_stride <= window, not {recipe.window_stride}.",
            f"Add --set window_stride={max(1, recipe.window // 2)}.",
        )
    return recipe
