"""Recipes of ``maskmill train maskclip-plus``: the reference's schedules, and the toy world's.

There are three forms. *Annotation-free*: all labels are guessed. *Zero-shot* (``-zero-shot``): the truth of
the seen classes is given, and the unseen ones are guessed where truth is withheld. *Supervised*: the baseline
for both.

Bugs of the paper's code are settings, off by default:

* ``augment.guess_is_category``: pixels to be guessed count as one category when a crop is chosen.
* ``selftrain.threshold_overwrites_seen``: unsure pixels are ignored even where the truth is known.
* ``void_from_truth``: annotation-free training ignores what the truth calls background or void.
* ``student.backbone``: its ViT configs named r101 build a ResNet-50: ``--set backbone=resnet50c``.

When resumed, the paper's code repeats the guided phase; ours does not.

With labels from a table (``selftrain.teacher: table``), the guess at a pixel is the best of all classes in
the table. The reference's zero-shot form takes the best of the unseen classes, so its recipes here run the
frozen CLIP on every crop (``online``). A table labelled with the unseen names alone gives the same result at
lower cost.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from models.errors import MaskMillError, WrongUse
from models.settings import Settings, Steps, StudentConfig, as_written
from pipeline.files.recipes import NEVER, Recipe, RecipeBook
from pipeline.training.loop.settings import LoopSettings
from pipeline.training.samples.augment import AugmentSettings

Phase = Literal["truth", "guided", "self"]
ThresholdRule = Literal["fixed", "relative", "quantile"]


class SelfTrainSettings(Settings):
    """Which labels to learn from, and when. The defaults are the reference's annotation-free form.

    A span of steps is (first, last), counted from 1 and inclusive; last = -1 is the end of training, and
    (-1, -1) is never.
    """

    guided: Annotated[tuple[int, int], Steps()] = (1, -1)
    """Steps that learn from the teacher; they begin with step 1."""
    self_train: Annotated[tuple[int, int], Steps(after="guided")] = NEVER
    """Steps that learn from the student's own guesses; they directly follow ``guided``. All other steps learn
    from truth alone."""
    teacher: Literal["table", "online"] = "table"
    """``table`` uses the batch's ``teacher`` and ``confidence``; ``online`` runs the frozen CLIP on the
    augmented crop, as the paper's code does."""
    guessable: tuple[int, ...] | None = None
    """Ids of the classes that may be guessed, and whose truth must never be seen: the unseen ones of a
    zero-shot split. None is all."""
    guided_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Ignore the teacher's guesses below this confidence, 0 to 1; 0 is off."""
    self_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Ignore the student's guesses below this confidence, 0 to 1; 0 is off."""
    threshold_rule: ThresholdRule = "fixed"
    """How to derive one threshold per class from ``self_threshold`` (not 0); see
    ``pipeline.training.maskclip_plus.thresholds``."""
    threshold_keep: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Rule ``quantile``: minimum share of each class's guesses to keep."""
    threshold_overwrites_seen: bool = False
    """Ignore unsure pixels even where the truth is known, as the paper's code does."""
    confidence_weight: bool = False
    """Weight guessed pixels in the loss by their confidence."""
    guided_class_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight classes in the loss by frequency ** -power, scaled to a mean of 1 over the pixels; 0 is off.
    Frequencies are those of the teacher's labels, so leave it off if the teacher rarely predicts a class
    whose truth is known. Applies to the guided phase, to truth alone, and to ``anchor``."""
    self_class_power: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The same for the self-training phase, where it feeds back: rare classes grow at the expense of others.
    On the toy world, 0.8 ends in collapse."""
    anchor: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the guided phase's loss added in self-training, to anchor the student to its teacher; 0 is
    off."""
    agreement: bool = False
    """In self-training, leave pixels out where teacher and student guess different classes."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Take the student's guesses from the running average of its weights, in evaluation mode, with this decay
    per step; 0 takes them from the training pass, as the paper's code does."""
    freeze_batchnorm: bool = False
    """In self-training, freeze batch norm at the statistics of the guided phase."""
    loss_over: Literal["all", "valid"] = "all"
    """Average the loss over ``all`` pixels including ignored ones, as the paper's code does, or over the
    ``valid`` pixels of all workers."""
    drift_bound: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Stop self-training when the class shares of the student's predictions have changed by more than this
    since the end of the guided phase, 0 to 1, all classes weighted equally
    (``pipeline.training.maskclip_plus.drift.relative_change``); 1 never stops."""
    drift_patience: Annotated[int, Field(ge=1)] = 20
    """Consecutive steps beyond ``drift_bound`` that stop it."""
    statistics_decay: Annotated[float, Field(ge=0, lt=1)] = 0.98
    """Decay per step of the running averages behind thresholds and drift. Their window of about
    1 / (1 - decay) steps should contain every class often enough for a stable share."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.threshold_rule != "fixed" and self.self_threshold == 0:
            raise self._wrong(
                "threshold_rule", "It adapts self_threshold, which is 0 (off): set that as well."
            )
        self._check_spans()
        guessable = self.guessable
        if guessable is not None and (len(set(guessable)) < len(guessable) or min(guessable, default=0) < 0):
            raise self._wrong("guessable", "Give class ids, each once.")
        if guessable == () and self.guided != NEVER:
            raise self._wrong("guessable", "Name classes to guess, or set guided and self_train to [-1, -1].")
        return self

    def _check_spans(self) -> None:
        for name in ("guided", "self_train"):
            first, last = getattr(self, name)
            if (first, last) != NEVER and (first < 1 or (last != -1 and last < first)):
                raise self._wrong(
                    name,
                    "Use [first, last], [first, -1] to the end, or [-1, -1] for never; steps count from 1.",
                )
        if self.guided == NEVER:
            if self.self_train != NEVER:
                raise self._wrong(
                    "self_train",
                    "A student that never had a teacher would learn noise: begin with a guided phase.",
                )
            return
        if self.guided[0] != 1:
            raise self._wrong("guided", "Nothing would be guessed before it: let it begin with step 1.")
        if self.self_train == NEVER:
            return
        if self.guided[1] == -1:
            raise self._wrong("self_train", "The guided phase never ends: give it a last step.")
        if self.self_train[0] != self.guided[1] + 1:
            kind = "overlaps" if self.self_train[0] <= self.guided[1] else "leaves a gap after"
            raise self._wrong(
                "self_train",
                f"It {kind} the guided phase {as_written(self.guided)}: "
                f"let it begin with step {self.guided[1] + 1}.",
            )

    def phase(self, step: int) -> Phase:
        """The phase of a step; steps count from 1."""
        names: tuple[tuple[Phase, tuple[int, int]], ...] = (
            ("guided", self.guided),
            ("self", self.self_train),
        )
        for name, (first, last) in names:
            if first != -1 and first <= step and (step <= last or last == -1):
                return name
        return "truth"

    def guessable_ids(self, num_classes: int) -> tuple[int, ...]:
        """Ids of the guessable classes, ascending.

        Raises:
            MaskMillError: ``setting_invalid`` for an unknown class id.
        """
        if self.guessable is None:
            return tuple(range(num_classes))
        if max(self.guessable, default=0) >= num_classes:
            raise self._wrong("guessable", f"The classes are 0 to {num_classes - 1}.")
        return tuple(sorted(self.guessable))

    def _wrong(self, name: str, remedy: str) -> MaskMillError:
        return WrongUse("setting_invalid", f"{name} cannot be {as_written(getattr(self, name))}.", remedy)


