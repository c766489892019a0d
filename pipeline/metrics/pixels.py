"""Counting shared by all metrics: normalised class maps, and counts of value pairs.

C classes, H W pixels. In a class map, the id C means "none": an ignored or undecided pixel.
"""

from __future__ import annotations

import numpy as np

_EXACT = 1 << 24  # OpenCV returns its counts as float32


def class_maps(
    truth: np.ndarray, predicted: np.ndarray, num_classes: int, ignore_index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Normalise truth and prediction so that ignored pixels have no class in either.

    Args:
        truth: integer (...); pixels of ``ignore_index`` are ignored.
        predicted: integer, same shape; ids outside [0, C), including ``ignore_index``, count as no class.
        num_classes: C, at most 65,535.
        ignore_index: id of unlabelled truth.

    Returns:
        New arrays with ids in [0, C], where C is none; uint8, or uint16 above 255 classes.

    Raises:
        ValueError: if the shapes differ, a map is not of integers, or the truth has an id outside [0, C)
            other than ``ignore_index``.
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"truth {truth.shape} and prediction {predicted.shape} differ in shape")
    ignored, beyond = truth == ignore_index, _beyond(truth, num_classes)
    if np.any(beyond & ~ignored):
        raise ValueError(f"truth has ids outside [0, {num_classes}) that are not ignore_index {ignore_index}")
    return (
        _with_none(truth, beyond | ignored, num_classes),
        _with_none(predicted, _beyond(predicted, num_classes) | ignored, num_classes),
    )


def joint_counts(first: np.ndarray, second: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Count the pairs of values at the same pixels of two maps.

    Args:
        first: uint8 or uint16 (...), values below ``shape[0]``.
        second: same shape, values below ``shape[1]``.
        shape: number of possible values of each.

    Returns:
        int64 of ``shape``.
    """
    first, second = first.ravel(), second.ravel()
    if not first.dtype == second.dtype == np.uint8:
        pairs = first.astype(np.int64) * shape[1] + second
        return np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
    import cv2

    # Twice as fast as numpy.bincount, which makes 64-bit copies.
    counts = np.zeros(shape, np.int64)
    ranges = [0, shape[0], 0, shape[1]]
    for start in range(0, first.size, _EXACT):
        part = slice(start, start + _EXACT)
        found = cv2.calcHist([first[part], second[part]], [0, 1], None, shape, ranges)
        counts += found.astype(np.int64)
    return counts


def _beyond(labels: np.ndarray, num_classes: int) -> np.ndarray:
    if labels.dtype.kind not in "iu":
        raise ValueError(f"class ids are integers, not {labels.dtype}")
    beyond = labels >= num_classes
    return beyond if labels.dtype.kind == "u" else beyond | (labels < 0)


def _with_none(labels: np.ndarray, none: np.ndarray, num_classes: int) -> np.ndarray:
    ids = labels.astype(np.uint8 if num_classes <= 255 else np.uint16)
    np.copyto(ids, num_classes, where=none)  # four times as fast as numpy.minimum or putmask
    return ids
