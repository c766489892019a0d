"""Metrics for CLIPSeg: a probability map per prompt, thresholded and compared with a mask.

Counts of all images are summed by class; ratios are taken at the end under a named ``Convention``:

* ``CLIPSEG`` follows the code behind the paper's numbers (``FixedIntervalMetrics``): it adds 1 to every
  denominator and computes average precision by Simpson's rule over the part of the curve that the thresholds
  cover.
* ``STANDARD`` adds nothing and computes average precision as scikit-learn does, by steps from recall 0 to 1.

The added 1 matters for small counts: an object of 50 pixels that is found perfectly has an IoU of 50/51.

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
        name: name in results.
        added: added to every denominator. With 0, the ratio 0/0 is NaN, which means skip; with 1 it is 0.
        integration: average precision by Simpson's rule over recall, or by steps (each gain in recall times
            the precision at its end).
        extended: extend the precision-recall curve to recall 0 at precision 1, and to recall 1, where
            everything is foreground.
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
        class_ids: int64 (K,), ascending. Their meaning depends on the benchmark: class ids for Pascal-5i and
            COCO-20i; the index of the sample for PhraseCut, so that mIoU is the mean IoU of the samples.
        counts: int64 (K, T, 4).
        thresholds: T values, ascending.
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
            probability: floating (...), after the sigmoid. A pixel is foreground if strictly above the
                threshold, compared in the probability's dtype, as PyTorch does.
            truth: bool or {0, 1}, same shape.
            class_id: see ``class_ids``.
            known: bool, same shape, the pixels that count; None for all.
            thresholds: ascending.

        Raises:
            ValueError: if shapes or dtypes do not match, or a probability is NaN.
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

    def of_class(self, class_id: int) -> ForegroundStatistics:
        """The part of one class."""
        chosen = self.class_ids == class_id
        return ForegroundStatistics(self.class_ids[chosen], self.counts[chosen], self.thresholds)

    @classmethod
    def merge(cls, parts: Iterable[ForegroundStatistics]) -> ForegroundStatistics:
        """Sum any number of statistics, including none.

        Raises:
            ValueError: if their thresholds differ.
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
        """Inverse of ``to_arrays``; ``counts`` may be flat.

        Repeated classes are summed, so concatenated arrays give the sum.
        """
        return cls.merge([cls(class_id, counts.reshape(len(class_id), len(thresholds), 4), thresholds)])


def foreground_iou(statistics: ForegroundStatistics, convention: Convention) -> np.ndarray:
    """IoU_FG: foreground IoU over the total counts of all samples, float64 (T,)."""
    return _iou(statistics.counts.sum(0), convention)


def binary_iou(statistics: ForegroundStatistics, convention: Convention) -> np.ndarray:
    """IoU_BIN: mean of foreground and background IoU over the total counts, float64 (T,).

    Under ``STANDARD``, NaN where one of the two has neither true nor predicted pixels.
    """
    total = statistics.counts.sum(0)
    return (_iou(total, convention) + _iou(total[..., ::-1], convention)) / 2


def mean_iou(statistics: ForegroundStatistics, convention: Convention) -> np.ndarray:
    """mIoU: mean over the classes of each class's foreground IoU, float64 (T,)."""
    values = _iou(statistics.counts, convention)
    return np.array([mean_of_defined(column) for column in values.T])


def precision_recall_curve(
    statistics: ForegroundStatistics, convention: Convention
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall over the total counts, at the thresholds with any predicted pixels.

    Returns:
        Recall, ascending, and precision, float64 (P,) each, without repeated points; P is at most T, or
        T + 2 if extended. Empty if the truth has no foreground (``STANDARD``) or nothing is predicted
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
    """Area under the precision-recall curve; NaN if the curve is undefined.

    Simpson's rule takes one point per recall, the one with the highest precision. (CLIPSeg's code keeps all
    points of a recall in arbitrary order, although no parabola fits an interval of zero width; with enough
    pixels, no recall repeats.) For an even number of points, the result is the average of two: one with a
    trapezoid for the last interval, one with a trapezoid for the first. This was SciPy's rule at the time of
    the paper.
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
        statistics: the sum over all samples.
        convention: ``CLIPSEG`` or ``STANDARD``.
        threshold: one of the thresholds; None for the best one of each metric, which is then chosen on the
            evaluated set itself.

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
    """Number of values above each limit. Sorting once is far faster than 49 comparisons."""
    ordered = np.sort(values, axis=None)
    if ordered.size and np.isnan(ordered[-1]):
        raise ValueError("a probability is NaN")
    return ordered.size - np.searchsorted(ordered, limits, side="right")


def _iou(counts: np.ndarray, convention: Convention) -> np.ndarray:
    """Foreground IoU; background IoU if the last axis is reversed."""
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
