"""Metric names for pages, MLflow and ``maskmill runs``, and which direction is better.

Every metric of a result is shown and tracked; one that is not listed here appears under its key. Files and
MLflow hold scores as fractions of 1; people read them in percent with one digit, as in the papers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is presented.

    Attributes:
        label: display name.
        less_is_better: a smaller value is an improvement.
        key: ``maskmill runs`` lists it.
    """

    label: str
    less_is_better: bool = False
    key: bool = False


METRICS = {
    "miou": Metric("mIoU", key=True),
    "hiou": Metric("harmonic IoU", key=True),
    "pixel_accuracy": Metric("pixel accuracy", key=True),
    "boundary_miou": Metric("boundary mIoU", key=True),
    "ece": Metric("calibration error (ECE)", less_is_better=True, key=True),
    "mean_accuracy": Metric("mean accuracy"),
    "fwiou": Metric("frequency-weighted IoU"),
    "miou_seen": Metric("mIoU, seen classes"),
    "miou_unseen": Metric("mIoU, unseen classes"),
    "iou": Metric("IoU"),
    "iou_fg": Metric("foreground IoU"),
    "iou_bin": Metric("binary IoU"),
    "ap": Metric("average precision"),
    "map": Metric("mean average precision"),
    "auc": Metric("ROC AUC"),
    "probability": Metric("P(object)"),
    "delta_probability": Metric("change of P(object)"),
}
PER_CLASS = ("iou", "boundary_iou", "accuracy", "precision")
"""Metrics per class in ``evaluation.json``; in MLflow ``iou/CLASS`` and so on."""
OTHER_SHARES = frozenset(
    {
        "agreement",
        "data_wait",
        "drift",
        "found",
        "guess_confidence",
        "guessed",
        "ignored_pixels",
        "mean_quality",
        "workers_busy",
    }
)
"""What training and labelling track as fractions of 1, besides ``METRICS``."""
STANDARD = "standard"
"""Suffix of foreground metrics under the standard convention instead of CLIPSeg's."""


def percent(share: float | None, *, sign: bool = False) -> str:
    """A fraction of 1 in percent with one digit, without the unit: ``0.6861`` → ``68.6``; – for None and NaN.

    Args:
        share: the fraction.
        sign: whether positive values get a +, as differences do.
    """
    if share is None or not math.isfinite(share):
        return "–"
    text = f"{100 * share:+.1f}" if sign else f"{100 * share:.1f}"
    return "0.0" if text in ("-0.0", "+0.0") else text


def is_share(key: str) -> bool:
    """Whether a metric of MLflow (``miou``, ``iou/cat``, ``final/iou``) is a fraction of 1."""
    parts = key.removesuffix(f"_{STANDARD}").split("/")
    if len(parts) > 1 and parts[0] in PER_CLASS:
        return True
    return parts[-1] in METRICS or parts[-1] in OTHER_SHARES


def metric_label(key: str) -> str:
    """Display name of a metric; an unlisted key with spaces for underscores."""
    plain = key.removesuffix(f"_{STANDARD}")
    label = METRICS[plain].label if plain in METRICS else plain.replace("_", " ")
    return label if plain == key else f"{label}, standard"


def less_is_better(key: str) -> bool:
    """Whether a smaller value of a metric is an improvement."""
    return key in METRICS and METRICS[key].less_is_better
