"""Statistics of a labelled image, stored in its row.

``labels`` (H, W) has class ids and the ignore index, as uint8 for up to 254 classes, else uint16.
``confidence`` uint8 (H, W) is round(255 p), with p the probability of the chosen class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

QualityScore = Literal["classes", "softmin"]
"""What the column ``quality`` holds: see ``quality``. Tables of older versions hold and keep softmin."""
TEMPERATURE = 0.1
"""Of ``softmin`` in tables."""
Labels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Confidence = npt.NDArray[np.uint8]


class MapStatistics:
    """What a row says of its maps, from strips of them: it adds up over strips.

    Args:
        ignore_index: id of pixels without a label.
    """

    def __init__(self, ignore_index: int) -> None:
        self._ignore_index = ignore_index
        self._areas = self._sums = np.zeros(0, np.int64)
        # Of each class: left, top, and one past right and bottom.
        self._boxes: dict[int, tuple[int, int, int, int]] = {}
        self._confidences = np.zeros(256, np.int64)

    def add(self, labels: Labels, confidence: Confidence, top: int = 0) -> None:
        """Count rows.

        Args:
            labels, confidence: (rows, W).
            top: the first row.
        """
        assert labels.shape == confidence.shape
        areas, sums = _areas_and_sums(labels, confidence)
        present = np.flatnonzero(areas)
        rank: npt.NDArray[Any] = (np.cumsum(areas > 0) - 1).astype(labels.dtype)[labels]
        tops, bottoms = _extents(rank, len(present))
        lefts, rights = _extents(rank.T, len(present))
        boxes = np.stack([lefts, tops + top, rights, bottoms + top], 1).tolist()
        for class_id, (left, first, right, last) in zip(present.tolist(), boxes, strict=True):
            old = self._boxes.get(class_id, (left, first, right, last))
            self._boxes[class_id] = (
                min(left, old[0]), min(first, old[1]), max(right, old[2]), max(last, old[3])
            )  # fmt: skip
        self._areas, self._sums = _sum(self._areas, areas), _sum(self._sums, sums)
        self._confidences += np.bincount(confidence[labels != self._ignore_index], minlength=256)

    @property
    def classes(self) -> list[int]:
        """All ids that are there, ``ignore_index`` too, ascending."""
        return sorted(self._boxes)

    def segments(self) -> list[dict[str, Any]]:
        """Statistics of each class, by ascending class id; see the function ``segments``."""
        return [
            {
                "class_id": class_id,
                "area": int(self._areas[class_id]),
                "mean_confidence": float(self._sums[class_id] / (255 * self._areas[class_id])),
                "bbox": [left, top, right - left, bottom - top],
            }
            for class_id, (left, top, right, bottom) in sorted(self._boxes.items())
            if class_id != self._ignore_index
        ]

    def quality(self, score: QualityScore = "classes") -> float:
        """See the function ``quality``."""
        return quality_of(self.segments()) if score == "classes" else self.softmin()

    def softmin(self) -> float:
        """See the function ``softmin``."""
        return _softmin(self._confidences, TEMPERATURE)


def _sum(one: npt.NDArray[Any], other: npt.NDArray[Any]) -> npt.NDArray[Any]:
    length = max(len(one), len(other))
    return np.pad(one, (0, length - len(one))) + np.pad(other, (0, length - len(other)))


def segments(labels: Labels, confidence: Confidence, *, ignore_index: int) -> list[dict[str, Any]]:
    """Statistics of each class in the image, by ascending class id.

    Returns:
        ``class_id``; ``area`` in pixels; ``mean_confidence`` in [0, 1]; ``bbox`` around all pixels of the
        class in COCO's format, [x, y, width, height] in pixels.
    """
    counted = MapStatistics(ignore_index)
    counted.add(labels, confidence)
    return counted.segments()


def _extents(rank: npt.NDArray[Any], count: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First row of each of ``count`` ranks, and one past its last row."""
    rows = np.zeros((len(rank), count), bool)
    rows[np.arange(len(rank))[:, None], rank] = True
    return rows.argmax(0), len(rank) - rows[::-1].argmax(0)


