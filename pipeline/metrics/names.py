"""The one list of metrics: what pages, MLflow and ``maskmill runs`` call them, and which way is better.

Every metric of a result is shown and tracked, listed here or not; an unlisted one appears under its key.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """How a metric is presented.

    Attributes:
        label: for people.
        less_is_better: direction of an improvement.
        key: one of the figures that ``maskmill runs`` lists.
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
"""Figures of each class in ``evaluation.json``; in MLflow ``iou/CLASS`` and so on."""
STANDARD = "standard"
"""Suffix of foreground metrics under the standard convention rather than CLIPSeg's."""


def metric_label(key: str) -> str:
    """A metric as people call it; an unlisted key without its underscores."""
    plain = key.removesuffix(f"_{STANDARD}")
    label = METRICS[plain].label if plain in METRICS else plain.replace("_", " ")
    return label if plain == key else f"{label}, standard"


def less_is_better(key: str) -> bool:
    """Whether a smaller value of a metric is an improvement."""
    return key in METRICS and METRICS[key].less_is_better
