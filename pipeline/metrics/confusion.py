"""Confusion matrix, and what follows from it.

Statistics of any number of images or workers are summed; ratios are taken once, at the end. C classes. A
confusion matrix here is int64 (C, C + 1): row true class, column predicted class, the last column "no class"
(an undecided pixel), which is always wrong. Ignored pixels are in no cell. All results are shares in [0, 1].

What is undefined is NaN, and means leave it out: the IoU of a class that is neither true nor predicted
anywhere, the accuracy of one that is nowhere true, the precision of one that is nowhere predicted.
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
        predicted: integer, same shape; ids outside [0, C), ``ignore_index`` among them, count as no class.
        num_classes: C.
        ignore_index: id of truth without a label.

    Returns:
        int64 (C, C + 1).

    Raises:
        ValueError: if the shapes differ or the truth has an id outside [0, C) other than ``ignore_index``.
    """
    maps = class_maps(truth, predicted, num_classes, ignore_index)
    return joint_counts(*maps, (num_classes + 1, num_classes + 1))[:num_classes]


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of every class: float64 (C,); NaN for classes that do not occur."""
    correct = np.diag(confusion)
    return ratio(correct, confusion.sum(1) + confusion[:, :-1].sum(0) - correct)


def accuracy_per_class(confusion: np.ndarray) -> np.ndarray:
    """Share of each class's true pixels that are found (recall): float64 (C,); NaN where nothing is true."""
    return ratio(np.diag(confusion), confusion.sum(1))


def precision_per_class(confusion: np.ndarray) -> np.ndarray:
    """Share of each class's predicted pixels that are right: float64 (C,); NaN where nothing is predicted."""
    return ratio(np.diag(confusion), confusion[:, :-1].sum(0))


def mean_iou(
    confusion: np.ndarray, classes: Sequence[int] | None = None, *, absent: Literal["skip", "zero"] = "skip"
) -> float:
    """Mean of ``iou_per_class`` over all classes or over a group of them.

    Over the seen classes it is mIoU(S), over the unseen ones mIoU(U).

    Args:
        confusion: (C, C + 1). It stays whole for a group: a seen class predicted on an unseen one is an error
            of both (generalised zero-shot segmentation).
        classes: ids of the group; all if None.
        absent: what a class counts that is neither true nor predicted anywhere: ``skip`` leaves it out, as
            mmsegmentation does; ``zero`` counts 0, as CLIPSeg's zero-shot scorer does.

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
    """Share of the pixels that are right; NaN if there are none."""
    return float(ratio(np.trace(confusion), confusion.sum()))


def mean_accuracy(confusion: np.ndarray) -> float:
    """Mean of ``accuracy_per_class`` over the classes that are true somewhere (balanced accuracy)."""
    return mean_of_defined(accuracy_per_class(confusion))


def frequency_weighted_iou(confusion: np.ndarray) -> float:
    """Mean IoU weighted with each class's share of the true pixels; NaN if there are no pixels."""
    pixels = confusion.sum(1)
    return float(ratio(np.sum(np.nan_to_num(iou_per_class(confusion)) * pixels), pixels.sum()))
