from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models.clip.text import TextClassifier
from models.errors import MaskMillError
from models.labelmap import Subset, label_map
from models.settings import MaskClipSettings, StudentConfig
from models.student.batchnorm import synchronise_batchnorm
from models.student.deeplab import DeepLab
from pipeline.toyworld import scenes as toyworld
from pipeline.training.loop.protocols import GUESS, IGNORED
from pipeline.training.maskclip_plus.recipes import NEVER, SelfTrainSettings
from pipeline.training.maskclip_plus.task import (
    Guesses,
    MaskClipPlus,
    guessable_classifier,
    online_guesses,
    training_labels,
)
from pipeline.training.maskclip_plus.thresholds import class_thresholds

ROOT = Path(__file__).resolve().parents[4]
CPU = torch.device("cpu")
NAMES = ("grass", "water", "sky", "fish", "cloud")
C = len(NAMES)
UNSEEN = (1, 3)
FREQUENCIES = (0.5, 0.25, 0.15, 0.08, 0.02)
TWO_PHASES = {"guided": (1, 3), "self_train": (4, -1)}


@pytest.fixture(autouse=True)
def _one_thread():
    """These networks are far too small for more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _text(classes: int, channels: int = 12, seed: int = 0) -> TextClassifier:
    rows = torch.randn(classes, channels, generator=torch.Generator().manual_seed(seed))
    return TextClassifier(F.normalize(rows, dim=1), torch.arange(classes), classes)


def _student(classes: int = C) -> DeepLab:
    torch.manual_seed(1)
    config = StudentConfig(decoder="light", backbone="light", embed_dim=12, width=8, depth=1)
    return DeepLab(config, _text(classes)).double()


def _task(**settings) -> MaskClipPlus:
    return MaskClipPlus(NAMES, SelfTrainSettings(**settings), _student, class_frequencies=FREQUENCIES)


def _batch(step: int, *, guessable: tuple[int, ...] | None = None, count: int = 2) -> dict[str, torch.Tensor]:
    """Random pixels; known truth of the classes that are not guessable, pixels to guess, and ignored ones."""
    rng = np.random.default_rng(step)
    guessable = tuple(range(C)) if guessable is None else guessable
    known = [c for c in range(C) if c not in guessable]
    size = (count, 24, 20)
    return {
        "image": torch.from_numpy(rng.integers(0, 256, (count, 3, *size[1:]), dtype=np.uint8)),
        "labels": torch.from_numpy(rng.choice([*known, GUESS, GUESS, IGNORED], size).astype(np.int32)),
        "teacher": torch.from_numpy(rng.choice([*guessable, IGNORED], size).astype(np.int32)),
        "confidence": torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8)),
    }


def _update(
    module: nn.Module,
    task: MaskClipPlus,
    step: int,
    batch: dict[str, torch.Tensor],
    rate: float = 0.05,
) -> dict[str, float]:
    """One step of plain gradient descent."""
    value, figures = task.loss(module, batch, step)
    module.zero_grad()
    value.backward()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter -= rate * parameter.grad
    task.after_step(step)
    return {name: float(figure) for name, figure in figures.items()}


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guided", "self_train", "phases"),
    [
        ((1, -1), NEVER, "ggggg"),
        ((1, 3), NEVER, "gggtt"),
        ((1, 2), (3, -1), "ggsss"),
        ((1, 2), (3, 4), "ggsst"),
        ((1, 1), (2, 2), "gsttt"),
        (NEVER, NEVER, "ttttt"),
    ],
)
def test_phase_is_a_function_of_the_step(guided, self_train, phases):
    settings = SelfTrainSettings(guided=guided, self_train=self_train)
    assert "".join(settings.phase(step)[0] for step in range(1, 6)) == phases
    task = MaskClipPlus(NAMES, settings, _student)
    ends = [step for step in range(1, 5) if phases[step - 1] != phases[step] and phases[step - 1] != "t"]
    assert [last for last in task.milestones() if last < 5] == ends


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"guided": (1, 10), "self_train": (10, -1)}, "overlaps"),
        ({"guided": (1, 10), "self_train": (12, -1)}, "gap"),
        ({"guided": (1, -1), "self_train": (12, -1)}, "never ends"),
        ({"guided": NEVER, "self_train": (1, -1)}, "begin with a guided phase"),
        ({"guided": (2, -1)}, "begin with step 1"),
        ({"guided": (0, 5)}, "count from 1"),
        ({"guided": (1, 5), "self_train": (6, 3)}, "count from 1"),
        ({"teacher": "mentor"}, "'table' or 'online'"),
        ({"threshold_rule": "median"}, "'fixed', 'relative' or 'quantile'"),
        ({"threshold_rule": "relative"}, "self_threshold"),
        ({"loss_over": "some"}, "'all' or 'valid'"),
        ({"self_threshold": 1.5}, "less than or equal to 1"),
        ({"self_class_power": -0.1}, "greater than or equal to 0"),
        ({"ema_decay": 1.0}, "less than 1"),
        ({"threshold_keep": 0.0}, "greater than 0"),
        ({"drift_bound": 0.0}, "greater than 0"),
        ({"drift_patience": 0}, "greater than or equal to 1"),
        ({"anchor": -1.0}, "greater than or equal to 0"),
        ({"guessable": (1, 1)}, "each once"),
        ({"guessable": (C,)}, "classes are 0 to 4"),
        ({"guessable": ()}, "[-1, -1]"),
        ({"teacher": "online"}, "teacher=table"),
    ],
)
def test_invalid_settings_are_refused(settings, words):
    with pytest.raises(MaskMillError) as caught:
        MaskClipPlus(NAMES, SelfTrainSettings(**settings), _student)
    assert caught.value.code == "setting_invalid"
    assert words in str(caught.value)


def test_spans_may_be_lists_as_in_recipe_files():
    settings = SelfTrainSettings(guided=[1, 4], self_train=[-1, -1], guessable=[3, 1])
    assert settings == SelfTrainSettings(guided=(1, 4), guessable=(3, 1))
    assert settings.phase(9) == "truth" and settings.guessable_ids(C) == (1, 3)


def test_class_weights_need_fitting_frequencies():
    settings = SelfTrainSettings(guided_class_power=0.5)
    for frequencies in (None, (0.5, 0.5)):
        with pytest.raises(MaskMillError, match="frequencies"):
            MaskClipPlus(NAMES, settings, _student, class_frequencies=frequencies)


# --- the label rule and the loss, pixel by pixel ------------------------------------------------------------


def _softmax(values: np.ndarray) -> np.ndarray:
    shifted = np.exp(values - values.max())
    return shifted / shifted.sum()


def _by_hand(logits, own_logits, batch, settings, phase, limits, power, others=None):
    """Loss and figures from a loop over pixels; (B, C, S, T) logits of the student and of the guesser.

    Where ``others`` (B, S, T) are other classes, nothing is guessed.
    """
    guessable = settings.guessable_ids(C)
    shares = np.array(FREQUENCIES) / sum(FREQUENCIES)
    weights = shares**-power / (shares * shares**-power).sum()
    total, valid, guessed, ignored, sure, agreed = 0.0, 0, 0, 0, 0.0, 0
    labels = batch["labels"].numpy()
    for b, y, x in np.ndindex(labels.shape):
        if phase == "self":
            p = _softmax(own_logits[b, list(guessable), y, x])
            guess, confidence = guessable[int(p.argmax())], p.max()
        else:
            guess = int(batch["teacher"][b, y, x])
            confidence = int(batch["confidence"][b, y, x]) / 255
        if others is not None and others[b, y, x] != guess:
            guess = IGNORED
        target, is_guess = labels[b, y, x], False
        if target == GUESS:
            is_guess = guess != IGNORED and confidence >= limits[guess]
            target = guess if is_guess else IGNORED
        base = settings.self_threshold if phase == "self" else settings.guided_threshold
        if settings.threshold_overwrites_seen and confidence < base:
            target = IGNORED
        if is_guess:
            guessed += 1
            sure += confidence
            student = guessable[int(logits[b, list(guessable), y, x].argmax())]
            agreed += student == guess
        if target == IGNORED:
            ignored += 1
            continue
        valid += 1
        value = -weights[target] * math.log(_softmax(logits[b, :, y, x])[target])
        total += value * (confidence if is_guess and settings.confidence_weight else 1)
    pixels = labels.size
    figures = {
        "loss": total / (pixels if settings.loss_over == "all" else max(1, valid)),
        "phase": {"guided": 1, "self": 2}[phase],
        "guessed": guessed / pixels,
        "ignored": ignored / pixels,
        "guess_confidence": sure / max(1, guessed),
        "agreement": agreed / max(1, guessed),
    }
    return figures


@pytest.mark.parametrize("phase", ["guided", "self"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"guessable": UNSEEN},
        {"guided_threshold": 0.6, "self_threshold": 0.3},
        {"guessable": UNSEEN, "guided_threshold": 0.6, "self_threshold": 0.6},
        {
            "guessable": UNSEEN,
            "guided_threshold": 0.6,
            "self_threshold": 0.6,
            "threshold_overwrites_seen": True,
            "loss_over": "valid",
        },
        {"guessable": UNSEEN, "loss_over": "valid", "confidence_weight": True},
        {"guided_class_power": 0.8, "self_class_power": 0.3, "guessable": UNSEEN},
        {"ema_decay": 0.9, "self_threshold": 0.25},
        {"guessable": UNSEEN, "anchor": 0.5, "guided_class_power": 0.8, "ema_decay": 0.5},
        {"guessable": UNSEEN, "agreement": True, "self_threshold": 0.3},
        {"anchor": 0.5, "agreement": True, "guided_class_power": 0.8, "ema_decay": 0.5},
    ],
)
def test_loss_and_figures_are_those_of_a_loop_over_pixels(phase, changes):
    task = _task(**TWO_PHASES, **changes)
    settings, step = task.settings, 1 if phase == "guided" else 5
    module = task.build(CPU).train()
    for before in range(1, 3):  # the running average departs from the student
        _update(module, task, before, _batch(before, guessable=settings.guessable))
    batch = _batch(9, guessable=settings.guessable)
    with torch.no_grad():
        logits = module(batch["image"]).numpy()
        guesser = logits if task.averaged is None else task.averaged(batch["image"]).numpy()
    _, figures = task.loss(module, batch, step)

    powers = settings.guided_class_power, settings.self_class_power
    base = settings.guided_threshold if phase == "guided" else settings.self_threshold
    agreement = phase == "self" and settings.agreement
    guessable = np.array(settings.guessable_ids(C))
    students = guessable[guesser[:, guessable].argmax(1)] if agreement else None
    expected = _by_hand(
        logits,
        guesser,
        batch,
        settings,
        phase,
        np.full(C, base),
        powers[0 if phase == "guided" else 1],
        batch["teacher"].numpy() if agreement else None,
    )
    if phase == "self" and settings.anchor:
        limits = np.full(C, settings.guided_threshold)
        anchored = _by_hand(logits, None, batch, settings, "guided", limits, powers[0], students)
        expected["loss"] += settings.anchor * anchored["loss"]
    assert 0 < expected["guessed"] < 1 and 0 < expected["ignored"] < 1
    assert {name: float(figures[name]) for name in expected} == pytest.approx(expected, abs=2e-6)
    assert figures["drift"] == 0


@pytest.mark.parametrize("guessable", [UNSEEN, (0, 2, 4)])
@pytest.mark.parametrize("overwrite", [0.0, 0.5])
def test_label_rule_with_a_limit_per_class(guessable, overwrite):
    batch = _batch(3, guessable=guessable)
    rng = np.random.default_rng(0)
    guesses = rng.choice([*range(C), IGNORED], batch["labels"].shape)
    confidence = rng.random(guesses.shape, dtype=np.float32)
    limits = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9])
    limits[[c for c in range(C) if c not in guessable]] = torch.inf
    targets, guessed = training_labels(
        batch["labels"],
        Guesses(torch.from_numpy(guesses), torch.from_numpy(confidence)),
        limits,
        overwrite_below=overwrite,
    )
    for at, label in np.ndenumerate(batch["labels"].numpy()):
        take = label == GUESS and guesses[at] in guessable and confidence[at] >= limits[guesses[at]]
        expected = guesses[at] if take else IGNORED if label == GUESS else label
        if confidence[at] < overwrite:
            expected = IGNORED
        assert targets[at] == expected
        assert guessed[at] == take


def test_a_batch_without_valid_pixels_has_a_differentiable_loss_of_zero():
    for changes in ({}, {"loss_over": "valid"}):
        task = _task(**TWO_PHASES, **changes)
        module = task.build(CPU).train()
        batch = _batch(0)
        batch["labels"].fill_(IGNORED)
        for step in (1, 5):
            figures = _update(module, task, step, batch)
            assert figures["loss"] == 0 and figures["ignored"] == 1 and math.isfinite(figures["agreement"])


def test_after_the_phases_only_truth_is_used():
    task = _task(guided=(1, 1), guessable=UNSEEN)
    module = task.build(CPU).train()
    batch = _batch(0, guessable=UNSEEN)
    value, figures = task.loss(module, batch, 2)
    targets = torch.where(batch["labels"] == GUESS, IGNORED, batch["labels"].long())
    sums = F.cross_entropy(module(batch["image"]), targets, reduction="sum")
    assert value.item() == pytest.approx(sums.item() / targets.numel())
    assert figures["guessed"] == 0 and figures["phase"] == 0


# --- truth must not leak ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4])
def test_one_pixel_of_hidden_truth_stops_the_training(step):
    task = _task(**TWO_PHASES, guessable=UNSEEN)
    module = task.build(CPU)
    batch = _batch(0, guessable=UNSEEN)
    task.loss(module, batch, step)
    batch["labels"][1, 2, 3] = 3
    with pytest.raises(MaskMillError, match=r"fish \(1 pixels\)") as caught:
        task.loss(module, batch, step)
    assert caught.value.code == "training_failed"


@pytest.mark.parametrize("step", [1, 4])
def test_truth_of_some_images_is_learned_and_not_guessed_over(step):
    task = MaskClipPlus(NAMES, SelfTrainSettings(**TWO_PHASES), _student, some_truth=True)
    module = task.build(CPU).eval()
    batch = _batch(0)
    truth = batch["labels"][0].clone().fill_(3)
    batch["labels"][0] = truth
    value, figures = task.loss(module, batch, step)
    logits = module(batch["image"])
    # The same by hand: the first image on its truth, the second on the guesses.
    alone = {name: values[1:] for name, values in batch.items()}
    guessed, _ = task.loss(module, alone, step)
    known = torch.nn.functional.cross_entropy(logits[:1], truth[None].long(), reduction="sum")
    assert guessed.item() > 0 and figures["guessed"] <= 0.5
    torch.testing.assert_close(value, (known / truth.numel() + guessed) / 2)
    with pytest.raises(MaskMillError, match="the classes are 0 to"):
        task.loss(module, batch | {"labels": batch["labels"].clone().fill_(200)}, step)


def test_labels_beyond_the_classes_are_reported():
    task = _task()
    batch = _batch(0)
    batch["labels"][0, 0, 0] = 255
    with pytest.raises(MaskMillError, match="255") as caught:
        task.loss(task.build(CPU), batch, 1)
    assert caught.value.code == "ontology_invalid"


# --- the frozen CLIP on the crop ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"pd_threshold": 0.5},
        {"ks_threshold": 1.0, "ks_axis": "channel", "pd_threshold": 0.3},
        {"refine": "pamr", "refine_classes": 3},
    ],
)
def test_online_teacher_guesses_among_the_guessable_classes_only(config):
    # Imported here because the subprocesses of another test would spend seconds on it.
    from models.clip.loading import load_clip
    from models.clip.refiners.base import RefineOptions, refine
    from models.clip.text import build_text_classifier
    from models.denoising import key_smoothing, prompt_denoising
    from models.maskclip import IMAGENET_MEAN, IMAGENET_STD, MaskClip

    clip = load_clip("toyclip", "bundled")
    text = build_text_classifier(
        clip, [[name] for name in toyworld.CLASSES], templates=["a photo of a {}.", "a {} in the scene."]
    )
    guessable = (0, 3, 6, 9, 12, 13)
    teacher = MaskClip(clip, guessable_classifier(text, guessable), MaskClipSettings(**config))
    task = MaskClipPlus(
        toyworld.CLASSES,
        SelfTrainSettings(teacher="online", guessable=guessable),
        lambda: _student(len(toyworld.CLASSES)),
        make_teacher=lambda device: teacher,
    )
    module = task.build(CPU)
    images = torch.from_numpy(toyworld.generate(3, 2, 64).images).permute(0, 3, 1, 2)
    labels = torch.full((2, 64, 64), GUESS)
    guesses = online_guesses(teacher, images)

    whole = MaskClip(clip, text, MaskClipSettings(ks_axis=config.get("ks_axis", "token")))
    scores = whole.grid_scores(images)[:, list(guessable)]
    scores = prompt_denoising(scores, config.get("pd_threshold", 0.0))
    if "ks_threshold" in config:
        with_keys = MaskClip(clip, text, MaskClipSettings(**config))
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.inference_mode():
            keys = with_keys.encoder((images / 255 - mean) / std).keys
        scores = key_smoothing(scores, keys, config["ks_threshold"], axis=config["ks_axis"])
    for image in range(2):
        if "refine" in config:
            one = refine(
                "pamr",
                images[image : image + 1],
                scores[image : image + 1],
                (64, 64),
                RefineOptions(classes=3),
            )
            assert one.classes is not None
            refined, subset = one.scores[0], Subset(one.classes[0], len(guessable))
        else:
            refined, subset = scores[image], None
        chosen, confidence = label_map(
            refined,
            subset=subset,
            network_size=(64, 64),
            image_size=(64, 64),
            temperature=None if "ks_threshold" in config else 100.0,
        )
        same = chosen.long() == guesses.classes[image]
        assert same.float().mean() > 0.999
        assert ((guesses.confidence[image] * 255) - confidence).abs()[same].max() < 0.6
    value, figures = task.loss(module, {"image": images, "labels": labels}, 1)
    value.backward()
    assert figures["guessed"] == 1
    targets = torch.tensor(guessable)[guesses.classes]
    assert value.item() == pytest.approx(F.cross_entropy(module(images), targets).item())


def test_a_restricted_classifier_keeps_all_rows_of_its_classes():
    text = TextClassifier(F.normalize(torch.randn(6, 4), dim=1), torch.tensor([0, 0, 1, 2, 2, 3]), 4)
    part = guessable_classifier(text, (0, 2))
    assert torch.equal(part.embeddings, text.embeddings[[0, 1, 3, 4]])
    assert part.class_ids.tolist() == [0, 0, 1, 1] and part.num_classes == 2


# --- running average, batch norm, resuming ------------------------------------------------------------------


def test_running_average_follows_parameters_and_buffers():
    task = _task(**TWO_PHASES, ema_decay=0.6)
    module = task.build(CPU).train()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    for step in range(1, 7):
        _update(module, task, step, _batch(step))
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            floating = value.is_floating_point()
            expected[name] = decay * expected[name] + (1 - decay) * value if floating else value.clone()
    averaged = task.averaged.state_dict()
    assert any("running_var" in name for name in averaged)
    for name, value in expected.items():
        torch.testing.assert_close(averaged[name], value, rtol=1e-12, atol=1e-12)
    assert not task.averaged.training and not any(p.requires_grad for p in task.averaged.parameters())
    assert torch.equal(averaged["text_rows"], module.state_dict()["text_rows"])


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_batch_norms_keep_the_statistics_of_the_guided_phase(frozen):
    task = _task(**TWO_PHASES, freeze_batchnorm=frozen)
    module = task.build(CPU).train()
    seen = []
    for step in range(1, 6):
        _update(module.train(), task, step, _batch(step))  # the loop may switch to training mode at any time
        seen.append(torch.cat([b.flatten() for n, b in module.named_buffers() if "running" in n]))
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert changed == [True, True, not frozen, not frozen]


@pytest.mark.parametrize("at", [2, 3, 5])
def test_a_resumed_run_equals_an_uninterrupted_one(at):
    changes = {**TWO_PHASES, "ema_decay": 0.5, "self_threshold": 0.3, "threshold_rule": "quantile"}

    def resumable(start: int, stop: int, state=None):
        task = _task(**changes)
        module = task.build(CPU).train()
        if state is not None:
            module.load_state_dict(state[0])
            task.load_state_dict(state[1])
        figures = [_update(module, task, step, _batch(step)) for step in range(start, stop + 1)]
        return figures, (module.state_dict(), task.state_dict())

    whole, (weights, state) = resumable(1, 7)
    first, left = resumable(1, at)
    file = {"weights": left[0], "task": left[1]}
    buffer = io.BytesIO()
    torch.save(file, buffer)
    buffer.seek(0)
    read = torch.load(buffer, weights_only=True)
    second, (resumed_weights, resumed_state) = resumable(at + 1, 7, (read["weights"], read["task"]))
    assert first + second == whole
    assert [figure["phase"] for figure in second] == [1.0] * (3 - at) + [2.0] * (7 - max(at, 3))
    assert all(torch.equal(weights[name], resumed_weights[name]) for name in weights)
    assert torch.equal(state["guessed"], resumed_state["guessed"])
    assert state["alarm"]["drift"] == resumed_state["alarm"]["drift"] > 0


def test_state_of_another_run_is_refused():
    task = _task(**TWO_PHASES, ema_decay=0.5)
    task.build(CPU)
    state = task.state_dict()
    other = MaskClipPlus(NAMES[:3], SelfTrainSettings(**TWO_PHASES), lambda: _student(3))
    other.build(CPU)
    for receiver, given in (
        (other, state),
        (task, {k: v for k, v in state.items() if k != "averaged"}),
    ):
        with pytest.raises(MaskMillError) as caught:
            receiver.load_state_dict(given)
        assert caught.value.code == "weights_do_not_fit"


# --- the guards, each with the failure it is there for ------------------------------------------------------


class _Colours(nn.Module):
    """A student that classifies single pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)
        nn.init.zeros_(self.layer.weight)
        nn.init.zeros_(self.layer.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images / 32 - 4)


