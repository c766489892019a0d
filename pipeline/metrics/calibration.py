"""Calibration: how well the confidence of the chosen class predicts that it is right.

The statistic has a row for each value v of the 8-bit confidence, p = v / 255. It is additive and supports any
number of bins later. Storing round(255 p) changes p, and hence the calibration error, by at most 0.002.

Only pixels with a true and a predicted class count; an undecided pixel makes no claim.
"""

from __future__ import annotations

import numpy as np

from pipeline.metrics.pixels import class_maps, joint_counts
from pipeline.metrics.ratios import ratio

BINS = 15


def calibration_counts(
    confidence: np.ndarray,
    truth: np.ndarray,
    predicted: np.ndarray,
    num_classes: int,
    *,
    ignore_index: int = 255,
) -> np.ndarray:
    """Count all pixels and correct pixels by confidence.

    Args:
        confidence: uint8 (...), round(255 p) of the predicted class.
        truth: integer, same shape; pixels of ``ignore_index`` are left out.
        predicted: integer, same shape; pixels with ids outside [0, C) are left out.
        num_classes: C.
        ignore_index: id of unlabelled truth.

    Returns:
        int64 (256, 2): pixels with this confidence, and the correct ones among them.

    Raises:
        ValueError: if the confidence is not uint8 of the same shape, and as ``confusion_matrix``.
    """
    if confidence.dtype != np.uint8 or confidence.shape != truth.shape:
        raise ValueError(f"confidence is uint8 {truth.shape}, not {confidence.dtype} {confidence.shape}")
    true_ids, predicted_ids = class_maps(truth, predicted, num_classes, ignore_index)
    outcome = (true_ids == predicted_ids).view(np.uint8)
    # This includes ignored pixels, which have no class in the prediction either.
    np.copyto(outcome, 2, where=predicted_ids == num_classes)
    wrong, right, _ = joint_counts(confidence, outcome, (256, 3)).T
    return np.stack([wrong + right, right], axis=1)


def binned(counts: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Sum the rows of ``calibration_counts`` over equal-width bins.

    Args:
        counts: (256, 2) from ``calibration_counts``, or a sum of them.
        bins: number of bins; bin m (from 1) covers (m - 1) / bins < p <= m / bins, and the first also p = 0
            (Guo et al., ICML 2017, section 2).

    Returns:
        int64 (bins, 3): pixels, correct pixels, and the sum of the 8-bit confidences.
    """
    value = np.arange(256)
    # Integer arithmetic puts a confidence on the edge of a bin on the right side.
    index = np.maximum(-(-value * bins // 255) - 1, 0)
    sums = np.zeros((bins, 3), np.int64)
    np.add.at(sums, index, np.column_stack([counts, counts[:, 0] * value]))
    return sums


def reliability(counts: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The reliability diagram of counts (256, 2).

    Returns:
        float64 (bins, 3): pixels, accuracy and mean confidence in [0, 1]; NaN in empty bins.
    """
    pixels, right, confidence = binned(counts, bins).T
    return np.column_stack([pixels, ratio(right, pixels), ratio(confidence, 255 * pixels)])


def expected_calibration_error(counts: np.ndarray, bins: int = BINS) -> float:
    """ECE: pixel-weighted mean gap between confidence and accuracy over the bins; NaN without pixels."""
    pixels, right, confidence = binned(counts, bins).T
    return float(ratio(np.abs(right - confidence / 255).sum(), pixels.sum()))


def maximum_calibration_error(counts: np.ndarray, bins: int = BINS) -> float:
    """MCE: the largest gap between confidence and accuracy among the bins; NaN without pixels."""
    pixels, accuracy, confidence = reliability(counts, bins).T
    return float(np.abs(accuracy - confidence)[pixels > 0].max(initial=-np.inf)) if pixels.any() else np.nan


def brier_score(counts: np.ndarray) -> float:
    """Brier score of the chosen class being correct: mean of (p - correct)²; NaN without pixels."""
    p = np.arange(256) / 255
    pixels, right = counts.T
    return float(ratio((right * (1 - p) ** 2 + (pixels - right) * p**2).sum(), pixels.sum()))
