"""MaskCLIP+ (arXiv 2112.01071 §3.4): a student learns from CLIP's guesses, then from its own.

Shapes: B batch, C classes, G guessable classes, S T pixels of a crop, h w grid.

Both phases follow one rule: pixels marked ``GUESS``, and no others, get the best of the *guessable* classes;
known truth stays; pixels without a guess are ignored. In the guided phase the teacher guesses: MaskCLIP's
labels from the table, or the frozen CLIP on the crop. In the self-training phase the student guesses.

The phase depends on the step number alone, so a resumed run continues in its phase. (The reference counts
forward passes from the start of the process, so it repeats the guided phase when resumed.) The reference's
distillation ablation is not implemented: as published it passes no gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.clip.text import TextClassifier
from models.errors import FailedWork, WrongUse
from models.student.batchnorm import world_size
from pipeline.training.loop.protocols import GUESS, IGNORED
from pipeline.training.maskclip_plus.drift import DriftAlarm
from pipeline.training.maskclip_plus.recipes import NEVER, Phase, SelfTrainSettings
from pipeline.training.maskclip_plus.thresholds import class_thresholds, confidence_counts

if TYPE_CHECKING:
    from models.maskclip import MaskClip

_PHASE_NUMBERS: dict[Phase, float] = {"truth": 0.0, "guided": 1.0, "self": 2.0}
_RAREST = 0.01  # of an even share: lower bound on class frequencies for class weights


class Guesses(NamedTuple):
    """A guess for every pixel, used or not.

    Attributes:
        classes: int64 (B, S, T), class ids, negative where there is no guess.
        confidence: float32 (B, S, T) in [0, 1].
    """

    classes: Tensor
    confidence: Tensor


def guessable_classifier(text: TextClassifier, classes: Sequence[int]) -> TextClassifier:
    """Restrict a classifier to the guessable classes, for an online teacher.

    Key smoothing and prompt denoising then see these classes only, as in the reference.

    Args:
        text: classifier of all named classes; with a learned background its class 0 is the student's class 1.
        classes: ids *in this classifier*, ascending.

    Returns:
        A classifier of ``len(classes)`` classes in that order.
    """
    rows = [(text.class_ids == class_id).nonzero().flatten() for class_id in classes]
    new_ids = [torch.full_like(found, new) for new, found in enumerate(rows)]
    return TextClassifier(text.embeddings[torch.cat(rows)], torch.cat(new_ids), len(rows))


def online_guesses(teacher: MaskClip, images: Tensor) -> Guesses:
    """The teacher's best class for each pixel of a crop, numbered as in its classifier.

    Args:
        teacher: a frozen CLIP with the text of the classes to choose from.
        images: uint8 (B, 3, S, T) RGB.
    """
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        size = (images.shape[-2], images.shape[-1])
        scores, classes = teacher.refine(images, teacher.grid_scores(images), size)
        scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
        best, index = scores.max(1)
        if classes is not None:
            index = classes.gather(1, index.flatten(1)).view_as(index)
        temperature = teacher.confidence_temperature
        if temperature is None:  # key smoothing: share of the scores, as in models.labelmap
            confidence = best.clamp_min(0) / scores.clamp_min(0).sum(1).clamp_min(1e-30)
        else:
            confidence = (temperature * best - (temperature * scores).logsumexp(1)).exp()
        return Guesses(index, confidence.float())


def training_labels(
    labels: Tensor, guesses: Guesses, limits: Tensor, *, overwrite_below: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Merge truth and guesses into the labels to train on, by the rule of both phases.

    Args:
        labels: int (B, S, T): class ids, ``GUESS`` or ``IGNORED``.
        guesses: of the same size.
        limits: float32 (C,): minimum confidence of a guess per class; infinite for classes that must not be
            guessed.
        overwrite_below: ignore even known truth where the confidence is lower; 0 is off.

    Returns:
        Labels int64 (B, S, T), class ids or ``IGNORED``; and bool (B, S, T), the guessed pixels.
    """
    classes = guesses.classes.clamp_min(0)
    guessed = (labels == GUESS) & (guesses.classes >= 0) & (guesses.confidence >= limits[classes])
    targets = torch.where(guessed, classes, labels.long())
    targets = torch.where(targets == GUESS, IGNORED, targets)
    if overwrite_below > 0:
        targets = torch.where(guesses.confidence < overwrite_below, IGNORED, targets)
    return targets, guessed


def agreed(guesses: Guesses, others: Guesses) -> Guesses:
    """Guesses (B, S, T) where others guess the same class; no guess elsewhere."""
    same = guesses.classes == others.classes
    return Guesses(torch.where(same, guesses.classes, IGNORED), guesses.confidence)


