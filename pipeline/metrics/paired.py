"""Two models on the same images: how sure is the difference of their mean IoU?

Mean IoU is not a mean over images, so its interval comes from a bootstrap over images: draw as many images as
there are, with replacement, sum their counts, and take the ratios once. Both models get the same draw. Their
errors on one image are alike, and the alike part cancels.

The mean is over the classes that have true pixels. Both models are then averaged over the same classes, in
every draw; pixels that are called one of the other classes are wrong, and count against the class that they
are. Where all classes have true pixels, this is the mean IoU of ``pipeline.metrics.confusion``.

N images, C classes, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.metrics.ratios import mean_of_defined, ratio

Pixels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

BLOCK_ENTRIES = 1 << 22
"""Most entries of a block: 32 MiB of float64."""


def iou_of_counts(truth: npt.NDArray, predicted: npt.NDArray, correct: npt.NDArray) -> Floats:
    """Intersection over union; NaN where there are no true pixels.

    Args:
        truth: pixels of the class in the truth (…, C).
        predicted: pixels that are called so, among those with a truth.
        correct: pixels that are both.
    """
    union = np.asarray(truth) + np.asarray(predicted) - np.asarray(correct)
    return ratio(correct, np.where(np.asarray(truth) > 0, union, 0))


def miou_of_counts(truth: npt.NDArray, predicted: npt.NDArray, correct: npt.NDArray) -> float:
    """Mean IoU over the classes with true pixels, from sums over all images (C,); NaN without any."""
    return mean_of_defined(iou_of_counts(truth, predicted, correct))


@dataclass(frozen=True, eq=False)
class Gains:
    """How the difference of two models spreads: second minus first, in each resample.

    Attributes:
        mean: difference of mean IoU (R,); NaN where no image with truth was drawn.
        classes: difference of IoU by class (R, C); NaN where the class has no true pixels.
    """

    mean: Floats
    classes: Floats

    def interval(self, confidence: float) -> tuple[float, float]:
        """Both ends of the percentile interval of the mean; NaN if no resample is defined."""
        defined = self.mean[~np.isnan(self.mean)]
        if not defined.size:
            return float("nan"), float("nan")
        low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
        return float(low), float(high)

    def class_highs(self, found: Floats, judged: npt.NDArray[np.bool_], confidence: float) -> Floats:
        """Upper ends of intervals that hold for all judged classes at once, (C,); NaN for the others.

        Of 150 classes, some leave intervals of their own by luck nearly always. Here the largest deviation of
        any class, in units of its standard error, is what the resamples are asked for ("max-t").

        Args:
            found: difference of IoU by class on all images (C,).
            judged: the classes to look at, bool (C,).
            confidence: as of ``interval``: half of the rest is above.
        """
        highs = np.full(len(found), np.nan)
        if judged.any():
            deviations = self.classes[:, judged] - found[judged]
            errors = np.sqrt(np.nanmean(deviations**2, axis=0))
            scaled = np.divide(deviations, errors, out=np.zeros_like(deviations), where=errors > 0)
            largest = np.nan_to_num(scaled, nan=-np.inf).max(axis=1)
            highs[judged] = found[judged] + np.quantile(largest, (1 + confidence) / 2) * errors
        return highs


def paired_bootstrap(
    truth: Pixels,
    first: tuple[Pixels, Pixels],
    second: tuple[Pixels, Pixels],
    *,
    resamples: int,
    seed: int,
) -> Gains:
    """Resample images, the same ones for both models.

    Sums are exact, so the result depends on nothing but the counts, their order and the seed. It works in
    blocks of some 100 MB, whatever N and R are.

    Args:
        truth: true pixels by image and class, int64 (N, C); N at least 1.
        first: predicted and correct pixels of the first model, int64 (N, C) each.
        second: the same of the second.
        resamples: R.
        seed: of the draws.
    """
    images, classes = truth.shape
    counts = (truth, *first, *second)
    rng = np.random.default_rng(seed)
    means, by_class = [], []
    for draws in _draws(rng, images, resamples):
        sums = np.zeros((len(draws), len(counts), classes))
        step = max(1, BLOCK_ENTRIES // (len(counts) * max(1, classes)))
        for start in range(0, images, step):
            # Whole numbers below 2**53: a product of float64 is exact, and much faster than one of integers.
            block = np.stack([part[start : start + step] for part in counts], axis=1).astype(np.float64)
            sums += (draws[:, start : start + step] @ block.reshape(len(block), -1)).reshape(sums.shape)
        true, *parts = np.moveaxis(sums, 1, 0)
        gain = iou_of_counts(true, *parts[2:]) - iou_of_counts(true, *parts[:2])
        occurring = ~np.isnan(gain)
        means.append(ratio(np.where(occurring, gain, 0).sum(axis=1), occurring.sum(axis=1)))
        by_class.append(gain)
    return Gains(np.concatenate(means), np.concatenate(by_class))


def miou_interval(
    truth: Pixels, predicted: Pixels, correct: Pixels, *, resamples: int, seed: int, confidence: float
) -> tuple[float, float]:
    """The percentile interval of one model's mean IoU, from a bootstrap over images.

    Args:
        truth: true pixels by image and class, int64 (N, C); N at least 1.
        predicted: pixels that are called so, among those with a truth, int64 (N, C).
        correct: pixels that are both, int64 (N, C).
        resamples: R.
        seed: of the draws.
        confidence: share of the resamples inside.

    Returns:
        Both ends; NaN if no resample has a truth.
    """
    nothing = np.zeros_like(truth)
    # The gain over a model that calls no pixel anything is the other's IoU.
    return paired_bootstrap(
        truth, (nothing, nothing), (predicted, correct), resamples=resamples, seed=seed
    ).interval(confidence)


def _draws(rng: np.random.Generator, images: int, resamples: int) -> Iterator[Floats]:
    """How often each image is drawn, float64 (r, N), in blocks of resamples."""
    # The block's size does not change what is drawn: the generator goes through the resamples in order.
    step = max(1, BLOCK_ENTRIES // images)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        drawn = rng.integers(0, images, (count, images))
        drawn += np.arange(count)[:, None] * images
        times = np.bincount(drawn.ravel(), minlength=count * images)
        yield times.reshape(count, images).astype(np.float64)
