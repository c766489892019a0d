"""Metrics of one prompt against one mask: a probability per pixel, cut at thresholds, as CLIPSeg is measured.

Counts of every image are summed by class; ratios are taken at the end under a named ``Convention``:

* ``CLIPSEG`` is what the CLIPSeg paper's numbers were made with (its ``FixedIntervalMetrics``): 1 is added to
  every denominator, and average precision is Simpson's rule over the part of the curve that the thresholds
  reach.
* ``STANDARD`` adds nothing and takes average precision as scikit-learn does: steps from recall 0 to 1.

The 1 matters where counts are small: an object of 50 pixels that is found perfectly has an IoU of 50/51.

T thresholds, K classes, H W pixels. Counts are int64 (..., 4): true and false positives, false and true
negatives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from models.errors import WrongUse
from pipeline.metrics.ratios import mean_of_defined, ratio

THRESHOLDS: tuple[float, ...] = tuple(np.linspace(0, 1, 51)[1:-1].tolist())


@dataclass(frozen=True)
class Convention:
    """How counts become ratios.

    Attributes:
        name: for results.
        added: what is added to every denominator. With 0, a ratio of nothing to nothing is NaN, and means
            leave it out; with 1 it is 0.
        integration: average precision by Simpson's rule over recall, or by steps (each gain in recall times
            the precision at its end).
        extended: whether the precision-recall curve is continued to recall 0 at precision 1 and to recall 1,
            where everything is foreground.
    """

    name: str
    added: Literal[0, 1]
    integration: Literal["simpson", "step"]
    extended: bool


CLIPSEG = Convention("clipseg", added=1, integration="simpson", extended=False)
STANDARD = Convention("standard", added=0, integration="step", extended=True)


@dataclass(frozen=True, eq=False)
class ForegroundStatistics:
    """Counts of any number of samples by class; ``+`` and ``merge`` sum.

    Attributes:
        class_ids: int64 (K,), ascending. What a class is depends on the benchmark: the index in a fold of
            Pascal-5i, the category of COCO-20i, the index of the sample in PhraseCut, whose mIoU then is the
            mean IoU of the samples.
        counts: int64 (K, T, 4).
        thresholds: T, ascending.
    """

    class_ids: np.ndarray
    counts: np.ndarray
    thresholds: tuple[float, ...] = THRESHOLDS

    @classmethod
    def zero(cls, thresholds: tuple[float, ...] = THRESHOLDS) -> ForegroundStatistics:
        """Statistics of no sample."""
        return cls(np.empty(0, np.int64), np.empty((0, len(thresholds), 4), np.int64), thresholds)

    @classmethod
    def of(
        cls,
        probability: np.ndarray,
        truth: np.ndarray,
        class_id: int,
        *,
        known: np.ndarray | None = None,
        thresholds: tuple[float, ...] = THRESHOLDS,
    ) -> ForegroundStatistics:
        """Statistics of one sample.

        Args:
            probability: floating (...), after the sigmoid. A pixel is foreground where it is above the
                threshold (not equal), compared in the type of the probability, as PyTorch does.
            truth: bool or {0, 1}, same shape.
            class_id: as ``class_ids``.
            known: bool, same shape; other pixels are left out. All if None.
            thresholds: ascending.

        Raises:
            ValueError: if shapes or types do not fit, or a probability is NaN.
        """
        if probability.shape != truth.shape or (known is not None and known.shape != truth.shape):
            raise ValueError(f"probability {probability.shape}, truth {truth.shape} or known differ in shape")
        if probability.dtype.kind != "f":
            raise ValueError(f"probability is floating, not {probability.dtype}")
        foreground = truth.astype(bool)
        background = ~foreground
        if known is not None:
            foreground, background = foreground & known, background & known
        limits = np.asarray(thresholds, probability.dtype)
        positive, negative = _above(probability[foreground], limits), _above(probability[background], limits)
        counts = np.stack(
            [
                positive,
                negative,
                np.count_nonzero(foreground) - positive,
                np.count_nonzero(background) - negative,
            ],
            axis=1,
        )
        return cls(np.array([class_id], np.int64), counts[None], thresholds)

    @classmethod
    def merge(cls, parts: Iterable[ForegroundStatistics]) -> ForegroundStatistics:
        """Sum of any number of statistics; of none, that of no sample.

        Raises:
            ValueError: if they differ in thresholds.
        """
        parts = list(parts)
        thresholds = parts[0].thresholds if parts else THRESHOLDS
        if any(part.thresholds != thresholds for part in parts):
            raise ValueError("statistics of different thresholds cannot be merged")
        parts = [cls.zero(thresholds), *parts]
        class_ids, rows = np.unique(np.concatenate([part.class_ids for part in parts]), return_inverse=True)
        counts = np.zeros((len(class_ids), len(thresholds), 4), np.int64)
        np.add.at(counts, rows, np.concatenate([part.counts for part in parts]))
        return cls(class_ids, counts, thresholds)

    def __add__(self, other: ForegroundStatistics) -> ForegroundStatistics:
        return self.merge([self, other])

    def to_arrays(self) -> dict[str, np.ndarray]:
        """One row per class for an Arrow table: ``class_id`` int64 (K,), ``counts`` int64 (K, 4 T)."""
        return {"class_id": self.class_ids, "counts": self.counts.reshape(-1, 4 * len(self.thresholds))}

    @classmethod
    def from_arrays(
        cls, class_id: np.ndarray, counts: np.ndarray, thresholds: tuple[float, ...] = THRESHOLDS
    ) -> ForegroundStatistics:
        """Inverse of ``to_arrays``, also with ``counts`` flat.

        Repeated classes add up: of arrays put end to end it makes the sum.
        """
        return cls.merge([cls(class_id, counts.reshape(len(class_id), len(thresholds), 4), thresholds)])


def foreground_iou(statistics: ForegroundStatistics, convention: Convention) -> np.ndarray:
    """IoU_FG: IoU of the foreground over the total counts of all samples, float64 (T,)."""
    return _iou(statistics.counts.sum(0), convention)


def binary_iou(statistics: ForegroundStatistics, convention: Convention) -> np.ndarray:
    """IoU_BIN: mean of the IoU of foreground and of background over the total counts, float64 (T,).

    NaN, under ``STANDARD``, where either of them neither is nor is predicted.
    """
    total = statistics.counts.sum(0)
    return (_iou(total, convention) + _iou(total[..., ::-1], convention)) / 2


def mean_iou(statistics: ForegroundStatistics, convention: Convention) -> np.ndarray:
    """mIoU: mean over the classes of the IoU of the foreground over each class's counts, float64 (T,)."""
    values = _iou(statistics.counts, convention)
    return np.array([mean_of_defined(column) for column in values.T])


