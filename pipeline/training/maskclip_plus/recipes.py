"""Recipes of ``maskmill train maskclip-plus``: the reference's schedules, and the toy world's.

Every recipe has two forms. *Annotation-free*: all labels are guessed. *Zero-shot* (``-zero-shot``): the truth
of the seen classes is given, and the unseen ones are guessed where it is withheld. A third, *supervised*, is
what both are measured against.

Where the reference's code slips, its way is a setting and the sane one the default:

* ``augment.guess_is_category``: pixels to be guessed count as one category when a crop is chosen.
* ``selftrain.threshold_overwrites_seen``: unsure pixels are ignored even where the truth is known.
* ``void_from_truth``: annotation-free training leaves out what the truth calls background or void.
* ``student.backbone``: its ViT configs named r101 build a ResNet-50: ``--set backbone=resnet50c``.

A resumed run of it repeats the guided phase; ours never does.

Where labels come from a table (``selftrain.teacher: table``), a pixel has the best of all classes that the
table knows. The reference's zero-shot form takes the best of the unseen ones: its recipes here run the frozen
CLIP on every crop as it does (``online``). A table that was labelled with the unseen names alone gives the
same, and cheaper.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from models.errors import WrongUse
from models.student.deeplab import StudentConfig
from pipeline.files.recipes import Recipe, RecipeBook
from pipeline.training.loop.settings import LoopSettings
from pipeline.training.maskclip_plus.task import NEVER, SelfTrainSettings
from pipeline.training.samples.augment import AugmentSettings


class MaskClipPlusRecipe(Recipe):
    """How a label table becomes a student (MaskCLIP+, arXiv 2112.01071, section 3.4)."""

    student: StudentConfig = StudentConfig()
    """The network; ``student.embed_dim`` is taken from the teacher's CLIP whatever it says."""
    text: str = ""
    """CLIP whose text tower classifies, ``NAME:PRETRAINED``; empty is the teacher's own."""
    backbone_weights: str = "imagenet"
    """What the backbone starts from: ``imagenet``, a file, or ``none``."""
    augment: AugmentSettings = AugmentSettings()
    """How crops are made."""
    selftrain: SelfTrainSettings = SelfTrainSettings()
    """What is learned from, when; ``selftrain.guessable`` follows from the unseen classes."""
    loop: LoopSettings = LoopSettings(iterations=2000, batch_size=16)
    """Optimisation."""
    form: Literal["annotation-free", "zero-shot", "supervised"] = "annotation-free"
    """All labels are guessed; the truth of the seen classes is given; or all truth is."""
    unseen: tuple[str, ...] = ()
    """Zero-shot: classes whose truth is withheld, by name; or the one name of a zero-shot split."""
    repeat_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Repeat images with a class that fewer than this share of the images hold (repeat-factor sampling); 0
    is off."""
    min_quality: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out images whose labels have a lower quality score."""
    void_from_truth: bool = False
    """Annotation-free, but pixels that the truth ignores are left out, as the paper's code does; needs
    truth."""
    keep_average: bool = False
    """The student is the running average of its weights (``selftrain.ema_decay``), which is steadier;
    otherwise the weights of the last step, as in the paper's code."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        loop, selftrain = self.loop, self.selftrain
        ends = max(selftrain.guided[1], selftrain.self_train[0])
        if ends > loop.iterations:
            raise WrongUse(
                "setting_invalid",
                f"the phases (guided {selftrain.guided}, self_train {selftrain.self_train}) go beyond "
                f"the {loop.iterations} iterations.",
                "Change --set guided=… and --set self_train=… along with iterations.",
            )
        if bool(self.unseen) != (self.form == "zero-shot"):
            raise WrongUse(
                "setting_invalid",
                f"the form is {self.form}, and the unseen classes are {list(self.unseen)}.",
                "Zero-shot training has unseen classes, the other forms have none.",
            )
        if self.keep_average and not selftrain.ema_decay:
            raise WrongUse(
                "setting_invalid",
                "keep_average needs a running average, and ema_decay is 0.",
                "Add --set ema_decay=0.98, or --set keep_average=false.",
            )
        if self.student.learned_background and self.form == "annotation-free":
            raise WrongUse(
                "setting_invalid",
                "a learned background has no words that it could be guessed by.",
                "Train with truth for it (the other forms), or set learned_background=false.",
            )
        if selftrain.loss_over == "valid" and loop.accumulation > 1:
            raise WrongUse(
                "setting_invalid",
                f"loss_over=valid would weigh the {loop.accumulation} micro-batches of a step unevenly.",
                "Set accumulation=1, or loss_over=all.",
            )
        if self.void_from_truth and self.form != "annotation-free":
            raise WrongUse(
                "setting_invalid",
                "void_from_truth is for the annotation-free form; the others leave void out anyway.",
                "Leave void_from_truth out.",
            )
        if (self.form == "supervised") != (selftrain.guided == NEVER):
            raise WrongUse(
                "setting_invalid",
                f"the form is {self.form}, and the guided phase is {selftrain.guided}.",
                "Supervised training guesses nothing (guided and self_train (-1, -1)); the other forms do.",
            )
        return self


def _guided_then_self(guided: int) -> SelfTrainSettings:
    return SelfTrainSettings(guided=(1, guided), self_train=(guided + 1, -1), teacher="online")


_VOC = MaskClipPlusRecipe(
    name="maskclip-plus-voc20",
    loop=LoopSettings(iterations=2000, batch_size=16, checkpoint_every=500),
)
_CONTEXT = MaskClipPlusRecipe(
    name="maskclip-plus-context59",
    augment=AugmentSettings(scale=(520, 520), crop=(480, 480)),
    loop=LoopSettings(iterations=4000, batch_size=16, checkpoint_every=500),
)
_COCO = MaskClipPlusRecipe(
    name="maskclip-plus-cocostuff171",
    loop=LoopSettings(iterations=8000, batch_size=16, checkpoint_every=1000),
)
# A toy: 128 px scenes, minutes on a CPU. Class weights and the anchor are what the toy world needs beyond the
# paper: without weights the student forgets the small classes, and without the anchor it drifts.
_TOY = MaskClipPlusRecipe(
    name="toy",
    keep_average=True,
    student=StudentConfig(decoder="light", backbone="light"),
    backbone_weights="none",
    augment=AugmentSettings(scale=(128, 128), ratio_range=(1.0, 1.0), crop=(128, 128)),
    selftrain=SelfTrainSettings(
        guided=(1, 1000),
        self_train=(1001, -1),
        guided_class_power=0.8,
        anchor=1.0,
        ema_decay=0.98,
    ),
    loop=LoopSettings(
        iterations=1400,
        batch_size=4,
        optimizer="adamw",
        learning_rate=2e-3,
        weight_decay=1e-4,
        warmup=20,
        checkpoint_every=200,
        log_every=20,
    ),
)

MASKCLIP_PLUS_RECIPES = RecipeBook(
    MaskClipPlusRecipe,
    (
        _VOC,
        _VOC.replace(
            name="maskclip-plus-voc20-zero-shot",
            form="zero-shot",
            unseen=("voc20",),
            selftrain=_guided_then_self(1999),
            loop=LoopSettings(iterations=20_000, batch_size=16),
        ),
        _CONTEXT,
        # The paper's zero-shot setting on Context counts the background, which is learned as one vector.
        _CONTEXT.replace(
            name="maskclip-plus-context59-zero-shot",
            student=StudentConfig(decoder="deeplabv3plus", learned_background=True),
            form="zero-shot",
            unseen=("context60",),
            selftrain=_guided_then_self(3999),
            loop=LoopSettings(iterations=40_000, batch_size=16, learning_rate=0.004, weight_decay=1e-4),
        ),
        _COCO,
        _COCO.replace(
            name="maskclip-plus-cocostuff171-zero-shot",
            form="zero-shot",
            unseen=("cocostuff171",),
            selftrain=_guided_then_self(7999),
            loop=LoopSettings(iterations=80_000, batch_size=16),
        ),
        _TOY,
        _TOY.replace(name="toy-zero-shot", form="zero-shot", unseen=("sand", "zebra", "fish", "cloud")),
        _TOY.replace(
            name="toy-supervised",
            form="supervised",
            selftrain=SelfTrainSettings(guided=NEVER, guided_class_power=0.8, ema_decay=0.98),
        ),
    ),
    default="maskclip-plus-voc20",
)
