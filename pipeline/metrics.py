"""Segmentation metrics: additive statistics first, reduction second.

Statistics of any number of images or workers are summed; ratios are taken once, at the end.
"""

from __future__ import annotations

import numpy as np


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
        int64 (C, C + 1): row true class, column predicted class; the last column is "no class".

    Raises:
        ValueError: if the shapes differ or the truth has an id outside [0, C) other than ``ignore_index``.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth {truth.shape} and prediction {predicted.shape} differ in shape")
    known = truth != ignore_index
    rows = truth[known].astype(np.int64)
    if rows.size and (rows.min() < 0 or rows.max() >= num_classes):
        raise ValueError(f"truth has ids outside [0, {num_classes}) that are not ignore_index {ignore_index}")
    columns = predicted[known].astype(np.int64)
    columns[(columns < 0) | (columns >= num_classes)] = num_classes
    counts = np.bincount(rows * (num_classes + 1) + columns, minlength=num_classes * (num_classes + 1))
    return counts.reshape(num_classes, num_classes + 1)


def iou_per_class(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of every class.

    Args:
        confusion: (C, C + 1) as ``confusion_matrix``, or a sum of such.

    Returns:
        float64 (C,) in [0, 1]; NaN for classes neither true nor predicted anywhere.
    """
    square = confusion[:, :-1]
    intersection = np.diag(square).astype(np.float64)
    union = confusion.sum(1) + square.sum(0) - intersection
    return np.divide(intersection, union, out=np.full_like(intersection, np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean of ``iou_per_class`` over the classes that occur, in [0, 1]; NaN if none does."""
    values = iou_per_class(confusion)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")
