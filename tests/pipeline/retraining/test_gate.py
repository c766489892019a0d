from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import MaskMillError
from models.settings import knobs
from pipeline.files.storage import open_storage
from pipeline.metrics.confusion import mean_iou
from pipeline.retraining.decision import Decision, Reason, read_decision, write_decision
from pipeline.retraining.gate import GatePolicy, decide
from pipeline.retraining.measured import Measured

POLICY = GatePolicy(resamples=1000)
NAMES = tuple(f"class {number}" for number in range(6))
WORDS = "agreement with the teacher's labels"


def world(
    *better: float,
    images: int = 60,
    seed: int = 0,
    classes: int = len(NAMES),
    of_class: dict[int, float] | None = None,
) -> list[Measured]:
    """Models on the same random images; each is right for so much more of the pixels than the first.

    Args:
        better: share of the pixels, for each model.
        images: N.
        seed: of everything.
        classes: C.
        of_class: share by class, for the last model.
    """
    rng = np.random.default_rng(seed)
    truth = np.rint(np.exp(rng.normal(7, 1, (images, classes)))).astype(np.int64)
    truth[rng.random(truth.shape) < 0.5] = 0
    truth[np.arange(images), rng.integers(0, classes, images)] += 500
    hard = rng.normal(0, 0.12, (images, 1)) + rng.normal(0, 0.1, truth.shape)
    models = []
    for number, more in enumerate(better):
        right = 0.7 + more + hard + rng.normal(0, 0.06, truth.shape)
        for at, change in (of_class or {}).items() if number == len(better) - 1 else ():
            right[:, at] += change
        correct = np.rint(truth * np.clip(right, 0, 1)).astype(np.int64)
        wrong = truth.sum(1, keepdims=True) - correct.sum(1, keepdims=True)
        models.append(
            Measured(
                name=f"model {number}",
                evaluation_set="e" * 64,
                protocol="p" * 64,
                has_truth=True,
                classes=NAMES[:classes],
                images=tuple(f"image {index:04}" for index in range(images)),
                truth=truth,
                predicted=correct + wrong // classes,
                correct=correct,
                seconds_per_image=0.1,
                model_bytes=1000,
                label_classes=NAMES,
                label_histogram=np.full(len(NAMES), 1 / len(NAMES)),
                labels_digest="d" * 64,
            )
        )
    return models


def outcome(decision: Decision, check: str) -> bool | None:
    (found,) = [reason for reason in decision.reasons if reason.check == check]
    return found.passed


def text_of(decision: Decision, check: str) -> str:
    (found,) = [reason for reason in decision.reasons if reason.check == check]
    return found.text


def failed(decision: Decision) -> list[str]:
    return [reason.check for reason in decision.failed]


# --- whether it is better ---


def test_a_better_model_is_promoted_and_the_worse_one_refused() -> None:
    champion, candidate = world(0.0, 0.06)
    decision = decide(candidate, champion, POLICY)
    assert decision.promotes and not decision.failed
    assert decision.gain is not None and decision.low is not None and decision.high is not None
    assert 0 < decision.low < decision.gain < decision.high
    assert decision.sentences()[0] == "model 1 is promoted."
    back = decide(champion, candidate, POLICY)
    assert back.verdict == "refuse" and {"gain", "interval"} <= set(failed(back))
    assert back.sentences()[0] == "model 0 is refused." and back.sentences()[1].startswith("FAILED")


def test_the_miou_is_that_of_the_summed_confusion_matrix() -> None:
    champion, candidate = world(0.0, 0.06)
    decision = decide(candidate, champion, POLICY)
    for one, found in ((candidate, decision.candidate_miou), (champion, decision.champion_miou)):
        # Any matrix with these margins and this diagonal has the same IoUs.
        true, predicted, correct = (part.sum(0) for part in (one.truth, one.predicted, one.correct))
        confusion = np.zeros((6, 7), np.int64)
        np.fill_diagonal(confusion, correct)
        confusion[:, -1] = true - correct
        union = true + predicted - correct
        assert found == pytest.approx(np.mean(correct / union))
        assert mean_iou(confusion) >= found  # without false positives


