"""The gate: may a candidate take the champion's place?

``decide`` is a pure function of two measurements and a policy. It says yes only if no check says no; each
check leaves a sentence with its figures. What cannot be known is said, and does not count, unless the policy
sets a bound for it.

C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import numpy as np
from pydantic import Field

from models.settings import Settings
from pipeline.metrics.divergence import divergence, divergence_by_name, most_moved
from pipeline.metrics.paired import Gains, iou_of_counts, miou_of_counts, paired_bootstrap
from pipeline.retraining.comparable import comparability, histogram_faults, sorted_by_name, soundness
from pipeline.retraining.decision import Decision, Reason, reason_about
from pipeline.retraining.measured import Measured

_LEAST_OF_CLASS = 100
"""A class is predicted if it gets at least a hundredth of its true pixels: a few stray ones are no class."""

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


class GatePolicy(Settings):
    """What a candidate must show to take the champion's place. Shares and IoUs are in [0, 1]."""

    resamples: Annotated[int, Field(ge=1000, le=100_000)] = 2000
    """How many times the evaluation images are drawn anew to find out how far a gain may be luck."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Share of the resamples between the ends of an interval; half of the others are below it."""
    delta: Share = 0.005
    """The lower end of the gain's interval must be above minus this: a loss that is too small to matter.
    0 asks for a gain that is more than luck."""
    min_images: Annotated[int, Field(ge=2)] = 30
    """Fewer evaluation images show nothing; intervals of so few are too narrow."""
    min_miou: Share = 0.0
    """Mean IoU that a candidate must reach, whether there is a champion or not."""
    class_fall: Share = 0.05
    """No class may fall by more than this, unless that may be luck: an interval for all classes at once
    reaches up to no fall."""
    class_pixels: Annotated[int, Field(ge=1)] = 1000
    """True pixels from which a class is judged by itself."""
    class_images: Annotated[int, Field(ge=2)] = 10
    """Images with true pixels of a class from which it is judged by itself: of fewer, luck cannot be told."""
    max_seconds_ratio: Positive | None = 1.5
    """Seconds per image, as a multiple of the champion's; null is no bound."""
    max_seconds: Positive | None = None
    """Seconds per image; if it is set, a candidate that was not timed is refused."""
    max_bytes_ratio: Positive | None = 2.0
    """Size on disk, as a multiple of the champion's; null is no bound."""
    max_bytes: Annotated[int, Field(ge=1)] | None = None
    """Size on disk in bytes; if it is set, a candidate of unknown size is refused."""
    min_classes: Share = 0.5
    """Share of the classes of the truth that a candidate must predict; fewer are a collapse."""
    max_excess: Share = 0.5
    """By how much the most frequent class of a candidate may exceed its share of the true pixels."""
    max_divergence: Share = 0.5
    """Jensen-Shannon divergence, in bits, of the predicted classes from those of the truth."""
    max_label_drift: Share | None = 0.2
    """Jensen-Shannon divergence, in bits, of the labels that candidate and champion were trained on; null is
    no bound. From (0.5, 0.5) to (0.9, 0.1) it is 0.15."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the resamples."""


