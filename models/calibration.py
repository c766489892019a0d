"""Per-class calibration: how high the scores of each class are by themselves, over a corpus.

A vision-language model likes some words everywhere. A high quantile of a class's scores over a corpus says
how much. A share of it is subtracted from the scores.

Shapes: C classes, K bins.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from models.errors import FailedWork

BINS = 4000
"""Bins of a histogram of cosines, each 0.0005 wide; the quantile is exact within one."""
Histogram = npt.NDArray[np.int64]


def score_histogram(scores: Tensor) -> Histogram:
    """Count scores by class; histograms of any images add up.

    Args:
        scores: (C, …) cosines; those below -1, of classes that were removed from the image, do not count.

    Returns:
        (C, K).
    """
    flat = scores.flatten(1).double().cpu().numpy()
    bins = np.clip(((flat + 1) * (BINS / 2)).astype(np.int64), 0, BINS - 1)
    return np.stack(
        [np.bincount(row[known], minlength=BINS) for row, known in zip(bins, flat >= -1, strict=True)]
    )


def bias_of(histogram: Histogram, quantile: float, weight: float) -> tuple[float, ...]:
    """The bias of each class: ``weight`` of its quantile, less the mean over the classes.

    Taking the mean away changes no label and no confidence; the numbers become comparable.

    Args:
        histogram: (C, K), the sum of ``score_histogram``.
        quantile: in (0, 1).
        weight: share of the quantile.

    Raises:
        MaskMillError: ``labelling_failed`` if no scores were counted.
    """
    totals = histogram.sum(1)
    if not totals.all():
        raise FailedWork(
            "labelling_failed",
            "No image of the sample could be read, so nothing is known of the classes' scores.",
            "Look at the images, or label without calibrate.",
        )
    places = [
        int(np.searchsorted(row, quantile * total))
        for row, total in zip(histogram.cumsum(1), totals, strict=True)
    ]
    levels = (np.array(places) + 0.5) * (2 / BINS) - 1
    return tuple(round(float(level), 6) for level in weight * (levels - levels.mean()))