def precision_recall_curve(
    statistics: ForegroundStatistics, convention: Convention
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall over the total counts, at the thresholds that something exceeds.

    Returns:
        Recall, ascending, and precision, float64 (P,) each, P at most T, or T + 2 if extended; repeated
        points are left out. Empty if the truth has no foreground (``STANDARD``) or nothing is predicted
        (``CLIPSEG``).
    """
    counts = statistics.counts.sum(0)[::-1]  # recall grows as the threshold falls
    if convention.extended:
        tp, fp, fn, tn = counts[0]
        counts = np.concatenate([counts, [[tp + fn, fp + tn, 0, 0]]])
    counts = counts[counts[:, 0] + counts[:, 1] > 0]
    tp, fp, fn, _ = counts.T
    recall, precision = ratio(tp, tp + fn + convention.added), ratio(tp, tp + fp + convention.added)
    if not len(recall) or np.isnan(recall).any():
        return np.empty(0), np.empty(0)
    if convention.extended:
        recall, precision = np.append(0.0, recall), np.append(1.0, precision)
    new = np.append(True, (np.diff(recall) != 0) | (np.diff(precision) != 0))
    return recall[new], precision[new]


def average_precision(statistics: ForegroundStatistics, convention: Convention) -> float:
    """Area under the precision-recall curve; NaN where the curve is undefined.

    Simpson's rule takes one point for each recall, that of the highest precision. (CLIPSeg's code keeps all
    points of one recall, in an order without meaning, though an interval without width has no parabola; with
    enough pixels no recall repeats.) For an even number of points the last and the first interval are in
    turn taken as a trapezoid and both results averaged, which was SciPy's rule when the paper was written.
    """
    recall, precision = precision_recall_curve(statistics, convention)
    if not len(recall):
        return float("nan")
    if convention.integration == "step":
        return float(np.sum(np.diff(recall) * precision[1:]))
    first = np.append(True, np.diff(recall) > 0)
    return _simpson(recall[first], precision[first])


def summarise(
    statistics: ForegroundStatistics, convention: Convention, *, threshold: float | None = None
) -> dict[str, float]:
    """Reduce statistics to the metrics of a result.

    Args:
        statistics: of all samples.
        convention: ``CLIPSEG`` or ``STANDARD``.
        threshold: one of the thresholds; None takes for each metric the one at which it is best. That is a
            choice made on the very set that is measured.

    Returns:
        ``miou``, ``iou_fg``, ``iou_bin``, ``ap`` in [0, 1], NaN where undefined, and the threshold of the
        first three: ``miou_threshold``, ``iou_fg_threshold``, ``iou_bin_threshold``.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    thresholds = np.array(statistics.thresholds)
    curves = {
        "miou": mean_iou(statistics, convention),
        "iou_fg": foreground_iou(statistics, convention),
        "iou_bin": binary_iou(statistics, convention),
    }
    metrics: dict[str, float] = {}
    for name, values in curves.items():
        if threshold is not None:
            index = _index_of(threshold, thresholds)
        else:
            index = int(np.argmax(np.nan_to_num(values, nan=-1)))
        metrics[name], metrics[f"{name}_threshold"] = float(values[index]), float(thresholds[index])
    metrics["ap"] = average_precision(statistics, convention)
    return metrics


