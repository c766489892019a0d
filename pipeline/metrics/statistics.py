"""All counts of an evaluation, for any number of images.

Counts are integers and additive, so the sum of parts, in any order and from any number of workers, is bit for
bit that of a single pass. C classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.metrics.boundary import boundary_counts, boundary_iou_per_class
from pipeline.metrics.calibration import calibration_counts, expected_calibration_error
from pipeline.metrics.confusion import (
    accuracy_per_class,
    confusion_matrix,
    frequency_weighted_iou,
    harmonic_iou,
    iou_per_class,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
    precision_per_class,
)
from pipeline.metrics.ratios import mean_of_defined


@dataclass(frozen=True, eq=False)
class SegmentationStatistics:
    """Counts of any number of images; ``+`` merges.

    Attributes:
        images: number of images.
        confusion: int64 (C, C + 1), see ``pipeline.metrics.confusion``.
        boundary: int64 (C, 2), see ``pipeline.metrics.boundary``; zeros if not counted.
        calibration: int64 (256, 2), see ``pipeline.metrics.calibration``; zeros without confidence.
    """

    images: int
    confusion: np.ndarray
    boundary: np.ndarray
    calibration: np.ndarray

    @classmethod
    def zero(cls, num_classes: int) -> SegmentationStatistics:
        """Statistics of no image."""
        return cls.from_arrays(num_classes, np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def of(
        cls,
        truth: np.ndarray,
        labels: np.ndarray,
        confidence: np.ndarray | None,
        num_classes: int,
        ignore_index: int = 255,
        boundary: bool = True,
    ) -> SegmentationStatistics:
        """Statistics of one image.

        Args:
            truth: integer (H, W); pixels of ``ignore_index`` are left out everywhere.
            labels: predicted, integer (H, W); ids outside [0, C), including ``ignore_index``, are no class.
            confidence: uint8 (H, W), round(255 p) of the predicted class; None if unknown.
            num_classes: C.
            ignore_index: id of unlabelled truth.
            boundary: also count for boundary IoU.

        Raises:
            ValueError: if the shapes differ, the truth has an id outside [0, C) other than ``ignore_index``,
                or the confidence is not uint8.
        """
        zero = cls.zero(num_classes)
        return cls(
            1,
            confusion_matrix(truth, labels, num_classes, ignore_index=ignore_index),
            boundary_counts(truth, labels, num_classes, ignore_index=ignore_index)
            if boundary
            else zero.boundary,
            zero.calibration
            if confidence is None
            else calibration_counts(confidence, truth, labels, num_classes, ignore_index=ignore_index),
        )

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.confusion)

    @property
    def miou(self) -> float:
        """Mean IoU over the classes with true or predicted pixels; ranks single images."""
        return mean_iou(self.confusion)

    def __add__(self, other: SegmentationStatistics) -> SegmentationStatistics:
        if self.num_classes != other.num_classes:
            raise ValueError(f"statistics of {self.num_classes} and of {other.num_classes} classes")
        return SegmentationStatistics(
            self.images + other.images,
            self.confusion + other.confusion,
            self.boundary + other.boundary,
            self.calibration + other.calibration,
        )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The K non-zero counts as ``index`` and ``count``, int64 (K,), for list columns of an Arrow table.

        An image with 171 classes takes a few kilobytes instead of 235.
        """
        counts = np.concatenate(
            [[self.images], self.confusion.ravel(), self.boundary.ravel(), self.calibration.ravel()]
        )
        index = np.flatnonzero(counts)
        return {"index": index, "count": counts[index]}

    @classmethod
    def from_arrays(cls, num_classes: int, index: np.ndarray, count: np.ndarray) -> SegmentationStatistics:
        """Inverse of ``to_arrays``. Repeated indices are summed, so concatenated arrays give the sum."""
        shapes = (1,), (num_classes, num_classes + 1), (num_classes, 2), (256, 2)
        ends = np.cumsum([np.prod(shape, dtype=int) for shape in shapes])
        counts = np.zeros(ends[-1], np.int64)
        np.add.at(counts, index, count)
        images, *parts = (
            part.reshape(shape) for part, shape in zip(np.split(counts, ends[:-1]), shapes, strict=True)
        )
        return cls(int(images[0]), *parts)


def summarise(
    statistics: SegmentationStatistics,
    groups: Sequence[str | None] | None = None,
    *,
    absent: Literal["skip", "zero"] = "skip",
) -> dict[str, float]:
    """Reduce statistics to the metrics of a result.

    Args:
        statistics: the sum over all images.
        groups: ``seen``, ``unseen`` or None for each class, for zero-shot segmentation.
        absent: how mean IoU treats classes that do not occur, see ``mean_iou``.

    Returns:
        Values in [0, 1], NaN if undefined or not measured: ``miou``, ``pixel_accuracy``, ``mean_accuracy``,
        ``fwiou``, ``boundary_miou`` (mean over the classes that occur), ``ece``; with groups also
        ``miou_seen``, ``miou_unseen``, ``hiou``.

    Raises:
        ValueError: if the number of groups is not C.
    """
    confusion = statistics.confusion
    metrics = {
        "miou": mean_iou(confusion, absent=absent),
        "pixel_accuracy": pixel_accuracy(confusion),
        "mean_accuracy": mean_accuracy(confusion),
        "fwiou": frequency_weighted_iou(confusion),
        "boundary_miou": mean_of_defined(boundary_iou_per_class(statistics.boundary)),
        "ece": expected_calibration_error(statistics.calibration),
    }
    if groups is not None:
        if len(groups) != statistics.num_classes:
            raise ValueError(f"{len(groups)} groups for {statistics.num_classes} classes")
        seen, unseen = (
            mean_iou(confusion, [id for id, name in enumerate(groups) if name == group], absent=absent)
            for group in ("seen", "unseen")
        )
        metrics |= {"miou_seen": seen, "miou_unseen": unseen, "hiou": harmonic_iou(seen, unseen)}
    return metrics


def summarise_classes(statistics: SegmentationStatistics) -> dict[str, np.ndarray]:
    """Metrics of every class.

    Returns:
        (C,) each: ``pixels``, the true pixels, int64; ``iou``, ``boundary_iou``, ``accuracy``, ``precision``,
        float64 in [0, 1], NaN if undefined or not measured.
    """
    confusion = statistics.confusion
    return {
        "pixels": confusion.sum(1),
        "iou": iou_per_class(confusion),
        "boundary_iou": boundary_iou_per_class(statistics.boundary),
        "accuracy": accuracy_per_class(confusion),
        "precision": precision_per_class(confusion),
    }
