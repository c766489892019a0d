"""Confusion matrix and the metrics derived from it.

Matrices of images or workers are summed; ratios are taken once, at the end. A confusion matrix of C classes
is int64 (C, C + 1): rows are true classes, columns predicted classes, and the last column is "no class" (an
undecided pixel), which is always wrong. Ignored pixels are in no cell. All results are in [0, 1].

Undefined values are NaN, and means skip them: the IoU of a class without true or predicted pixels, the
accuracy of one without true pixels, and the precision of one without predicted pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.metrics.pixels import class_maps, joint_counts
from pipeline.metrics.ratios import mean_of_defined, ratio


def confusion_matrix(
    truth: np.ndarray, predicted: np.ndarray, num_classes: int, *, ignore_index: int = 255
) -> np.ndarray:
    """Count pixels by true and predicted class.

    Args:
        truth: integer (...); pixels of ``ignore_index`` are left out.
        predicted: integer, same shape; ids outside [0, C), including ``ignore_index``, count as no class.
        num_classes: C.
        ignore_index: id of unlabelled truth.

    Returns:
        int64 (C, C + 1).

    Raises:
        ValueError: if the shapes differ or the truth has an id outside [0, C) other than ``ignore_index``.
    """
    maps = class_maps(truth, predicted, num_classes, ignore_index)
    return joint_counts(*maps, (num_classes + 1, num_classes + 1))[:num_classes]


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of every class, float64 (C,); NaN for classes that do not occur."""
    correct = np.diag(confusion)
    return ratio(correct, confusion.sum(1) + confusion[:, :-1].sum(0) - correct)


def accuracy_per_class(confusion: np.ndarray) -> np.ndarray:
    """Recall of every class, float64 (C,); NaN for classes without true pixels."""
    return ratio(np.diag(confusion), confusion.sum(1))


def precision_per_class(confusion: np.ndarray) -> np.ndarray:
    """Precision of every class, float64 (C,); NaN for classes without predicted pixels."""
    return ratio(np.diag(confusion), confusion[:, :-1].sum(0))


def mean_iou(
    confusion: np.ndarray, classes: Sequence[int] | None = None, *, absent: Literal["skip", "zero"] = "skip"
) -> float:
    """Mean of ``iou_per_class`` over all classes or a group: mIoU(S) over seen, mIoU(U) over unseen classes.

    Args:
        confusion: (C, C + 1), complete even for a group: a seen class predicted on an unseen one is an error
            for both (generalised zero-shot segmentation).
        classes: ids of the group; None for all.
        absent: how to treat a class without true or predicted pixels: ``skip`` it, as mmsegmentation does, or
            count it as ``zero``, as CLIPSeg's zero-shot scorer does.

    Returns:
        In [0, 1]; NaN if no class is left to average.
    """
    values = iou_per_class(confusion)
    if classes is not None:
        values = values[list(classes)]
    return mean_of_defined(np.nan_to_num(values) if absent == "zero" else values)


def harmonic_iou(seen: float, unseen: float) -> float:
    """hIoU, the harmonic mean of mIoU(S) and mIoU(U); 0 if both are 0, NaN if either is."""
    return 2 * seen * unseen / (seen + unseen) if seen + unseen != 0 else 0.0


def pixel_accuracy(confusion: np.ndarray) -> float:
    """Share of correct pixels; NaN without pixels."""
    return float(ratio(np.trace(confusion), confusion.sum()))


def mean_accuracy(confusion: np.ndarray) -> float:
    """Mean of ``accuracy_per_class`` over the classes with true pixels (balanced accuracy)."""
    return mean_of_defined(accuracy_per_class(confusion))


def frequency_weighted_iou(confusion: np.ndarray) -> float:
    """Mean IoU weighted by each class's share of the true pixels; NaN without pixels."""
    pixels = confusion.sum(1)
    return float(ratio(np.sum(np.nan_to_num(iou_per_class(confusion)) * pixels), pixels.sum()))
