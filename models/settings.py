"""Settings that recipes hold: typed, checked when they are made, and read without importing torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Self

from models.errors import WrongUse

HeadName = Literal["maskclip", "value", "plain"]
ImageStats = Literal["imagenet", "clip"]
Profile = Literal["reference", "weights"]
KeyAxis = Literal["token", "channel"]
KeySource = Literal["projected", "raw"]


class Neutral:
    """Marks a field that does not change the result: ``Annotated[int, NEUTRAL]``."""


NEUTRAL = Neutral()


class Settings(BaseModel):
    """Base of all settings: immutable, without unknown fields. A field's docstring is its description.

    Raises:
        pydantic.ValidationError: a field has a wrong type or is out of range.
        MaskMillError: fields contradict each other (``setting_invalid``).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def replace(self, **changes: Any) -> Self:
        """A checked copy with other values; nested settings are given whole."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return self.model_validate(fields | changes)


class MaskClipSettings(Settings):
    """How MaskCLIP reads a CLIP (arXiv 2112.01071); the defaults are those of the paper's MaskCLIP rows."""

    head: HeadName = "maskclip"
    """How the last block is read: ``maskclip`` as by the paper's code, ``value`` without its residual and
    MLP, ``plain`` unmodified."""
    image_stats: ImageStats = "imagenet"
    """Normalise images with ``imagenet`` statistics, as the paper's code does, or with ``clip``'s own."""
    profile: Profile = "reference"
    """``reference`` runs a ViT with erf-GELU and LayerNorm eps 1e-6, as the paper's code does; ``weights`` as
    it was trained."""
    window: Annotated[int, Field(ge=0)] = 0
    """Side of square sliding windows in pixels, a multiple of the grid stride; 0 is the whole image."""
    window_stride: Annotated[int, Field(ge=0)] = 0
    """Step between windows in pixels, a multiple of the grid stride."""
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.head == "plain" and self.ks_threshold:
            raise WrongUse(
                "setting_invalid",
                f"key smoothing (ks_threshold {self.ks_threshold:g}) needs keys; head plain has none.",
                "Set head=maskclip, or ks_threshold=0.",
            )
        if self.window_stride > self.window or bool(self.window) != bool(self.window_stride):
            raise WrongUse(
                "setting_invalid",
                f"window {self.window} needs 0 < window_stride <= window, not {self.window_stride}.",
                f"Set window_stride={max(1, self.window // 2)}." if self.window else "Set window_stride=0.",
            )
        return self