def _areas_and_sums(labels: Labels, confidence: Confidence) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Number of pixels and sum of their confidences (0 to 255), indexed by class id."""
    if labels.dtype == np.uint8:
        # One joint histogram takes half the time of two counts, one of them weighted.
        joint = np.bincount((labels.astype(np.uint16) << 8 | confidence).ravel(), minlength=1 << 16)
        joint = joint.reshape(256, 256)
        return joint.sum(1), joint @ np.arange(256)
    flat = labels.ravel()
    return np.bincount(flat), np.bincount(flat, weights=confidence.ravel())


def quality(
    confidence: Confidence, labels: Labels, *, ignore_index: int, score: QualityScore = "classes"
) -> float:
    """Label quality of an image in [0, 1], to rank images without truth; 0 without labelled pixels.

    ``classes`` is the mean over the image's classes of their mean confidence, so that a small class that was
    found doubtfully counts as much as the ground it stands on, as in the mean IoU.

    Args:
        confidence: uint8 (H, W).
        labels: (H, W).
        ignore_index: id of unlabelled pixels.
        score: see ``QualityScore``.
    """
    if score == "softmin":
        return softmin(confidence, labels, ignore_index=ignore_index)
    areas, sums = _areas_and_sums(labels, confidence)
    areas[ignore_index : ignore_index + 1] = 0
    present = np.flatnonzero(areas)
    return float((sums[present] / areas[present]).mean() / 255) if len(present) else 0.0


def quality_of(segments: Sequence[dict[str, Any]]) -> float:
    """``quality``, "classes", from the segments of a row."""
    return sum(one["mean_confidence"] for one in segments) / len(segments) if segments else 0.0


def softmin(
    confidence: Confidence, labels: Labels, *, ignore_index: int, temperature: float = TEMPERATURE
) -> float:
    """Quality of the most doubtful pixels of an image, in [0, 1]; 0 without labelled pixels.

    This is the mean confidence weighted by softmax((1 - confidence) / temperature), the method "softmin" of
    ``cleanlab.segmentation.rank.get_label_quality_scores`` (Lad and Mueller, "Estimating label quality and
    errors in semantic segmentation data via any model", 2023), computed exactly from a histogram.

    Args:
        confidence: uint8 (H, W).
        labels: (H, W).
        ignore_index: id of unlabelled pixels.
        temperature: near 0, the least confident pixel decides; towards infinity, it becomes the plain mean.
    """
    assert labels.shape == confidence.shape
    return _softmin(np.bincount(confidence[labels != ignore_index], minlength=256), temperature)


def _softmin(counts: npt.NDArray[Any], temperature: float) -> float:
    """``softmin`` from the number of pixels (256,) of each confidence."""
    present = np.flatnonzero(counts)
    if not len(present):
        return 0.0
    values = present / 255
    weights = counts[present] * np.exp((values[0] - values) / temperature)
    return float(weights @ values / weights.sum())


def agreement(labels: npt.NDArray[Any], again: npt.NDArray[Any], *, ignore_index: int) -> list[float]:
    """How far a second reading of an image confirms its labels: the Dice coefficient of each class.

    Args:
        labels: (H, W) class ids.
        again: (H, W), of the second reading.
        ignore_index: id of unlabelled pixels.

    Returns:
        2 |A and B| / (|A| + |B|) in [0, 1] for each class of ``labels``, by ascending id, as ``segments``.
    """
    assert labels.shape == again.shape
    same = labels[labels == again]
    size = 1 + max(int(labels.max()), int(again.max()))
    first, second, both = (np.bincount(ids.ravel(), minlength=size) for ids in (labels, again, same))
    return [
        float(2 * both[number] / (first[number] + second[number]))
        for number in np.flatnonzero(first).tolist()
        if number != ignore_index
    ]
