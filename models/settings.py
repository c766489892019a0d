"""Settings in recipes: typed, validated on construction, importable without torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from models.catalogue import HEADS, REFINERS
from models.errors import MaskMillError, WrongUse, did_you_mean

ImageStats = Literal["imagenet", "clip"]
Profile = Literal["reference", "weights"]
KeyAxis = Literal["token", "channel"]
KeySource = Literal["projected", "raw"]
Positions = Literal["exact", "offset"]
WindowRule = Literal["cells", "pixels", "splice"]
RegionKind = Literal["labels", "clusters", "superpixels"]


class Neutral:
    """Marks a field that does not change the result: ``Annotated[int, NEUTRAL]``."""


NEUTRAL = Neutral()


class Steps(NamedTuple):
    """Marks a field that counts steps: ``Annotated[int, Steps()]`` follows ``iterations`` unless it is set.

    Attributes:
        interval: it only becomes shorter; a longer run keeps it.
        after: name of the span next to this one in the settings that this span directly follows.
    """

    interval: bool = False
    after: str = ""


class Knob(NamedTuple):
    """One field of settings or of nested settings.

    Attributes:
        name: dotted.
        description: one line.
        changes_result: whether hashes and comparisons include it.
        steps: how it follows ``iterations``, if it does.
    """

    name: str
    description: str
    changes_result: bool
    steps: Steps | None = None


class Settings(BaseModel):
    """Base of all settings: immutable, unknown fields rejected. A field's docstring is its description.

    Raises:
        MaskMillError: ``setting_invalid``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="after")
    @classmethod
    def _fits(cls, value: Any) -> Any:
        # Tensors and files have no larger ones.
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("the number does not fit into 64 bits")
        return value

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise WrongUse(
                "setting_invalid",
                f"{place} = {as_written(first['input'])}: {first['msg']}.",
                "Correct the value, or leave it out.",
            ) from error

    def effective(self) -> dict[str, Any]:
        """The fields that change the result, by dotted name, as JSON values."""
        fields = self.model_dump(mode="json")
        return {knob.name: value_at(fields, knob.name) for knob in knobs(type(self)) if knob.changes_result}

    def replace(self, **changes: Any) -> Self:
        """A validated copy with other values; nested settings are replaced as a whole."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**(fields | changes))


def knobs(kind: type[Settings], prefix: str = "") -> Iterator[Knob]:
    """All fields of settings, with nested settings flattened in place."""
    for name, field in kind.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Settings):
            yield from knobs(inner, f"{prefix}{name}.")
        else:
            description = " ".join((field.description or "").split())
            neutral = any(isinstance(mark, Neutral) for mark in field.metadata)
            steps = next((mark for mark in field.metadata if isinstance(mark, Steps)), None)
            yield Knob(prefix + name, description, not neutral, steps)


def as_written(value: Any) -> str:
    """A value as ``--set`` and recipe files take it, for messages: ``[1, 12]``, ``null``, ``text``."""
    return value if value and isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def value_at(fields: Mapping[str, Any], path: str) -> Any:
    """The value at a dotted name in settings dumped as JSON."""
    value: Any = fields
    for part in path.split("."):
        value = value[part]
    return value


def _known(field: str, name: str, known: Sequence[str]) -> str:
    """The name, if it is one of the known.

    Raises:
        MaskMillError: ``setting_invalid``.
    """
    if name not in known:
        raise WrongUse(
            "setting_invalid",
            f"{field} cannot be {as_written(name)}.",
            f"{did_you_mean(name, known)}Known: {', '.join(known)}.",
        )
    return name


class ClassSettings(Settings):
    """Which classes an image may have, and how high a class's scores are anyway; all off by default."""

    candidates: Annotated[int, Field(ge=0)] = 0
    """Label an image only with so many classes, those that its class token likes best; 0 is off."""
    candidates_above: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Label an image with all classes whose cosine with its class token is at least this (ReCLIP: 0.23), or
    if there is none, with the best ``candidates`` (at least one); 0 is off."""
    redundant_below: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop an image's classes whose maps do not survive when alike patches share them: soft IoU not above
    this (FreeCP: 0.15); 0 is off."""
    ambiguous_above: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Of an image's classes with the same map (soft IoU at least this; FreeCP: 0.7), keep those that the
    class token of their place likes best; 0 is off."""
    calibrate: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Measure this quantile of each class's scores over a sample of the corpus before labelling, and record
    its share as ``bias``; 0 is off."""
    calibrate_weight: Annotated[float, Field(gt=0, le=1)] = 0.25
    """For ``calibrate``: the share of the quantile that is subtracted."""
    calibrate_images: Annotated[int, Field(ge=1)] = 256
    """For ``calibrate``: images in the sample."""
    bias: tuple[float, ...] = ()
    """Subtract from the scores of the classes, in their order; ``calibrate`` finds it. Empty is none."""

    @property
    def uncalibrated(self) -> bool:
        """Whether a first pass over the corpus is asked for, and its result is not here."""
        return self.calibrate > 0 and not self.bias

    @property
    def purifies(self) -> bool:
        """Whether one of FreeCP's tests is on."""
        return self.redundant_below > 0 or self.ambiguous_above > 0

    @property
    def asks_class_token(self) -> bool:
        """Whether the class token of whole images is needed."""
        return self.candidates > 0 or self.candidates_above > 0

    def refuse_unfit(self, num_classes: int) -> None:
        """Refuse a bias for other classes, and a calibration that was never measured.

        Raises:
            MaskMillError: ``setting_invalid``.
        """
        if len(self.bias) not in (0, num_classes):
            raise WrongUse(
                "setting_invalid",
                f"bias has {len(self.bias)} numbers, and there are {num_classes} classes.",
                "Give one for each class, or leave it out.",
            )
        if self.uncalibrated:
            raise WrongUse(
                "setting_invalid",
                f"calibrate={self.calibrate:g} measures the scores of a corpus, and here is none.",
                "Label the corpus with it (maskmill label), then give the bias in its dataset.json: "
                "--set bias=[…].",
            )