def _above(values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """How many values exceed each limit. Sorting is vectorised; comparing 49 times takes far longer."""
    ordered = np.sort(values, axis=None)
    if ordered.size and np.isnan(ordered[-1]):
        raise ValueError("a probability is NaN")
    return ordered.size - np.searchsorted(ordered, limits, side="right")


def _iou(counts: np.ndarray, convention: Convention) -> np.ndarray:
    """IoU of the foreground; of the background if the last axis is reversed."""
    tp, fp, fn, _ = np.moveaxis(counts, -1, 0)
    return ratio(tp, tp + fp + fn + convention.added)


def _simpson(x: np.ndarray, y: np.ndarray) -> float:
    from scipy.integrate import simpson

    if len(x) == 1:
        return 0.0
    if len(x) % 2:
        return float(simpson(y, x=x))
    last, first = (x[-1] - x[-2]) * (y[-1] + y[-2]) / 2, (x[1] - x[0]) * (y[1] + y[0]) / 2
    return (_simpson(x[:-1], y[:-1]) + last + first + _simpson(x[1:], y[1:])) / 2


def _index_of(threshold: float, thresholds: np.ndarray) -> int:
    index = int(np.argmin(np.abs(thresholds - threshold)))
    if abs(thresholds[index] - threshold) > 1e-9:
        listed = (
            f"{thresholds[0]:g}, {thresholds[1]:g}, … {thresholds[-1]:g}"
            if len(thresholds) > 2
            else thresholds
        )
        raise WrongUse(
            "wrong_use",
            f"Nothing was counted at the threshold {threshold:g}, only at {listed}.",
            "Give one of these, or none to take the best.",
        )
    return index
