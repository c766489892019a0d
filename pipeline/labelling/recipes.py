"""Labelling recipes: every setting that changes the labels, typed, named and hashed.

A run writes its complete recipe into its output. Start from a name (``--recipe maskclip``) or a YAML file
(``--recipe my.yaml``, with an optional ``base: NAME``), then change settings with ``--set key=value``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from models.catalogue import HEADS
from models.clip.templates import get_templates
from models.errors import WrongUse
from models.settings import NEUTRAL, MaskClipSettings
from pipeline.files.images import ImageSettings
from pipeline.files.recipes import Recipe, RecipeBook
from pipeline.files.storage import canonical_uri
from pipeline.labelling.clipseg.options import RELEASED, ClipSegOptions
from pipeline.labelling.labeller import Agreement
from pipeline.table.record import TableRecord
from pipeline.table.views import TableView, View

if TYPE_CHECKING:
    from pipeline.ontology.ontology import Ontology


class LabelRecipe(Recipe):
    """How images become pseudo-labels."""

    model: str = "ViT-B-16-quickgelu"
    """open_clip architecture, ``C-RADIOv4-SO400M`` or ``TIPSv2-L-14`` and their like, ``hf-hub:…``,
    ``local-dir:…``, ``clipseg``, or the folder of a student."""
    pretrained: str | None = "openai"
    """open_clip tag, a local weights file, ``random:SEED``, or none for hub names."""
    images: ImageSettings = ImageSettings()
    """How images are decoded and resized."""
    maskclip: MaskClipSettings = MaskClipSettings()
    """How MaskCLIP computes scores; not for students and CLIPSeg."""
    clipseg: ClipSegOptions = ClipSegOptions()
    """How to prompt CLIPSeg; for ``model`` ``clipseg``, whose weights ``pretrained`` names."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """``auto`` is bf16 where the processor computes it natively (fp16 on older GPUs), else fp32."""
    batch_size: Annotated[int, Field(ge=0, le=4096), NEUTRAL] = 0
    """Images per forward pass; 0 chooses 1 on a CPU, 16 on a GPU."""
    agreement: Annotated[Agreement, NEUTRAL] = "none"
    """``size`` or ``flip`` reads each image again, at three quarters of its size (half as much time again) or
    mirrored (twice the time), and stores how far the classes agree: the worst labels are found by it. Images
    in windows are read once."""
    templates: str | None = None
    """Prompt templates for classes that come without: a name such as ``imagenet80``; null is the model's own
    (the paper's ``openai85``, or a student's)."""
    min_confidence: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Pixels with less confidence become ``ignore_index``; a class's own threshold takes precedence."""

    @field_validator("maskclip")
    @classmethod
    def _canonical(cls, maskclip: MaskClipSettings) -> MaskClipSettings:
        # The recipe is part of a table's identity, and workers have other working directories.
        uri = canonical_uri(maskclip.memory) if maskclip.memory else ""
        return maskclip if uri == maskclip.memory else maskclip.replace(memory=uri)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model != "clipseg" and self.clipseg != ClipSegOptions():
            raise WrongUse(
                "setting_invalid",
                f"the settings clipseg.… mean nothing to {self.model}.",
                "Leave them out, or begin with --recipe clipseg.",
            )
        if self.templates is not None:
            get_templates(self.templates)
        return self

    def with_classes(self, **changes: Any) -> Self:
        """A copy with other settings of ``maskclip.classes``."""
        maskclip = self.maskclip
        return self.replace(maskclip=maskclip.replace(classes=maskclip.classes.replace(**changes)))

    def adopt(self, recorded: LabelRecipe) -> Self:
        """This recipe with what a first pass over the corpus has found for another, if it asks for one."""
        if not self.maskclip.classes.uncalibrated:
            return self
        return self.with_classes(bias=recorded.maskclip.classes.bias)

    def differences(self, recorded: Recipe) -> list[str]:
        """As ``Recipe.differences``; precision ``auto`` and an unmeasured bias adopt the recorded ones."""
        if self.precision == "auto" and isinstance(recorded, LabelRecipe) and recorded.precision != "auto":
            return self.replace(precision=recorded.precision).differences(recorded)
        if self.maskclip.classes.uncalibrated and isinstance(recorded, LabelRecipe):
            adopted = self.adopt(recorded)
            if not adopted.maskclip.classes.uncalibrated:
                return adopted.differences(recorded)
        return super().differences(recorded)


UNIFIED = LabelRecipe(
    name="unified",
    images=ImageSettings(scale=(2048, 336)),
    maskclip=MaskClipSettings(
        window=224,
        window_stride=112,
        windows="pixels",
        positions="offset",
        image_stats="clip",
        profile="weights",
        temperature=40.0,
    ),
    templates="imagenet80",
)
"""The protocol that MaskCLIP's successors share (SCLIP, NACLIP and later)."""


def _unified(head: str) -> LabelRecipe:
    return UNIFIED.replace(name=f"unified-{head}", maskclip=UNIFIED.maskclip.replace(head=head))