class MaskClipPlusRecipe(Recipe):
    """How to train a student on a label table (MaskCLIP+, arXiv 2112.01071, section 3.4)."""

    student: StudentConfig = StudentConfig()
    """The network; ``student.embed_dim`` is always replaced by that of the teacher's CLIP."""
    text: str = ""
    """CLIP whose text tower classifies, ``NAME:PRETRAINED``; empty takes the teacher's."""
    backbone_weights: str = "imagenet"
    """Initial weights of the backbone: ``imagenet``, a file, or ``none``."""
    augment: AugmentSettings = AugmentSettings()
    """How to augment and crop."""
    selftrain: SelfTrainSettings = SelfTrainSettings()
    """Which labels to learn from, and when; ``selftrain.guessable`` follows from the unseen classes."""
    loop: LoopSettings = LoopSettings(iterations=2000, batch_size=16)
    """Optimisation."""
    form: Literal["annotation-free", "zero-shot", "supervised"] = "annotation-free"
    """Whether all labels are guessed, the truth of the seen classes is given, or all truth is given."""
    unseen: tuple[str, ...] = ()
    """Zero-shot: names of the classes whose truth is withheld, or the name of one zero-shot split."""
    repeat_threshold: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Repeat images with a class that occurs in less than this share of the images (repeat-factor sampling);
    0 is off."""
    min_quality: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Leave out images whose labels have a lower quality score."""
    void_from_truth: bool = False
    """Annotation-free, but ignore pixels that the truth ignores, as the paper's code does; needs truth."""
    keep_average: bool = False
    """Keep the running average of the student's weights (``selftrain.ema_decay``), which is more stable, as
    the result; otherwise the weights of the last step, as in the paper's code."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        loop, selftrain = self.loop, self.selftrain
        ends = max(selftrain.guided[1], selftrain.self_train[0])
        if ends > loop.iterations:
            raise WrongUse(
                "setting_invalid",
                f"the phases (guided {as_written(selftrain.guided)}, self_train "
                f"{as_written(selftrain.self_train)}) go beyond "
                f"the {loop.iterations} iterations.",
                "Leave guided and self_train out, so that they follow iterations, or shorten them as well.",
            )
        if bool(self.unseen) != (self.form == "zero-shot"):
            raise WrongUse(
                "setting_invalid",
                f"the form is {self.form}, and the unseen classes are {as_written(self.unseen)}.",
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
                "a learned background has no words by which it could be guessed.",
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
                f"the form is {self.form}, and the guided phase is {as_written(selftrain.guided)}.",
                "Supervised training guesses nothing (guided and self_train [-1, -1]); the other forms do.",
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
# A toy: 128 px scenes, minutes on a CPU. Beyond the paper, the toy world needs class weights, without which
# the student forgets the small classes, and the anchor, without which it drifts.
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
        # The paper's zero-shot setting on Context includes the background, learned as one vector.
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