def test_a_candidate_that_is_the_champion_brings_no_gain() -> None:
    (champion,) = world(0.0)
    decision = decide(replace(champion, name="candidate"), champion, POLICY)
    assert failed(decision) == ["gain"] and text_of(decision, "gain").startswith("No gain")
    assert decision.gain == decision.low == decision.high == 0


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.floats(-0.1, 0.1), st.integers(2, 40))
def test_swapped_roles_have_the_opposite_gain(seed: int, more: float, images: int) -> None:
    one, two = world(0.0, more, seed=seed, images=images)
    forth, back = decide(two, one, POLICY), decide(one, two, POLICY)
    assert forth.gain is not None and back.gain is not None and back.low is not None
    assert forth.gain == -back.gain
    assert (forth.low, forth.high) == (pytest.approx(-(back.high or 0)), pytest.approx(-back.low))
    assert not (forth.promotes and back.promotes)


@settings(max_examples=15)
@given(st.integers(0, 10**6), st.randoms())
def test_the_order_of_the_images_does_not_matter(seed: int, random: Any) -> None:
    champion, candidate = world(0.0, 0.02, seed=seed, images=30)
    order = list(range(30))
    random.shuffle(order)
    shuffled = replace(
        candidate,
        images=tuple(candidate.images[at] for at in order),
        **{part: getattr(candidate, part)[order] for part in ("truth", "predicted", "correct")},
    )
    assert decide(shuffled, champion, POLICY) == decide(candidate, champion, POLICY)


def test_a_worse_model_that_was_lucky_is_refused() -> None:
    """It measures better on these images, but they are too few to tell."""
    for seed in range(200):
        champion, candidate = world(0.0, -0.01, images=40, seed=seed)
        decision = decide(candidate, champion, POLICY)
        if (decision.gain or 0) > 0.002:
            break
    assert outcome(decision, "gain") is True and outcome(decision, "interval") is False
    assert decision.verdict == "refuse"


# --- classes ---


def test_a_class_that_falls_is_named_though_the_mean_rises() -> None:
    champion, candidate = world(0.0, 0.08, images=200, of_class={2: -0.3})
    decision = decide(candidate, champion, POLICY)
    assert failed(decision) == ["classes"] and "class 2 from" in text_of(decision, "classes")
    assert [name for name in decision.failed[0].figures if name.startswith("gain of")] == ["gain of class 2"]
    assert decide(candidate, champion, POLICY.replace(class_fall=0.9)).promotes


def test_a_class_that_is_too_rare_is_not_judged() -> None:
    champion, candidate = world(0.0, 0.08, images=200, of_class={2: -0.3})
    pixels, images = int(champion.truth[:, 2].sum()), int((champion.truth[:, 2] > 0).sum())
    for rare in ({"class_pixels": pixels + 1}, {"class_images": images + 1}):
        decision = decide(candidate, champion, POLICY.replace(**rare))
        assert "class 2" not in text_of(decision, "classes")
        assert "too rare" in text_of(decision, "classes")
    (one,) = [reason for reason in decision.reasons if reason.check == "classes"]
    assert one.figures["too_rare"] >= 1


# --- what can be compared ---


@pytest.mark.parametrize(
    ("changes", "check", "words"),
    [
        ({"evaluation_set": "f" * 64}, "evaluation_set", "another evaluation set (ffffffffffff)"),
        ({"protocol": "q" * 64}, "protocol", "protocol, view or settings differ"),
        ({"has_truth": False}, "protocol", "one was measured against truth"),
        ({"classes": ("other", *NAMES[1:])}, "protocol", "the classes differ"),
        ({"images": ("other", *(f"image {n:04}" for n in range(1, 60)))}, "images", "2 images"),
    ],
)
def test_what_was_measured_otherwise_is_refused_without_a_gain(
    changes: dict[str, Any], check: str, words: str
) -> None:
    champion, candidate = world(0.0, 0.1)
    decision = decide(replace(candidate, **changes), champion, POLICY)
    assert failed(decision) == [check] and words in text_of(decision, check)
    assert decision.gain is None and decision.champion_miou is None
    assert not [reason for reason in decision.reasons if reason.check in ("gain", "interval", "classes")]


