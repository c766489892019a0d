"""Boundary IoU (Cheng et al., CVPR 2021): IoU near contours, whose errors plain IoU hides on large objects.

The band of a class consists of its pixels at most d pixels inside its contour, with d a fraction of the image
diagonal. As in the authors' code, distances are those of d 3x3 erosions (chessboard distance), and the image
border is a contour.

Ignored pixels are treated like the outside of the image: they have no class in the truth or, whatever was
predicted, in the prediction. Contours of both therefore run along them, a prediction that is right at all
known pixels scores 1, and predictions at ignored pixels have no influence. Where the truth surrounds objects
with ignored pixels, as in PASCAL VOC, the band starts at the inner edge of that ring.

C classes, H W pixels.
"""

from __future__ import annotations

import math

import numpy as np

from pipeline.metrics.pixels import class_maps, joint_counts
from pipeline.metrics.ratios import ratio

DILATION_RATIO = 0.02


def band_width(height: int, width: int, dilation_ratio: float = DILATION_RATIO) -> int:
    """Width d of the band in pixels: the rounded fraction of the diagonal, at least 1."""
    return max(1, round(dilation_ratio * math.hypot(height, width)))


def boundary_counts(
    truth: np.ndarray,
    predicted: np.ndarray,
    num_classes: int,
    *,
    ignore_index: int = 255,
    dilation_ratio: float = DILATION_RATIO,
) -> np.ndarray:
    """Count the pixels in the intersection and union of the bands of truth and prediction.

    Args:
        truth: integer (H, W); pixels of ``ignore_index`` are ignored.
        predicted: integer (H, W); ids outside [0, C) count as no class.
        num_classes: C.
        ignore_index: id of unlabelled truth.
        dilation_ratio: band width as a fraction of the image diagonal.

    Returns:
        int64 (C, 2): pixels of every class in both bands, and in either band.

    Raises:
        ValueError: if the maps are not (H, W), and as ``confusion_matrix``.
    """
    if truth.ndim != 2:
        raise ValueError(f"contours need one label map (H, W), not {truth.shape}")
    height, width = truth.shape
    distance = band_width(height, width, dilation_ratio)
    maps = class_maps(truth, predicted, num_classes, ignore_index)
    true_band, predicted_band = (_band(ids, num_classes, distance) for ids in maps)
    counts = joint_counts(true_band, predicted_band, (num_classes + 1, num_classes + 1))
    both = np.diag(counts)
    return np.stack([both, counts.sum(0) + counts.sum(1) - both], axis=1)[:num_classes]


def boundary_iou_per_class(counts: np.ndarray) -> np.ndarray:
    """Boundary IoU of every class.

    Args:
        counts: (C, 2) from ``boundary_counts``, or a sum of them.

    Returns:
        float64 (C,) in [0, 1]; NaN for classes without true or predicted pixels.
    """
    return ratio(counts[:, 0], counts[:, 1])


def _band(ids: np.ndarray, none: int, distance: int) -> np.ndarray:
    """Keep the ids near a contour, for all classes at once, and set the others to ``none``.

    A pixel is deep inside its class if the lowest and the highest id in its neighbourhood are equal.
    """
    if not ids.size:
        return ids
    import cv2

    window = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    deep = cv2.erode(ids, window) == cv2.dilate(ids, window)
    deep[:distance] = deep[-distance:] = False
    deep[:, :distance] = deep[:, -distance:] = False
    np.copyto(ids, none, where=deep)
    return ids