@pytest.mark.parametrize(("rule", "survives"), [("fixed", False), ("relative", True), ("quantile", True)])
def test_adaptive_thresholds_keep_a_class_alive_that_a_fixed_one_kills(rule, survives):
    """Three colours that are easy to separate, but the teacher labels 35 % of the third as the first."""
    colours = torch.tensor([[200.0, 60, 60], [60, 60, 200], [200, 100, 60]])
    settings = SelfTrainSettings(
        guided=(1, 150),
        self_train=(151, -1),
        self_threshold=0.85,
        threshold_rule=rule,
        drift_bound=1.0,
    )
    task = MaskClipPlus(("a", "b", "weak"), settings, _Colours)
    module = task.build(CPU)
    generator = torch.Generator().manual_seed(0)

    def recall() -> float:
        return float((module(images).argmax(1) == 2)[truth == 2].float().mean())

    recalls = {}
    for step in range(1, 251):
        truth = torch.multinomial(torch.tensor([0.4, 0.4, 0.2]), 1024, True, generator=generator).view(
            1, 32, 32
        )
        noise = 4 * torch.randn(1, 3, 32, 32, generator=generator)
        images = (colours[truth].permute(0, 3, 1, 2) + noise).clamp(0, 255).to(torch.uint8)
        wrong = (truth == 2) & (torch.rand(truth.shape, generator=generator) < 0.35)
        batch = {
            "image": images,
            "labels": torch.full_like(truth, GUESS),
            "teacher": torch.where(wrong, 0, truth),
            "confidence": torch.full_like(truth, 255, dtype=torch.uint8),
        }
        figures = _update(module, task, step, batch, rate=0.5)
        if step in (150, 250):
            recalls[step] = recall()
    # Six seeds, 1 and 2 threads: 0.76 to 0.93, then 1 or 0 to three digits; guessed 0.94 to 1.
    assert recalls[150] > 0.4
    assert recalls[250] > 0.9 if survives else recalls[250] < 0.1, recalls
    assert figures["guessed"] > 0.8