def test_other_true_pixels_under_the_same_digest_are_noticed() -> None:
    champion, candidate = world(0.0, 0.1)
    truth = candidate.truth + 1
    decision = decide(replace(candidate, truth=truth), champion, POLICY)
    assert failed(decision) == ["images"] and "other true pixels" in text_of(decision, "images")


def nothing(one: Measured) -> Measured:
    empty = np.empty((0, len(one.classes)), np.int64)
    return replace(one, images=(), truth=empty, predicted=empty, correct=empty)


UNSOUND: dict[str, Callable[[Measured], Measured]] = {
    "no image": nothing,
    "image is there twice": lambda one: replace(one, images=(one.images[1], *one.images[1:])),
    "no digest of the evaluation set": lambda one: replace(one, evaluation_set=""),
    "no digest of the protocol": lambda one: replace(one, protocol=""),
    "float64": lambda one: replace(one, correct=np.full(one.truth.shape, np.nan)),
    "not integers (60, 6)": lambda one: replace(one, predicted=one.predicted[:, 1:]),
    "is negative": lambda one: replace(one, correct=one.correct - 10**9),
    "more pixels are correct": lambda one: replace(one, correct=one.truth + 1),
    "more pixels are predicted": lambda one: replace(one, predicted=one.predicted * 10 + 10),
    "no pixel has a truth": lambda one: replace(
        one, **{part: np.zeros_like(one.truth) for part in ("truth", "predicted", "correct")}
    ),
    "nan seconds": lambda one: replace(one, seconds_per_image=float("nan")),
    "inf seconds": lambda one: replace(one, seconds_per_image=float("inf")),
    "a size of -1": lambda one: replace(one, model_bytes=-1),
    "does not fit their classes": lambda one: replace(one, label_histogram=np.ones(2)),
    "negative or undefined": lambda one: replace(one, label_histogram=np.full(6, np.nan)),
}


@pytest.mark.parametrize("whose", ["candidate", "champion"])
@pytest.mark.parametrize("fault", UNSOUND)
def test_what_is_no_measurement_is_refused(whose: str, fault: str) -> None:
    champion, candidate = world(0.0, 0.1)
    if whose == "candidate":
        candidate = UNSOUND[fault](candidate)
        assert decide(candidate, None, POLICY).verdict == "refuse"
    else:
        champion = UNSOUND[fault](champion)
    decision = decide(candidate, champion, POLICY)
    (reason,) = [one for one in decision.failed if one.check == "measurement"]
    assert fault in reason.text and decision.gain is None
    json.dumps(decision.model_dump(mode="json"), allow_nan=False)


def test_too_few_images_show_nothing() -> None:
    champion, candidate = world(0.0, 0.2, images=29)
    assert failed(decide(candidate, champion, POLICY)) == ["enough_images"]
    assert decide(candidate, champion, POLICY.replace(min_images=29)).promotes


# --- without a champion ---


def test_the_first_model_only_has_to_be_sound() -> None:
    (candidate,) = world(0.0)
    decision = decide(candidate, None, POLICY)
    assert decision.promotes and decision.champion is None and decision.gain is None
    assert outcome(decision, "gain") is None
    assert failed(decide(candidate, None, POLICY.replace(min_miou=0.99))) == ["min_miou"]
    assert failed(decide(candidate, None, POLICY.replace(max_seconds=0.05))) == ["latency"]
    assert failed(decide(candidate, None, POLICY.replace(max_bytes=999))) == ["size"]


# --- collapse ---


def collapsed(one: Measured, at: int | None) -> Measured:
    """A model that calls every pixel the same, or nothing."""
    predicted, correct = np.zeros_like(one.truth), np.zeros_like(one.truth)
    if at is not None:
        predicted[:, at], correct[:, at] = one.truth.sum(1), one.truth[:, at]
    return replace(one, predicted=predicted, correct=correct)


@pytest.mark.parametrize("at", [0, 3, None])
def test_a_model_that_calls_everything_the_same_has_collapsed(at: int | None) -> None:
    champion, candidate = world(0.0, 0.1)
    for decision in (decide(collapsed(candidate, at), None, POLICY),
                     decide(collapsed(candidate, at), champion, POLICY)):  # fmt: skip
        assert "collapse" in failed(decision)
        assert (NAMES[at] if at is not None else "no class") in text_of(decision, "collapse")