def decide(candidate: Measured, champion: Measured | None, policy: GatePolicy) -> Decision:
    """Whether the candidate may take the champion's place, and why.

    The order of the images does not matter, and the same input always gives the same decision.

    How often luck decides (200 images, 6 classes, intervals 2.2 points wide; ``world`` in the tests of this
    module): a model that is 0.8 points worse was promoted in 0 of 60 worlds, one that is as good in 18 % of
    them, one that is 0.9 points better in 77 %, and one that is 1.7 or more points better in 98 % or more. An
    equally good model may pass: what the interval rules out is a loss of more than ``delta``. No class of
    them was found to fall; with an interval for each class by itself instead of one for all at once, a good
    model of 21 classes would be refused for a class that did not fall in up to half of the cases.

    Args:
        candidate: the new model.
        champion: the model in use; None if there is none yet. The candidate then only has to be sound.
        policy: the bounds.
    """
    reasons = [soundness(candidate)]
    sound = bool(reasons[0].passed)
    comparable = False
    gain = low = high = None
    if champion is not None:
        reasons.append(soundness(champion))
        comparable = all(reason.passed for reason in reasons)
    if champion is not None and comparable:
        same = comparability(candidate, champion)
        reasons += same
        comparable = all(reason.passed for reason in same)
    reasons.append(_enough_images(candidate, policy))
    if sound:
        candidate = sorted_by_name(candidate)
        reasons.append(_reaches(candidate, policy))
    if champion is None:
        reasons.append(Reason(check="gain", passed=None, text="There is no champion to compare with."))
    elif comparable:
        champion = sorted_by_name(champion)
        gain, low, high = _compare(candidate, champion, policy, reasons)
    if sound:
        reasons.append(_collapse(candidate, policy))
    reasons += _budget(candidate, champion, policy)
    reasons += _labels(candidate, champion, policy)
    refused = any(reason.passed is False for reason in reasons)
    return Decision(
        verdict="refuse" if refused else "promote",
        candidate=candidate.name,
        champion=None if champion is None else champion.name,
        has_truth=candidate.has_truth,
        evaluation_set=candidate.evaluation_set,
        images=len(candidate.images),
        candidate_miou=_miou(candidate) if sound else None,
        champion_miou=_miou(champion) if champion is not None and comparable else None,
        gain=gain,
        low=low,
        high=high,
        policy=policy.model_dump(mode="json"),
        reasons=tuple(reasons),
    )


# --- how good is it? ---


def _miou(one: Measured) -> float:
    return miou_of_counts(one.truth.sum(0), one.predicted.sum(0), one.correct.sum(0))


def _enough_images(one: Measured, policy: GatePolicy) -> Reason:
    count, least = len(one.images), policy.min_images
    enough = count >= least
    text = f"{count:,} evaluation images; at least {least:,} are asked for."
    return reason_about(one, "enough_images", enough, text, images=count, bound=least)


def _reaches(one: Measured, policy: GatePolicy) -> Reason:
    found = _miou(one)
    text = f"{one.name} has {_points(found)} mean IoU; at least {_points(policy.min_miou)} is asked for."
    return reason_about(one, "min_miou", found >= policy.min_miou, text, miou=found, bound=policy.min_miou)


def _compare(
    candidate: Measured, champion: Measured, policy: GatePolicy, reasons: list[Reason]
) -> tuple[float, float, float]:
    """Compare mean IoU and classes; returns the gain and both ends of its interval."""
    ours, theirs = _miou(candidate), _miou(champion)
    gain = ours - theirs
    gains = paired_bootstrap(
        candidate.truth,
        (champion.predicted, champion.correct),
        (candidate.predicted, candidate.correct),
        resamples=policy.resamples,
        seed=policy.seed,
    )
    low, high = gains.interval(policy.confidence)
    found = f"{candidate.name} has {_points(ours)}, {champion.name} {_points(theirs)} mean IoU"
    text = f"{found}: {_signed(gain)} points." if gain > 0 else f"No gain: {found}, {_signed(gain)} points."
    reasons.append(
        reason_about(candidate, "gain", gain > 0, text, candidate=ours, champion=theirs, gain=gain)
    )
    text = (
        f"The gain is between {_signed(low)} and {_signed(high)} points ({policy.confidence:.0%} of "
        f"{policy.resamples:,} resamples of {len(candidate.images):,} images); its lower end must be above "
        f"{_signed(-policy.delta)}."
    )
    reasons.append(
        reason_about(
            candidate, "interval", low > -policy.delta, text, low=low, high=high, bound=-policy.delta
        )
    )
    reasons.append(_class_falls(candidate, champion, gains, policy))
    return gain, low, high