class _Toy:
    """A real training on 48 scenes with a perfect teacher: any later damage is due to self-training."""

    guided, steps = 50, 90

    def __init__(self) -> None:
        scenes = toyworld.generate(5, 48, 48)
        self.images = torch.from_numpy(scenes.images).permute(0, 3, 1, 2).contiguous()
        self.truth = torch.from_numpy(scenes.labels.astype(np.int32))
        self.classes = len(toyworld.CLASSES)
        self.frequencies = np.bincount(scenes.labels.ravel(), minlength=self.classes) / scenes.labels.size

    def student(self) -> DeepLab:
        torch.manual_seed(0)
        rows = torch.linalg.qr(torch.randn(32, 32))[0][: self.classes]
        text = TextClassifier(rows, torch.arange(self.classes), self.classes)
        return DeepLab(StudentConfig(decoder="light", backbone="light", embed_dim=32, width=8, depth=1), text)

    def train(self, **changes) -> dict[str, object]:
        """Run both phases, the second until it ends or is stopped."""
        settings = SelfTrainSettings(
            guided=(1, self.guided),
            self_train=(self.guided + 1, -1),
            guided_class_power=0.8,
            statistics_decay=0.9,
            drift_patience=5,
            **changes,
        )
        task = MaskClipPlus(
            toyworld.CLASSES, settings, self.student, class_frequencies=self.frequencies.tolist()
        )
        module = task.build(CPU).train()
        optimiser = torch.optim.AdamW(module.parameters(), 5e-3)
        rng = np.random.default_rng(0)
        result: dict[str, object] = {"error": None, "drift": []}
        for step in range(1, self.steps + 1):
            chosen = torch.from_numpy(rng.integers(0, len(self.images), 8))
            truth = self.truth[chosen]
            batch = {
                "image": self.images[chosen],
                "labels": torch.full_like(truth, GUESS),
                "teacher": truth,
                "confidence": torch.full_like(truth, 255, dtype=torch.uint8),
            }
            value, figures = task.loss(module, batch, step)
            optimiser.zero_grad()
            value.backward()
            optimiser.step()
            result["drift"].append(float(figures["drift"]))
            try:
                task.after_step(step)
            except MaskMillError as error:
                result["error"] = error
                break
        return {**result, "step": step}


