"""The page of a tick of ``maskmill retrain``: the verdict, why, and what candidate and champion see.

It takes plain data, and knows nothing of retrainings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.metrics.names import percent
from pipeline.report.page import render
from pipeline.report.pictures import picture_uri
from pipeline.report.training_page import Card

_THUMBNAIL = 320
MARKS = {True: "passed", False: "failed", None: "not judged"}


@dataclass(frozen=True)
class Check:
    """What a check of the gate found: its name, whether it was passed (None: not judged), a sentence."""

    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class ClassBars:
    """IoU of a class, 0 to 1; None where it is undefined. Of the champion also without one."""

    name: str
    color: str
    candidate: float | None
    champion: float | None


@dataclass(frozen=True)
class Event:
    """A line of the history: when, what happened to which version, and why."""

    time: str
    what: str
    version: str
    tick: str
    miou: float | None
    why: str
    now: bool = False


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A candidate and the verdict on it.

    Attributes:
        name: in the registry.
        kind: of model, in words.
        promoted: the verdict.
        version: of the candidate.
        champion: version of the champion that it was compared with; None without one.
        has_truth: False if the figures are agreement with a teacher.
        images: number of images that it was measured on.
        candidate_miou, champion_miou: 0 to 1; None if undefined.
        gain, low, high: difference, and the ends of its interval.
        confidence: of the interval, 0 to 1.
        delta: loss that does not matter.
        checks: of the gate, in order.
        classes: in order.
        cards: pictures.
        history: newest first.
    """

    name: str
    kind: str
    promoted: bool
    version: str
    champion: str | None
    has_truth: bool
    images: int
    candidate_miou: float | None
    champion_miou: float | None
    gain: float | None
    low: float | None
    high: float | None
    confidence: float
    delta: float
    checks: Sequence[Check]
    classes: Sequence[ClassBars]
    cards: Sequence[Card] = ()
    history: Sequence[Event] = ()


@dataclass(frozen=True)
class LabelShare:
    """Share of a class in the labels, 0 to 1, before and after; None before the first labels."""

    name: str
    color: str
    before: float | None
    after: float


@dataclass(frozen=True, kw_only=True)
class RetrainingPage:
    """Content of the page.

    Attributes:
        title: heading.
        place: of the tick.
        toy: whether the models are toys.
        tiles: names and values at the top.
        models: the candidates.
        labels: shares of the classes.
        labels_note: a sentence on them.
        steps: name, duration and number of attempts of each.
        commands: purposes and commands to run next.
        alone: names of steps, and commands that do the same alone.
    """

    title: str
    place: str
    toy: bool
    tiles: Sequence[tuple[str, str]]
    models: Sequence[Judged]
    labels: Sequence[LabelShare]
    labels_note: str
    steps: Sequence[tuple[str, str, int]]
    commands: Mapping[str, str]
    alone: Sequence[tuple[str, str]]


def retraining_page(page: RetrainingPage) -> str:
    """The page as HTML."""
    most = max((max(one.before or 0.0, one.after) for one in page.labels), default=0.0) or 1.0
    return render(
        "retraining.html",
        page=page,
        models=[_judged(model) for model in page.models],
        labels=[
            {
                "name": one.name,
                "color": one.color,
                "before": one.before,
                "after": one.after,
                "widths": [
                    None if share is None else 100 * share / most for share in (one.before, one.after)
                ],
            }
            for one in page.labels
        ],
        percent=percent,
        marks=MARKS,
    )


def _judged(model: Judged) -> dict[str, Any]:
    return {
        "it": model,
        "measure": "mean IoU" if model.has_truth else "agreement with the teacher",
        "interval": _interval(model),
        "cards": [{"name": card.name, "pictures": _pictures(card)} for card in model.cards],
        "columns": max((len(card.pictures) for card in model.cards), default=1),
        "classes": [
            {
                "it": one,
                "gain": None
                if one.candidate is None or one.champion is None
                else round(100 * (one.candidate - one.champion), 1),
            }
            for one in model.classes
        ],
    }


def _interval(model: Judged) -> dict[str, float] | None:
    """Where the interval of the gain lies on a line, as percentages of its width."""
    if model.gain is None or model.low is None or model.high is None:
        return None
    ends = (model.low, model.high, 0.0, -model.delta)
    pad = 0.12 * (max(ends) - min(ends)) or 0.01
    left, width = min(ends) - pad, max(ends) - min(ends) + 2 * pad
    at = {"low": model.low, "high": model.high, "gain": model.gain, "zero": 0.0, "bound": -model.delta}
    return {name: round(100 * (value - left) / width, 2) for name, value in at.items()}


def _pictures(card: Card) -> list[dict[str, Any]]:
    found = []
    for caption, picture in card.pictures:
        factor = _THUMBNAIL // max(picture.shape[:2])
        large = picture.repeat(factor, 0).repeat(factor, 1) if factor > 1 else picture
        uri, width, height = picture_uri(large, longest=_THUMBNAIL)
        found.append({"caption": caption, "uri": uri, "width": width, "height": height})
    return found