def test_a_collapse_is_refused_even_if_the_champion_has_collapsed_worse() -> None:
    champion, candidate = world(0.0, 0.0)
    candidate, champion = collapsed(candidate, 0), collapsed(champion, None)
    assert failed(decide(candidate, champion, POLICY)) == ["collapse"]


def test_a_dominant_class_of_the_truth_is_no_collapse() -> None:
    (one,) = world(0.0)
    truth, correct = one.truth.copy(), one.correct.copy()
    truth[:, 0] += 40 * truth.sum(1)
    correct[:, 0] = truth[:, 0]
    sound = replace(one, truth=truth, correct=correct, predicted=correct)
    assert decide(sound, None, POLICY).promotes


# --- cost and labels ---


@pytest.mark.parametrize(
    ("check", "field", "champions", "candidates", "policy", "passed"),
    [
        ("latency", "seconds_per_image", 0.1, 0.14, {}, True),
        ("latency", "seconds_per_image", 0.1, 0.16, {}, False),
        ("latency", "seconds_per_image", 0.1, 0.16, {"max_seconds_ratio": None}, None),
        ("latency", "seconds_per_image", 0.1, 0.12, {"max_seconds": 0.11}, False),
        ("latency", "seconds_per_image", None, 0.12, {}, None),
        ("latency", "seconds_per_image", None, 0.12, {"max_seconds": 0.2}, True),
        ("latency", "seconds_per_image", 0.1, None, {}, None),
        ("latency", "seconds_per_image", 0.1, None, {"max_seconds": 0.2}, False),
        ("latency", "seconds_per_image", 0.0, 0.1, {}, None),
        ("size", "model_bytes", 1000, 2000, {}, True),
        ("size", "model_bytes", 1000, 2001, {}, False),
        ("size", "model_bytes", 1000, 2001, {"max_bytes_ratio": None}, None),
        ("size", "model_bytes", 1000, 1500, {"max_bytes": 1200}, False),
        ("size", "model_bytes", 1000, None, {"max_bytes": 1200}, False),
        ("size", "model_bytes", None, None, {}, None),
    ],
)
def test_cost_is_judged_where_it_is_known_and_must_be_known_where_it_is_bounded(
    check: str, field: str, champions: Any, candidates: Any, policy: dict, passed: bool | None
) -> None:
    champion, candidate = world(0.0, 0.06)
    champion, candidate = replace(champion, **{field: champions}), replace(candidate, **{field: candidates})
    decision = decide(candidate, champion, POLICY.replace(**policy))
    assert outcome(decision, check) is passed
    assert decision.promotes == (passed is not False)


def test_labels_that_nobody_can_name_are_refused() -> None:
    champion, candidate = world(0.0, 0.06)
    for unknown in (None, ""):
        assert failed(decide(replace(candidate, labels_digest=unknown), champion, POLICY)) == ["labels"]
    # A champion of older days may lack it.
    assert decide(candidate, replace(champion, labels_digest=None), POLICY).promotes


def test_drift_of_the_labels_is_found_by_class_name() -> None:
    champion, candidate = world(0.0, 0.06)
    shares = np.array([0.9, 0.02, 0.02, 0.02, 0.02, 0.02])
    drifted = decide(replace(candidate, label_histogram=shares), champion, POLICY)
    assert failed(drifted) == ["label_drift"] and "is class 0: 16.7%" in text_of(drifted, "label_drift")
    # The same labels in another order of classes are the same labels.
    order = [3, 1, 0, 2, 5, 4]
    champion = replace(champion, label_histogram=shares)
    moved = replace(
        candidate, label_classes=tuple(NAMES[at] for at in order), label_histogram=shares[order] * 7
    )
    decision = decide(moved, champion, POLICY)
    assert outcome(decision, "label_drift") is True
    (reason,) = [one for one in decision.reasons if one.check == "label_drift"]
    assert reason.figures["divergence"] == pytest.approx(0, abs=1e-12)
    for unknown in (
        {"label_histogram": None},
        {"label_histogram": np.zeros(6)},
        {"label_histogram": None, "label_classes": None},
    ):
        assert outcome(decide(replace(candidate, **unknown), champion, POLICY), "label_drift") is None
    unbounded = POLICY.replace(max_label_drift=None)
    assert decide(replace(candidate, label_histogram=shares[::-1]), champion, unbounded).promotes