class MaskClipPlus:
    """MaskCLIP+'s ``pipeline.training.loop.protocols.Task``.

    Batches have the columns ``image`` uint8 (B, 3, S, T); ``labels`` (B, S, T): class id (known truth),
    ``GUESS`` or ``IGNORED``; and with a table as teacher, ``teacher`` (B, S, T): class id or ``IGNORED``, and
    ``confidence`` uint8 (B, S, T).

    With several workers, synchronise batch norm; otherwise each worker has a different running average.

    Args:
        names: of the C classes, for messages.
        settings: see ``SelfTrainSettings``.
        make_student: builds the student, such as ``models.student.deeplab.DeepLab``, which maps uint8 images
            (B, 3, S, T) to logits (B, C, S, T) in fp32 or fp64.
        make_teacher: builds the online teacher on a device, with the guessable classes in ascending order
            (``guessable_classifier``).
        class_frequencies: C shares of the pixels, such as those of the teacher's labels in the whole table;
            they need not sum to 1. Required for class weights.
        some_truth: whether samples may have the truth of guessable classes, as those of
            ``pipeline.training.samples.mixed`` do: it is learned, and the rest is guessed.

    Raises:
        MaskMillError: ``setting_invalid`` for settings that do not fit the classes or the other arguments.
    """

    host_columns: frozenset[str] = frozenset()

    def __init__(
        self,
        names: Sequence[str],
        settings: SelfTrainSettings,
        make_student: Callable[[], nn.Module],
        *,
        make_teacher: Callable[[torch.device], MaskClip] | None = None,
        class_frequencies: Sequence[float] | None = None,
        some_truth: bool = False,
    ) -> None:
        self.settings = settings
        self._names = tuple(names)
        self._guessable_ids = settings.guessable_ids(len(self._names))
        self._make_student = make_student
        self._make_teacher = make_teacher
        if settings.teacher == "online" and settings.guided != NEVER and make_teacher is None:
            raise WrongUse(
                "setting_invalid",
                "teacher is 'online', but there is no CLIP to run.",
                "Name its weights, or take the guesses from a label table: teacher=table.",
            )
        powers = settings.guided_class_power, settings.self_class_power
        if any(powers) and class_frequencies is None:
            raise WrongUse(
                "setting_invalid",
                "Class weights need the frequencies of the classes, and there are none.",
                "Set guided_class_power and self_class_power to 0.",
            )
        if class_frequencies is not None and len(class_frequencies) != len(self._names):
            raise WrongUse(
                "setting_invalid",
                f"There are {len(class_frequencies)} class frequencies for {len(self._names)} classes.",
                "Count them with the ontology that is trained with.",
            )
        self._frequencies = class_frequencies
        self._some_truth = some_truth
        self._alarm = DriftAlarm(names, bound=settings.drift_bound, patience=settings.drift_patience)
        self.averaged: nn.Module | None = None
        """The running average of the student, in evaluation mode; None without ``ema_decay``."""

    def build(self, device: torch.device) -> nn.Module:
        """See ``Task.build``."""
        settings, count = self.settings, len(self._names)
        self._student = self._make_student().to(device)
        if settings.ema_decay > 0:
            self.averaged = copy.deepcopy(self._student).eval().requires_grad_(False)
        self._teacher: MaskClip | None = None
        if settings.teacher == "online" and self._make_teacher is not None and settings.guided != NEVER:
            self._teacher = self._make_teacher(device)
            assert self._teacher.text.num_classes == len(self._guessable_ids), "guessable classes only"
        self._guessable = torch.tensor(self._guessable_ids, dtype=torch.int64, device=device)
        self._may_guess = torch.zeros(count, dtype=torch.bool, device=device)
        self._may_guess[self._guessable] = True
        self._weights: dict[Phase, Tensor | None] = {
            "truth": self._class_weights(settings.guided_class_power, device),
            "guided": self._class_weights(settings.guided_class_power, device),
            "self": self._class_weights(settings.self_class_power, device),
        }
        counts = confidence_counts(*2 * (torch.zeros(0, dtype=torch.int64, device=device),), count)
        # Counts of this step and worker, and running averages over steps and workers.
        self._predicted, self._guessed = counts.clone(), counts.clone()
        self._running_predicted, self._running_guessed = counts.sum(1).double(), counts.double()
        return self._student

    def loss(
        self, module: nn.Module, batch: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """See ``Task.loss``.

        Raises:
            MaskMillError: ``training_failed`` if the batch contains the truth of a guessable class,
                ``ontology_invalid`` for labels beyond the classes.
        """
        settings, phase = self.settings, self.settings.phase(step)
        images, labels = batch["image"], batch["labels"]
        self._check_truth(labels)
        if settings.freeze_batchnorm and phase == "self":
            _freeze_batchnorm(module)
        logits = module(images)

        own = self._best_guess(logits.detach()) if phase != "truth" else None
        taught = (
            self._teacher_guesses(batch)
            if phase == "guided" or (phase == "self" and (settings.anchor or settings.agreement))
            else None
        )
        if phase == "self" and self.averaged is not None:
            with torch.no_grad():
                guesses: Guesses | None = self._best_guess(self.averaged(images))
        else:
            guesses = taught if phase == "guided" else own

        if own is not None and guesses is not None:
            counts = self._count(own, labels)
            self._predicted += counts
            # Thresholds follow whoever guesses in self-training; until then, the student's predictions.
            self._guessed += counts if phase == "guided" or guesses is own else self._count(guesses, labels)
        if phase == "self" and settings.agreement:
            assert guesses is not None and taught is not None
            guesses, taught = agreed(guesses, taught), agreed(taught, guesses)
        value, targets, guessed = self._cross_entropy(logits, labels, guesses, phase)
        if phase == "self" and settings.anchor and taught is not None:
            value = value + settings.anchor * self._cross_entropy(logits, labels, taught, "guided")[0]
        return value, self._figures(value, targets, guessed, guesses, own, phase)

    def after_step(self, step: int) -> None:
        """See ``Task.after_step``.

        Raises:
            MaskMillError: ``self_training_collapsed``, in all workers alike.
        """
        settings, phase = self.settings, self.settings.phase(step)
        if self.averaged is not None:
            self._average(step)
        if phase == "truth":
            return
        step_counts = torch.stack([self._predicted, self._guessed])
        self._predicted.zero_()
        self._guessed.zero_()
        predicted, guessed = _summed(step_counts)
        for running, new in (
            (self._running_predicted, predicted.sum(1)),
            (self._running_guessed, guessed),
        ):
            running.mul_(settings.statistics_decay).add_(new, alpha=1 - settings.statistics_decay)
        if step == settings.guided[1]:
            self._alarm.set_reference(step, self._running_predicted)
        elif phase == "self":
            self._alarm.check(step, self._running_predicted)

    def milestones(self) -> Sequence[int]:
        """See ``Task.milestones``: the last step of each phase that ends."""
        return [last for _, last in (self.settings.guided, self.settings.self_train) if last != -1]

    def state_dict(self) -> dict[str, Any]:
        """See ``Task.state_dict``."""
        state: dict[str, Any] = {
            "predicted": self._running_predicted,
            "guessed": self._running_guessed,
            "alarm": self._alarm.state_dict(),
        }
        if self.averaged is not None:
            state["averaged"] = self.averaged.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``Task.load_state_dict``.

        Raises:
            MaskMillError: ``weights_do_not_fit`` if it was written with other classes, or without a required
                running average.
        """
        fits = state["guessed"].shape == self._running_guessed.shape
        if not fits or (self.averaged is not None and "averaged" not in state):
            raise WrongUse(
                "weights_do_not_fit",
                "The checkpoint was written with other classes or without a running average (ema_decay).",
                "Use the settings that the run was started with, or start a new run.",
            )
        self._running_predicted.copy_(state["predicted"])
        self._running_guessed.copy_(state["guessed"])
        self._alarm.load_state_dict(state["alarm"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])

    # --- guesses ----------------------------------------------------------------------------------------

    def _best_guess(self, logits: Tensor) -> Guesses:
        """The best guessable class of logits (B, C, S, T), and its probability among these classes."""
        if len(self._guessable_ids) < len(self._names):
            logits = logits[:, self._guessable]
        best, index = logits.max(1)
        return Guesses(self._guessable[index], (best - logits.logsumexp(1)).exp().float())

    def _teacher_guesses(self, batch: Mapping[str, Tensor]) -> Guesses:
        if self._teacher is None:
            return Guesses(batch["teacher"].long(), batch["confidence"].float() / 255)
        guesses = online_guesses(self._teacher, batch["image"])
        return Guesses(self._guessable[guesses.classes], guesses.confidence)

    def _count(self, guesses: Guesses, labels: Tensor) -> Tensor:
        return confidence_counts(
            guesses.classes, guesses.confidence, len(self._names), counted=labels == GUESS
        )

    def _limits(self, phase: Phase) -> Tensor:
        """Minimum confidence of a guess (C,); infinite for classes that are not guessable."""
        settings = self.settings
        if phase == "self":
            limits = class_thresholds(
                self._running_guessed,
                settings.self_threshold,
                rule=settings.threshold_rule,
                keep=settings.threshold_keep,
            )
        else:
            limits = class_thresholds(self._running_guessed, settings.guided_threshold, rule="fixed")
        return torch.where(self._may_guess, limits, torch.inf)

    # --- loss -------------------------------------------------------------------------------------------

    def _check_truth(self, labels: Tensor) -> None:
        # The host waits for a GPU here: once if nothing is known, twice if all is right.
        highest = int(labels.max())
        if highest < 0:
            return
        if highest < len(self._names):
            if self._some_truth:
                return
            right = (labels < 0) | (~self._may_guess)[labels.clamp_min(0)]
            if bool(right.all()):
                return
        counts = torch.bincount(labels[labels >= 0], minlength=len(self._names))
        if len(counts) > len(self._names):
            raise WrongUse(
                "ontology_invalid",
                f"A label is {len(counts) - 1}; the classes are 0 to {len(self._names) - 1}.",
                "Give the ignore index of the labels, or train with the ontology they were made with.",
            )
        leaked = (counts * self._may_guess).nonzero().flatten().tolist()
        found = ", ".join(f"{self._names[c]} ({int(counts[c])} pixels)" for c in leaked)
        raise FailedWork(
            "training_failed",
            f"A batch holds the truth of classes that are to be guessed: {found}.",
            "Hide these classes' truth from the training samples, or take them out of guessable.",
        )

    def _cross_entropy(
        self, logits: Tensor, labels: Tensor, guesses: Guesses | None, phase: Phase
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, the labels it was computed on, and which of these were guessed."""
        settings = self.settings
        if guesses is None:
            guessed = torch.zeros_like(labels, dtype=torch.bool)
            targets = torch.where(labels == GUESS, IGNORED, labels.long())
        else:
            base = settings.self_threshold if phase == "self" else settings.guided_threshold
            targets, guessed = training_labels(
                labels,
                guesses,
                self._limits(phase),
                overwrite_below=base if settings.threshold_overwrites_seen else 0.0,
            )
        weights = self._weights[phase]
        losses = F.cross_entropy(
            logits,
            targets,
            weight=None if weights is None else weights.to(logits.dtype),
            ignore_index=IGNORED,
            reduction="none",
        )
        if settings.confidence_weight and guesses is not None:
            losses = torch.where(guessed, losses * guesses.confidence, losses)
        if settings.loss_over == "all":
            return losses.mean(), targets, guessed
        # The loop averages over workers, so divide by the mean count of valid pixels.
        valid = _summed((targets != IGNORED).sum().double()) / world_size()
        return losses.sum() / valid.clamp_min(1).to(losses.dtype), targets, guessed

    def _class_weights(self, power: float, device: torch.device) -> Tensor | None:
        """Class weights (C,): frequency ** -power with a mean of 1 over the pixels; None if power is 0."""
        if power == 0:
            return None
        shares = torch.tensor(self._frequencies, dtype=torch.float64)
        shares = (shares / shares.sum()).clamp_min(_RAREST / len(shares))
        weights = shares.pow(-power)
        return (weights * shares.sum() / (weights * shares).sum()).to(device, torch.float32)

    def _figures(
        self,
        value: Tensor,
        targets: Tensor,
        guessed: Tensor,
        guesses: Guesses | None,
        own: Guesses | None,
        phase: Phase,
    ) -> dict[str, Tensor]:
        nothing = torch.zeros((), device=targets.device)
        count = guessed.sum().clamp_min(1)
        confidence = agreement = nothing
        if guesses is not None and own is not None:
            confidence = (guesses.confidence * guessed).sum() / count
            agreement = ((own.classes == guesses.classes) & guessed).sum() / count
        return {
            "loss": value.detach(),
            "phase": nothing + _PHASE_NUMBERS[phase],
            "guessed": guessed.float().mean(),
            "ignored": (targets == IGNORED).float().mean(),
            "guess_confidence": confidence,
            "agreement": agreement,
            "drift": nothing + self._alarm.drift,
        }

    # --- running average --------------------------------------------------------------------------------

    @torch.no_grad()
    def _average(self, step: int) -> None:
        """Update the running average of the student's parameters and batch norm statistics.

        The decay is lower early on, so that the random initial weights fade quickly.
        """
        assert self.averaged is not None
        student, averaged = self._student.state_dict(), self.averaged.state_dict()
        names = [name for name, value in averaged.items() if value.is_floating_point()]
        # Few kernels for all tensors, where a GPU would be given several hundred.
        update = get_ema_multi_avg_fn(min(self.settings.ema_decay, (1 + step) / (10 + step)))
        update([averaged[name] for name in names], [student[name] for name in names], step)
        for name in averaged.keys() - set(names):
            averaged[name].copy_(student[name])


def _freeze_batchnorm(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)):
            part.eval()


def _summed(values: Tensor) -> Tensor:
    """Sum over all workers, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values
