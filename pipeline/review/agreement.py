"""How well reviewers agree with the truth of the images where it is known: honeypots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.evaluation.truth import Truth
from pipeline.metrics.statistics import SegmentationStatistics
from pipeline.review.saving import Saved
from pipeline.table.labels import decode_mask
from pipeline.table.statistics import Labels


@dataclass(frozen=True)
class Agreement:
    """Of one reviewer.

    Attributes:
        reviewer: who.
        judged: honeypots that were accepted or rejected as they were.
        right: those of them where that was right: accepted at a mean IoU of at least ``acceptable``, or
            rejected below it.
        painted: honeypots that were painted.
        miou: mean over the accepted and painted ones of their mean IoU with the truth; NaN without any.
        before: the same for the labels that they were shown.
    """

    reviewer: str
    judged: int
    right: int
    painted: int
    miou: float
    before: float

    def described(self) -> str:
        """In words."""
        said = [f"{self.right} of {self.judged} judged right"] if self.judged else []
        if self.painted:
            said.append(f"{self.painted} painted")
        if np.isfinite(self.miou):
            said.append(f"mean IoU with the truth {self.miou:.2f}, {self.before:.2f} as shown")
        return f"{self.reviewer or 'unnamed'}: {', '.join(said)}"


def image_miou(truth: Labels, labels: Labels, num_classes: int, ignore_index: int) -> float:
    """Mean IoU of one image over the classes in its truth or labels; NaN if all truth is ignored."""
    if truth.shape != labels.shape:
        return 0.0
    return SegmentationStatistics.of(truth, labels, None, num_classes, ignore_index, boundary=False).miou


def agreement(
    truth: Truth, saves: Mapping[int, Saved], shown: Mapping[int, Labels], *, acceptable: float
) -> list[Agreement]:
    """How well each reviewer agrees with the truth, by name.

    Args:
        truth: of the honeypots.
        saves: what is saved of them, by id.
        shown: the labels that the table has, by id.
        acceptable: mean IoU from which it is right to accept.
    """
    figures: dict[str, list[tuple[str, float, float]]] = defaultdict(list)
    for row_id, saved in sorted(saves.items()):
        true = truth.read(row_id)
        before = image_miou(true, shown[row_id], truth.num_classes, truth.ignore_index)
        after = before
        if saved.mask is not None:
            after = image_miou(true, decode_mask(saved.mask), truth.num_classes, truth.ignore_index)
        figures[saved.reviewer].append((saved.decision, before, after))
    return [
        Agreement(
            reviewer,
            judged=sum(decision != "painted" for decision, _, _ in found),
            right=sum(
                (decision == "accepted") == (before >= acceptable)
                for decision, before, _ in found
                if decision != "painted"
            ),
            painted=sum(decision == "painted" for decision, _, _ in found),
            miou=_mean([after for decision, _, after in found if decision != "rejected"]),
            before=_mean([before for decision, before, _ in found if decision != "rejected"]),
        )
        for reviewer, found in sorted(figures.items())
    ]


def _mean(values: list[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")