def _class_falls(candidate: Measured, champion: Measured, gains: Gains, policy: GatePolicy) -> Reason:
    pixels = candidate.truth.sum(0)
    ours, theirs = (
        iou_of_counts(pixels, one.predicted.sum(0), one.correct.sum(0)) for one in (candidate, champion)
    )
    judged = (pixels >= policy.class_pixels) & ((candidate.truth > 0).sum(0) >= policy.class_images)
    high = gains.class_highs(ours - theirs, judged, policy.confidence)
    fell = [at for at in np.flatnonzero(judged) if theirs[at] - ours[at] > policy.class_fall and high[at] < 0]
    rare = int((pixels > 0).sum() - judged.sum())
    figures = {"judged": float(judged.sum()), "too_rare": float(rare)}
    left = f"; {rare:,} are too rare to be judged by themselves" if rare else ""
    if not fell:
        text = (
            f"None of {int(judged.sum()):,} classes fell by more than {100 * policy.class_fall:.1f} "
            f"points{left}."
        )
        return reason_about(candidate, "classes", True if judged.any() else None, text, **figures)
    fell.sort(key=lambda at: ours[at] - theirs[at])
    said = [
        f"{candidate.classes[at]} from {_points(theirs[at])} to {_points(ours[at])} "
        f"({_signed(ours[at] - theirs[at])} points, at best {_signed(high[at])})"
        for at in fell
    ]
    text = (
        f"{len(fell)} of {int(judged.sum()):,} classes fell by more than {100 * policy.class_fall:.1f} "
        f"points: {'; '.join(said[:5])}{'; …' if len(said) > 5 else ''}{left}."
    )
    falls = {f"gain of {candidate.classes[at]}": float(ours[at] - theirs[at]) for at in fell}
    return reason_about(candidate, "classes", False, text, **figures, **falls)


def _collapse(one: Measured, policy: GatePolicy) -> Reason:
    """Whether the model calls nearly everything the same."""
    truth, predicted = one.truth.sum(0), one.predicted.sum(0)
    total = truth.sum()
    occurring = truth >= min(policy.class_pixels, int(truth.max()))
    found = int((occurring & (predicted * _LEAST_OF_CLASS >= truth)).sum())
    share = found / int(occurring.sum())
    # Pixels without a class are a class of their own here: a model that decides nothing has collapsed too.
    shares = np.append(predicted, total - predicted.sum()) / total
    expected = np.append(truth, 0) / total
    largest = int(shares.argmax())
    excess = float(shares[largest] - expected[largest])
    apart = divergence(expected, shares)
    name = "no class" if largest == len(one.classes) else one.classes[largest]
    wrong = [
        text
        for failed, text in (
            (share < policy.min_classes, f"fewer than {policy.min_classes:.0%} of the classes are predicted"),
            (excess > policy.max_excess, f"{name} exceeds its true share by over {policy.max_excess:.0%}"),
            (apart > policy.max_divergence, f"the divergence is above {policy.max_divergence:g} bits"),
        )
        if failed
    ]
    text = (
        f"{one.name} predicts {found} of the {int(occurring.sum())} classes of the truth; the largest, "
        f"{name}, has {shares[largest]:.1%} of the pixels (truth {expected[largest]:.1%}); "
        f"divergence from the truth {apart:.3f} bits"
    )
    return reason_about(
        one,
        "collapse",
        not wrong,
        f"{text}{': a collapse, as ' + ' and '.join(wrong) if wrong else ''}.",
        classes=share,
        largest=float(shares[largest]),
        excess=excess,
        divergence=apart,
    )


# --- what does it cost, and what was it trained on? ---


