"""Statistics of a labelled image, stored in its row.

``labels`` (H, W) has class ids and the ignore index, as uint8 for up to 254 classes, else uint16.
``confidence`` uint8 (H, W) is round(255 p), with p the probability of the chosen class.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Confidence = npt.NDArray[np.uint8]


def segments(labels: Labels, confidence: Confidence, *, ignore_index: int) -> list[dict[str, Any]]:
    """Statistics of each class in the image, by ascending class id.

    Returns:
        ``class_id``; ``area`` in pixels; ``mean_confidence`` in [0, 1]; ``bbox`` around all pixels of the
        class in COCO's format, [x, y, width, height] in pixels.
    """
    assert labels.shape == confidence.shape
    areas, sums = _areas_and_sums(labels, confidence)
    present = np.flatnonzero(areas)
    rank: npt.NDArray[Any] = (np.cumsum(areas > 0) - 1).astype(labels.dtype)[labels]
    tops, bottoms = _extents(rank, len(present))
    lefts, rights = _extents(rank.T, len(present))
    return [
        {
            "class_id": class_id,
            "area": int(areas[class_id]),
            "mean_confidence": float(sums[class_id] / (255 * areas[class_id])),
            "bbox": [left, top, right - left, bottom - top],
        }
        for class_id, left, top, right, bottom in zip(
            present.tolist(), lefts.tolist(), tops.tolist(), rights.tolist(), bottoms.tolist(), strict=True
        )
        if class_id != ignore_index
    ]


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


def quality(confidence: Confidence, labels: Labels, *, ignore_index: int, temperature: float = 0.1) -> float:
    """Label quality of an image in [0, 1], low if some pixels are doubtful; 0 without labelled pixels.

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
    counts = np.bincount(confidence[labels != ignore_index], minlength=256)
    present = np.flatnonzero(counts)
    if not len(present):
        return 0.0
    values = present / 255
    weights = counts[present] * np.exp((values[0] - values) / temperature)
    return float(weights @ values / weights.sum())