@pytest.fixture(scope="module")
def toy() -> _Toy:
    return _Toy()


# Over six seeds of weights and batches, with one thread, drift ended at 0.68 to 0.79 with class weights
# in self-training, and never rose above 0.19 with an anchor: this bound is nearly a factor of two from both.
BOUND = 0.35


def test_class_weights_make_self_training_run_away_and_the_alarm_stops_it(toy):
    result = toy.train(self_class_power=0.8, drift_bound=BOUND)
    error = result["error"]
    assert error is not None and error.code == "self_training_collapsed"
    assert toy.guided < result["step"] <= toy.steps
    assert f"step {toy.guided}" in error.remedy
    assert max(result["drift"][: toy.guided + 1]) == 0


@pytest.mark.slow
def test_an_anchored_student_trains_without_alarm(toy):
    result = toy.train(anchor=1.0, ema_decay=0.9, drift_bound=BOUND)
    assert result["error"] is None and result["step"] == toy.steps
    assert 0 < max(result["drift"]) < BOUND


@pytest.mark.parametrize(("bound", "stops"), [(0.5, True), (1.0, False)])
def test_the_alarm_compares_what_the_student_predicts(bound, stops):
    """After the guided phase, the student is forced to predict one class everywhere."""
    settings = SelfTrainSettings(
        guided=(1, 3), self_train=(4, -1), statistics_decay=0.0, drift_bound=bound, drift_patience=2
    )
    task = MaskClipPlus(("a", "b", "c"), settings, _Colours)
    module = task.build(CPU)
    images = torch.tensor([[200.0, 60, 60], [60, 60, 200], [60, 200, 60]])[
        torch.arange(48).view(1, 6, 8) % 3
    ].permute(0, 3, 1, 2)
    labels = torch.full((1, 6, 8), GUESS)
    batch = {
        "image": images.to(torch.uint8),
        "labels": labels,
        "teacher": torch.zeros_like(labels),
        "confidence": torch.full_like(labels, 255, dtype=torch.uint8),
    }
    with torch.no_grad():
        module.layer.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]])[:, :, None, None])

    def step(number: int) -> None:
        task.loss(module, batch, number)
        task.after_step(number)

    for number in range(1, 5):
        step(number)
    with torch.no_grad():
        module.layer.bias[2] = 100.0
    step(5)
    with (
        pytest.raises(MaskMillError, match=r"step 6.*Vanished: [ab] 33.3% to 0.0%")
        if stops
        else (contextlib.nullcontext())
    ):
        step(6)