def _budget(candidate: Measured, champion: Measured | None, policy: GatePolicy) -> list[Reason]:
    return [
        _within(
            "latency",
            candidate.seconds_per_image,
            None if champion is None else champion.seconds_per_image,
            ratio=policy.max_seconds_ratio,
            most=policy.max_seconds,
            subject=f"Labelling an image with {candidate.name}",
            verb="takes",
            shown=lambda seconds: f"{1000 * seconds:.1f} ms",
        ),
        _within(
            "size",
            candidate.model_bytes,
            None if champion is None else champion.model_bytes,
            ratio=policy.max_bytes_ratio,
            most=policy.max_bytes,
            subject=f"The model of {candidate.name}",
            verb="has",
            shown=lambda size: f"{size / 1e6:,.1f} MB",
        ),
    ]


def _within(
    check: str,
    found: float | None,
    before: float | None,
    *,
    ratio: float | None,
    most: float | None,
    subject: str,
    verb: str,
    shown: Callable[[float], str],
) -> Reason:
    """Whether a cost is within its bounds, one absolute, one relative to the champion's."""
    if found is None or not np.isfinite(found):
        allowed = "" if most is None else f"; at most {shown(most)} is allowed"
        text = f"{subject} was not measured{allowed}."
        return Reason(check=check, passed=None if most is None else False, text=text)
    figures = {"found": float(found)}
    said, passed = [f"{subject} {verb} {shown(found)}"], []
    if most is not None:
        said.append(f"at most {shown(most)} is allowed")
        passed.append(found <= most)
    if ratio is not None and before is not None and np.isfinite(before) and before > 0:
        figures |= {"champion": float(before), "ratio": found / before}
        said.append(f"{found / before:.2f} times the champion's, of which {ratio:g} times is allowed")
        passed.append(found <= ratio * before)
    return Reason(
        check=check, passed=all(passed) if passed else None, text=f"{'; '.join(said)}.", figures=figures
    )


def _labels(candidate: Measured, champion: Measured | None, policy: GatePolicy) -> list[Reason]:
    known = bool(candidate.labels_digest)
    text = (
        f"{candidate.name} was trained on labels {candidate.labels_digest[:12]}."
        if candidate.labels_digest
        else f"Nothing says which labels {candidate.name} was trained on."
    )
    return [Reason(check="labels", passed=known, text=text), _label_drift(candidate, champion, policy)]


def _label_drift(candidate: Measured, champion: Measured | None, policy: GatePolicy) -> Reason:
    if champion is None or policy.max_label_drift is None:
        why = "There is no champion" if champion is None else "The policy sets no bound"
        return Reason(check="label_drift", passed=None, text=f"{why}: drift of the labels is not judged.")
    ours, theirs = _shares_by_name(candidate), _shares_by_name(champion)
    if not (ours and theirs):
        unknown = [one.name for one, shares in ((candidate, ours), (champion, theirs)) if not shares]
        text = f"The classes of the labels of {' and '.join(unknown)} are not known: drift is not judged."
        return Reason(check="label_drift", passed=None, text=text)
    apart = divergence_by_name(theirs, ours)
    moved = most_moved(theirs, ours)[0]
    text = (
        f"The labels of {candidate.name} diverge from those of {champion.name} by {apart:.3f} bits; at most "
        f"{policy.max_label_drift:g} is allowed. What differs most is {moved}: {theirs.get(moved, 0.0):.1%} "
        f"of the pixels before, {ours.get(moved, 0.0):.1%} now."
    )
    return Reason(
        check="label_drift",
        passed=bool(apart <= policy.max_label_drift),
        text=text,
        figures={"divergence": apart, "bound": policy.max_label_drift},
    )


def _shares_by_name(one: Measured) -> dict[str, float]:
    """Shares of the labels by class name; empty if they are unknown or undefined."""
    if one.label_histogram is None or one.label_classes is None or histogram_faults(one):
        return {}
    shares = np.asarray(one.label_histogram, np.float64)
    total = float(shares.sum())
    return dict(zip(one.label_classes, (shares / total).tolist(), strict=True)) if total > 0 else {}


# --- words ---


def _points(share: float) -> str:
    return f"{100 * share:.2f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")
