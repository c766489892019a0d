"""How far the confidence of the chosen class can be believed.

The statistic has one row for each value v of the 8 bit confidence, p = v / 255: additive, and enough for any
number of bins later. Stored as round(255 p), p is off by at most 0.002, and so is the calibration error.

Only pixels with a true and a predicted class count: an undecided pixel claims nothing that could be right.
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
    """Count pixels, and right ones, by confidence.

    Args:
        confidence: uint8 (...), round(255 p) of the predicted class.
        truth: integer, same shape; pixels of ``ignore_index`` are left out.
        predicted: integer, same shape; pixels with ids outside [0, C) are left out.
        num_classes: C.
        ignore_index: id of truth without a label.

    Returns:
        int64 (256, 2): pixels of this confidence, and those among them that are right.

    Raises:
        ValueError: as ``confusion_matrix``, and if the confidence is not uint8 of the same shape.
    """
    if confidence.dtype != np.uint8 or confidence.shape != truth.shape:
        raise ValueError(f"confidence is uint8 {truth.shape}, not {confidence.dtype} {confidence.shape}")
    true_ids, predicted_ids = class_maps(truth, predicted, num_classes, ignore_index)
    outcome = (true_ids == predicted_ids).view(np.uint8)
    # An ignored pixel is "no class" in the prediction as well.
    np.copyto(outcome, 2, where=predicted_ids == num_classes)
    wrong, right, _ = joint_counts(confidence, outcome, (256, 3)).T
    return np.stack([wrong + right, right], axis=1)


def binned(counts: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Sum the rows of ``calibration_counts`` over equal-width bins.

    Args:
        counts: (256, 2) as ``calibration_counts``, or a sum of such.
        bins: how many; bin m (from 1) holds (m - 1) / bins < p <= m / bins, the first one p = 0 as well
            (Guo et al., ICML 2017, section 2).

    Returns:
        int64 (bins, 3): pixels, right ones, and the sum of their 8 bit confidences.
    """
    value = np.arange(256)
    # In integers, so that a confidence on the edge of a bin never falls to the wrong side.
    index = np.maximum(-(-value * bins // 255) - 1, 0)
    sums = np.zeros((bins, 3), np.int64)
    np.add.at(sums, index, np.column_stack([counts, counts[:, 0] * value]))
    return sums


def reliability(counts: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The reliability diagram.

    Args:
        counts: (256, 2) as ``calibration_counts``.
        bins: as ``binned``.

    Returns:
        float64 (bins, 3): pixels, share of right ones, mean confidence in [0, 1]; NaN in empty bins.
    """
    pixels, right, confidence = binned(counts, bins).T
    return np.column_stack([pixels, ratio(right, pixels), ratio(confidence, 255 * pixels)])


def expected_calibration_error(counts: np.ndarray, bins: int = BINS) -> float:
    """ECE: mean distance of confidence and accuracy over the bins, by pixels; NaN without pixels."""
    pixels, right, confidence = binned(counts, bins).T
    return float(ratio(np.abs(right - confidence / 255).sum(), pixels.sum()))


def maximum_calibration_error(counts: np.ndarray, bins: int = BINS) -> float:
    """MCE: the largest distance of confidence and accuracy among the bins; NaN without pixels."""
    pixels, accuracy, confidence = reliability(counts, bins).T
    return float(np.abs(accuracy - confidence)[pixels > 0].max(initial=-np.inf)) if pixels.any() else np.nan


def brier_score(counts: np.ndarray) -> float:
    """Brier score of the claim that the chosen class is right: mean of (p - right)²; NaN without pixels."""
    p = np.arange(256) / 255
    pixels, right = counts.T
    return float(ratio((right * (1 - p) ** 2 + (pixels - right) * p**2).sum(), pixels.sum()))