class MaskClipSettings(Settings):
    """How MaskCLIP reads a CLIP (arXiv 2112.01071); the defaults are those of the paper's MaskCLIP rows."""

    head: str = "maskclip"
    """How the last block is read: ``maskclip`` as by the paper's code, ``value`` without residual and MLP,
    ``plain``, ``qq`` (ClearCLIP), ``kk``, ``sclip``, ``nn`` (NACLIP), ``pa`` (PEARL), ``sc`` (SC-CLIP),
    ``proxy``, ``lposs``, or ``radseg`` (C-RADIO)."""
    sigma: Annotated[float, Field(gt=0)] = 5.0
    """For head ``nn``: how far near is, in patches."""
    alpha: Annotated[float, Field(ge=0)] = 0.08
    """For head ``pa``: the share of k·k; its paper takes 0.3 for ADE20K and Cityscapes."""
    helper: str = ""
    """For heads ``proxy`` and ``lposs``: a self-supervised ViT of timm with the tag of its weights, such as
    ``vit_base_patch16_224.dino``, which says which patches belong together."""
    helper_weights: str = ""
    """The helper's weights: a file, ``random:SEED``, or empty for those that timm publishes."""
    image_stats: ImageStats = "imagenet"
    """Normalise images with ``imagenet`` statistics, as the paper's code does, or with ``clip``'s own."""
    profile: Profile = "reference"
    """``reference`` runs a ViT with erf-GELU and LayerNorm eps 1e-6, as the paper's code does; ``weights`` as
    it was trained."""
    window: Annotated[int, Field(ge=0)] = 0
    """Side of square sliding windows in pixels, a multiple of the grid stride; 0 is the whole image."""
    window_stride: Annotated[int, Field(ge=0)] = 0
    """Step between windows in pixels, a multiple of the grid stride."""
    windows: WindowRule = "cells"
    """Overlapping windows: average scores per grid ``cells``; per ``pixels``, as MaskCLIP's successors do; or
    ``splice``, average features per grid cell."""
    positions: Positions = "exact"
    """How a ViT's position table is resized: ``exact``, or with the ``offset`` of 0.1 cells that MaskCLIP's
    successors have."""
    ks_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Key smoothing of pixels below this confidence (section 3.3; the paper's "+KS" is 1); 0 is off."""
    ks_axis: KeyAxis = "token"
    """Normalise keys along the ``token`` axis, as the paper's code does by a slip, or along ``channel``, as
    the paper says."""
    ks_source: KeySource = "projected"
    """Keys ``projected`` by out_proj, as in the paper's code, or ``raw`` (a ResNet has raw ones only)."""
    pd_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Prompt denoising: drop classes that are nowhere above this confidence (the paper's "+PD" is 0.5); 0 is
    off."""
    temperature: Annotated[float, Field(gt=0)] = 100.0
    """Multiplies cosines before every softmax, the confidence included."""
    classes: ClassSettings = ClassSettings()
    """Which classes an image may have, and how their scores are calibrated."""
    memory: str = ""
    """Folder or URI of a memory of regions (``maskmill memory build``), which supports the scores of an image
    with those of regions that are like its own; empty is none."""
    memory_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """For ``memory``: the share of the support in the scores."""
    memory_neighbours: Annotated[int, Field(ge=1, le=1000)] = 20
    """For ``memory``: how many regions support each region of an image."""

    refine: str = "none"
    """Refine scores by the image at its own size: ``pamr``, ``tlp`` (PEARL's, on cells), ``lposs+`` (pixels),
    or ``none``."""
    refine_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of the refiner; 0 is its own number: 10, 25 and 10."""
    refine_classes: Annotated[int, Field(ge=1)] = 32
    """For ``pamr`` and ``lposs+``: refine an image's likeliest classes only, and choose among them; bounds
    memory."""
    refine_pixels: Annotated[int, Field(ge=1)] = 1 << 19
    """For ``pamr`` and ``lposs+``: larger images are refined at this number of pixels; bounds memory."""
    refine_cells: Annotated[int, Field(ge=1)] = 80
    """For ``tlp``: cells along each side; its paper takes 224 for Cityscapes."""
    refine_dilations: Annotated[tuple[Annotated[int, Field(ge=1, le=1024)], ...], Field(min_length=1)] = (
        8,
        16,
    )
    """For ``pamr``: distances of the neighbours in pixels; finer textures need shorter ones."""

    @field_validator("refine")
    @classmethod
    def _known_refiner(cls, refine: str) -> str:
        return _known("refine", refine, ("none", *REFINERS))

    @field_validator("head")
    @classmethod
    def _known_head(cls, head: str) -> str:
        return _known("head", head, tuple(HEADS))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._refuse_useless("head", self.head, {name: entry.settings for name, entry in HEADS.items()})
        self._refuse_useless(
            "refine",
            self.refine,
            {name: ("refine_steps", *entry.settings) for name, entry in REFINERS.items()},
        )
        if self.refine != "none" and self.ks_threshold:
            raise WrongUse(
                "setting_invalid",
                f"refine={self.refine} refines cosines, and key smoothing leaves none.",
                "Set refine=none, or ks_threshold=0.",
            )
        if self.classes.purifies and (self.window or self.ks_threshold):
            raise WrongUse(
                "setting_invalid",
                "redundant_below and ambiguous_above compare cosines of all patches of an image, "
                + ("and windows are seen one by one." if self.window else "and key smoothing leaves none."),
                "Set window=0 and window_stride=0." if self.window else "Set ks_threshold=0.",
            )
        if self.memory and (self.ks_threshold or self.window):
            raise WrongUse(
                "setting_invalid",
                "a memory supports the cosines of whole images, "
                + ("and windows are seen one by one." if self.window else "and key smoothing leaves none."),
                "Set window=0 and window_stride=0." if self.window else "Set ks_threshold=0.",
            )
        if not self.memory:
            for name in ("memory_share", "memory_neighbours"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise WrongUse(
                        "setting_invalid",
                        f"{name} means nothing without a memory.",
                        "Name one (memory=…), or leave it out.",
                    )
        if not self.window and self.windows != "cells":
            raise WrongUse(
                "setting_invalid",
                f"windows={self.windows} says how windows are put together, and window is 0.",
                "Set window=224 and window_stride=112, or leave windows out.",
            )
        if self.windows == "pixels" and self.ks_threshold:
            raise WrongUse(
                "setting_invalid",
                "key smoothing works on grid cells, and windows=pixels has none.",
                "Set windows=cells, or ks_threshold=0.",
            )
        if not HEADS[self.head].keys and self.ks_threshold:
            raise WrongUse(
                "setting_invalid",
                f"key smoothing (ks_threshold {self.ks_threshold:g}) needs keys; head {self.head} has none.",
                "Set head=maskclip, or ks_threshold=0.",
            )
        if self.window_stride > self.window or bool(self.window) != bool(self.window_stride):
            raise WrongUse(
                "setting_invalid",
                f"window {self.window} needs 0 < window_stride <= window, not {self.window_stride}.",
                f"Set window_stride={max(1, self.window // 2)}." if self.window else "Set window_stride=0.",
            )
        return self

    @model_validator(mode="after")
    def _helped(self) -> Self:
        if HEADS[self.head].helper and not self.helper:
            raise WrongUse(
                "setting_invalid",
                f"head={self.head} compares patches by a helper tower, and helper names none.",
                "Set helper=vit_base_patch16_224.dino, or another head.",
            )
        if self.head == "radseg" and self.window and self.windows != "splice":
            raise WrongUse(
                "setting_invalid",
                f"head=radseg aggregates over the whole image, and windows={self.windows} never sees it.",
                "Set windows=splice, as its authors do.",
            )
        if self.head == "lposs" and self.windows == "splice":
            raise WrongUse(
                "setting_invalid",
                "windows=splice averages features, and head=lposs makes the cosines of all windows agree.",
                "Set windows=pixels, as its authors do, or windows=cells.",
            )
        return self

    def without_memory(self) -> Self:
        """The same settings, for images on their own."""
        fields = type(self).model_fields
        names = ("memory", "memory_share", "memory_neighbours")
        return self.replace(**{name: fields[name].default for name in names})

    def _refuse_useless(self, field: str, name: str, settings: Mapping[str, tuple[str, ...]]) -> None:
        """Refuse a setting of other heads or refiners than the chosen one."""
        for knob in dict.fromkeys(knob for some in settings.values() for knob in some):
            changed = getattr(self, knob) != type(self).model_fields[knob].default
            if changed and knob not in settings.get(name, ()):
                users = " or ".join(f"{field}={other}" for other, some in settings.items() if knob in some)
                raise WrongUse(
                    "setting_invalid",
                    f"{knob} means nothing to {field} {name}.",
                    f"It is a setting of {users}; leave it out.",
                )


class ClipSegConfig(Settings):
    """The decoder."""

    reduce_dim: Annotated[int, Field(ge=2)] = 64
    """D, the decoder's width; 64, 16 and 128 in the paper."""
    extract_layers: tuple[int, ...] = (3, 6, 9)
    """0-based blocks of the tower whose outputs are read, increasing. The released weights run with (3, 6,
    9); the paper and its training settings have (3, 7, 9)."""
    refined: bool = False
    """The head of three convolutions instead of one linear map per token."""
    heads: Annotated[int, Field(ge=1)] = 4
    """Heads of the attention."""
    feedforward: Annotated[int, Field(ge=1)] = 2048
    """Hidden width of the blocks' MLP."""
    cond_layer: Annotated[int, Field(ge=0)] = 0
    """The decoder block that is conditioned on the prompt; 0 is the deepest."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout in training: of attention weights, after attention, inside and after the MLP."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        layers = self.extract_layers
        if not layers or layers[0] < 0 or list(layers) != sorted(set(layers)):
            raise self._wrong("extract_layers", "Use increasing 0-based block indices, as in (3, 6, 9).")
        if self.reduce_dim % self.heads:
            raise self._wrong("reduce_dim", f"Use a multiple of the {self.heads} attention heads.")
        if self.cond_layer >= len(layers):
            raise self._wrong("cond_layer", f"There are {len(layers)} decoder blocks, counted from 0.")
        return self

    def _wrong(self, name: str, remedy: str) -> MaskMillError:
        return WrongUse("setting_invalid", f"{name} cannot be {as_written(getattr(self, name))}.", remedy)


PAPER = ClipSegConfig(extract_layers=(3, 7, 9))
"""The paper's training settings."""


Decoder = Literal["deeplabv2", "deeplabv3plus", "light"]
Backbone = Literal["resnet50c", "resnet101c", "resnet50", "resnet101", "light"]
DILATIONS = {"deeplabv2": (6, 12, 18, 24), "deeplabv3plus": (1, 12, 24, 36), "light": (1, 3, 6)}
"""Default dilations by decoder."""


class StudentConfig(Settings):
    """Architecture of a student; the defaults are the reference's ResNet-101."""

    decoder: Decoder = "deeplabv2"
    """``deeplabv2``, ``deeplabv3plus`` or ``light``."""
    backbone: Backbone = "resnet101c"
    """``resnet50c`` and ``resnet101c`` (the reference's ResNetV1c), ``resnet50``, ``resnet101``, or
    ``light``, which trains on a CPU."""
    embed_dim: Annotated[int, Field(ge=1)] = 512
    """D, that of the CLIP whose text embeddings classify."""
    dilations: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(validate_default=True)] = ()
    """Dilations of the decoder's parallel convolutions; empty is the decoder's own, (6, 12, 18, 24),
    (1, 12, 24, 36) or (1, 3, 6)."""
    width: Annotated[int, Field(ge=1)] = 16
    """First channels of the light backbone."""
    depth: Annotated[int, Field(ge=1)] = 3
    """Residual blocks of the light backbone at stride 8."""
    normalize_features: bool = False
    """Scores are cosines with the features; the reference takes features as they are."""
    logit_scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor of the scores; the reference has none."""
    learned_background: bool = False
    """Class 0 is one learned vector, and the named classes follow."""

    @field_validator("dilations")
    @classmethod
    def _own(cls, dilations: tuple[int, ...], info: ValidationInfo) -> tuple[int, ...]:
        # An invalid decoder is reported on its own.
        return dilations or DILATIONS.get(info.data.get("decoder", ""), ())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name, default in (("width", 16), ("depth", 3)):
            if self.backbone != "light" and getattr(self, name) != default:
                raise WrongUse(
                    "setting_invalid",
                    f"{name} cannot be {as_written(getattr(self, name))}.",
                    f"It is a setting of the backbone light; {self.backbone} has none.",
                )
        return self