# --- several workers ----------------------------------------------------------------------------------------

WORKED = {
    **TWO_PHASES,
    "ema_decay": 0.5,
    "self_threshold": 0.3,
    "threshold_rule": "quantile",
    "loss_over": "valid",
    "guessable": UNSEEN,
    "drift_bound": 1e-9,
    "drift_patience": 2,
}


def _work(rank: int, world: int) -> dict[str, object]:
    """Train one worker on its share of batches of four, until the alarm stops it."""
    task = _task(**WORKED)
    module: nn.Module = synchronise_batchnorm(task.build(CPU)).train()
    if world > 1:
        module = nn.parallel.DistributedDataParallel(module)
    losses: list[float] = []
    error = ""
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    for step in range(1, 9):
        batch = _batch(step, guessable=UNSEEN, count=4)
        batch["labels"][2:, :, :7] = IGNORED  # the second worker has fewer valid pixels
        try:
            figures = _update(module, task, step, {name: column[share] for name, column in batch.items()})
            losses.append(figures["loss"])
        except MaskMillError as caught:
            error = f"{caught.code} {caught.message}"
            break
    return {
        "losses": losses,
        "error": error,
        "state": task.state_dict(),
        "weights": {name.removeprefix("module."): value for name, value in module.state_dict().items()},
        "limits": class_thresholds(task.state_dict()["guessed"], 0.3, rule="quantile"),
    }


@pytest.mark.slow
def test_two_workers_agree_with_each_other_and_with_one(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(tmp_path)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    one = _work(0, 1)
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["error"] == second["error"] == one["error"]
    assert "self_training_collapsed" in one["error"] and "step 5" in one["error"]
    assert first["state"]["alarm"]["drift"] == second["state"]["alarm"]["drift"] > 0
    assert torch.equal(first["limits"], second["limits"])
    for key in ("predicted", "guessed"):
        assert torch.equal(first["state"][key], second["state"][key])
        assert torch.equal(first["state"][key], one["state"][key])
    assert first["losses"] != second["losses"]
    assert np.mean([first["losses"], second["losses"]], axis=0) == pytest.approx(one["losses"], abs=1e-9)
    for theirs, ours in (
        (first["weights"], one["weights"]),
        (first["state"]["averaged"], one["state"]["averaged"]),
        (second["state"]["averaged"], one["state"]["averaged"]),
    ):
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-7, atol=1e-9)


def _main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(_work(rank, 2), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(int(sys.argv[1]), Path(sys.argv[2]))