# --- words and files ---


def test_agreement_with_labels_is_called_so_by_every_reason_that_rests_on_it() -> None:
    champion, candidate = (replace(one, has_truth=False) for one in world(0.0, 0.06))
    for decision in (decide(candidate, champion, POLICY), decide(candidate, None, POLICY)):
        assert decision.promotes and not decision.has_truth
        others = ("latency", "size", "labels", "label_drift")
        resting = [one for one in decision.reasons if one.check not in others and one.figures]
        assert len(resting) >= 4 and all(WORDS in one.text for one in resting)
        assert all(WORDS not in one.text for one in decision.reasons if one.check in others)
    assert not [one for one in decide(*world(0.0, 0.1), POLICY).reasons if WORDS in one.text]


@settings(max_examples=25)
@given(
    st.integers(0, 1000),
    st.sampled_from([-0.1, 0.0, 0.1]),
    st.booleans(),
    st.sampled_from(["", *UNSOUND]),
    st.booleans(),
)
def test_a_decision_comes_back_from_its_file(
    tmp_path_factory: pytest.TempPathFactory, seed: int, more: float, truth: bool, fault: str, alone: bool
) -> None:
    champion, candidate = world(0.0, more, seed=seed)
    champion, candidate = (replace(one, has_truth=truth) for one in (champion, candidate))
    if fault:
        candidate = UNSOUND[fault](candidate)
    decision = decide(candidate, None if alone else champion, POLICY)
    storage = open_storage(tmp_path_factory.mktemp("verdict"))
    write_decision(storage, "verdict.json", decision)
    assert read_decision(storage, "verdict.json") == decision
    assert len(decision.sentences()) == 1 + len(decision.reasons)


def test_a_verdict_that_does_not_follow_from_its_reasons_is_not_believed(tmp_path: Path) -> None:
    champion, candidate = world(0.0, -0.1)
    storage = open_storage(tmp_path)
    assert read_decision(storage, "verdict.json") is None
    record = decide(candidate, champion, POLICY).model_dump(mode="json")
    storage.write_json("verdict.json", record | {"verdict": "promote"})
    with pytest.raises(MaskMillError) as caught:
        read_decision(storage, "verdict.json")
    assert caught.value.code == "file_damaged"
    storage.write_json("verdict.json", record | {"schema_version": 99})
    with pytest.raises(MaskMillError) as caught:
        read_decision(storage, "verdict.json")
    assert caught.value.code == "newer_version"


def test_every_field_of_the_policy_is_explained_and_checked() -> None:
    assert all(len(knob.description) > 15 for knob in knobs(GatePolicy))
    for wrong in ({"resamples": 999}, {"confidence": 1.0}, {"delta": -0.1}, {"max_bytes": 0}, {"typo": 1}):
        with pytest.raises(MaskMillError):
            GatePolicy(**wrong)
    assert GatePolicy(**GatePolicy().model_dump(mode="json")) == GatePolicy()


def test_a_reason_holds_finite_figures_only() -> None:
    with pytest.raises(ValueError):
        Reason(check="x", passed=True, text="x", figures={"nan": float("nan")})


# --- how often it errs ---


@pytest.mark.parametrize(
    ("more", "least", "most"),
    [
        (-0.0075, 0.0, 0.0),  # 0.8 points worse
        (0.0, 0.0, 0.4),  # as good: promoted where the interval shows that nothing is lost
        (0.026, 0.95, 1.0),  # 3 points better
    ],
)
def test_how_often_luck_decides(more: float, least: float, most: float) -> None:
    worlds = [world(0.0, more, images=200, seed=1000 + seed) for seed in range(30)]
    decisions = [decide(candidate, champion, POLICY) for champion, candidate in worlds]
    assert least <= np.mean([decision.promotes for decision in decisions]) <= most
    assert all(outcome(decision, "classes") for decision in decisions)