PROXYCLIP = UNIFIED.replace(
    name="proxyclip",
    maskclip=UNIFIED.maskclip.replace(
        head="proxy", helper="vit_base_patch8_224.dino", window=336, window_stride=112
    ),
)
"""ProxyCLIP as its table measures it, but on Cityscapes and ADE20K, where its short side is 448."""

LPOSS = UNIFIED.replace(
    name="lposs",
    images=ImageSettings(scale=(2048, 448)),
    maskclip=UNIFIED.maskclip.replace(
        head="lposs",
        helper="vit_base_patch16_224.dino",
        window=448,
        window_stride=224,
        positions="exact",
    ),
)
"""LPOSS with the sizes, windows and helper of its code."""

RADSEG = LabelRecipe(
    name="radseg",
    model="C-RADIOv4-SO400M",
    pretrained=None,
    images=ImageSettings(scale=(2048, 336)),
    maskclip=MaskClipSettings(
        head="radseg",
        window=336,
        window_stride=224,
        windows="splice",
        image_stats="clip",
        profile="weights",
        pd_threshold=0.5,
    ),
    templates="imagenet80",
)
"""RADSeg with the sizes of its code at low resolution; NVIDIA's weights are given as a file."""

TIPSV2 = LabelRecipe(
    name="tipsv2",
    model="TIPSv2-L-14",
    pretrained="webli",
    images=ImageSettings(scale=(2048, 448)),
    maskclip=MaskClipSettings(
        window=448, window_stride=336, windows="pixels", image_stats="clip", profile="weights"
    ),
    templates="tcl9",
)
"""TIPSv2 as its authors' notebook for ADE20K reads it."""

_WHOLE_352 = ImageSettings(scale=(352, 352), keep_ratio=False, resize="antialias")

LABEL_RECIPES = RecipeBook(
    LabelRecipe,
    (
        # The paper's protocol (spec: seed protocol), training-free rows without refinement.
        LabelRecipe(name="maskclip"),
        LabelRecipe(name="maskclip-refined", maskclip=MaskClipSettings(ks_threshold=1.0, pd_threshold=0.5)),
        LabelRecipe(name="maskclip-rn50", model="RN50-quickgelu"),
        # Windows at native resolution, the protocol of MaskCLIP's successors.
        LabelRecipe(
            name="maskclip-windows",
            images=ImageSettings(scale=(2048, 336)),
            maskclip=MaskClipSettings(window=224, window_stride=112, image_stats="clip", profile="weights"),
        ),
        # The heads of MaskCLIP's successors, as their tables measure them.
        _unified("maskclip"),
        *(
            _unified(head)
            for head, entry in HEADS.items()
            if head not in ("maskclip", "value", "plain") and entry.alone
        ),
        PROXYCLIP,
        LPOSS,
        RADSEG,
        TIPSV2,
        # CLIPSeg with a list of prompts; pixels that no class claims are background.
        LabelRecipe(
            name="clipseg",
            model="clipseg",
            pretrained=RELEASED,
            images=_WHOLE_352,
            min_confidence=0.3,
        ),
        # Its paper's generalised zero-shot protocol: background is a prompt.
        LabelRecipe(
            name="clipseg-zero-shot",
            model="clipseg",
            pretrained=RELEASED,
            images=_WHOLE_352,
            clipseg=ClipSegOptions(prefix="plain", background="words"),
        ),
        # The embedded default: the bundled small CLIP. A toy: it knows the toy world only.
        LabelRecipe(
            name="toy",
            model="toyclip",
            pretrained="bundled",
            images=ImageSettings(scale=(512, 128)),
            maskclip=MaskClipSettings(head="value", image_stats="clip", profile="weights"),
        ),
    ),
    default="maskclip",
)
RECIPES = LABEL_RECIPES.recipes
load_recipe = LABEL_RECIPES.load
parse_settings = LABEL_RECIPES.parse
change_recipe = LABEL_RECIPES.change
recipe_from_dict = LABEL_RECIPES.from_dict


def table_recipe(record: TableRecord) -> LabelRecipe:
    """The recipe of a label table, with the precision actually used; fields that it lacks have defaults."""
    recipe = recipe_from_dict(record.recipe)
    return recipe.replace(precision=record.precision or recipe.precision)


def table_view(view: View, record: TableRecord, where: str = "the table") -> TableView:
    """Bind a view to a table, with what its labelling did to weak pixels.

    Args:
        view: what to make of the labels.
        record: of the table.
        where: the table, for errors.

    Raises:
        MaskMillError: as ``View.of``.
    """
    recipe, ontology = table_recipe(record), record.ontology
    if record.source != "pseudo":  # thresholds of its ontology are of no labelling
        return view.of(ontology, where=where)
    rest = recipe.model == "clipseg" and recipe.clipseg.background == "rest"
    return view.of(
        ontology,
        applied=ontology.thresholds(default=recipe.min_confidence),
        remainder=rest and ontology.background is not None,
        where=where,
    )


def templates_for(recipe: LabelRecipe, own: Ontology | None) -> str | Sequence[str]:
    """The prompt templates for class names that come without any.

    Args:
        recipe: of the model.
        own: the classes of a student.
    """
    if recipe.templates is not None:
        return recipe.templates
    if recipe.model == "toyclip":
        return "toyworld"
    return own.templates if own is not None else "openai85"
