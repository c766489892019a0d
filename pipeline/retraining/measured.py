"""One model as it was measured: what the gate compares.

N images, C classes that were measured, K classes of the labels that the model was trained on.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.evaluation.images import read_images
from pipeline.evaluation.results import EVALUATION_FILE, EvaluationResult, read_results
from pipeline.files.storage import Storage
from pipeline.retraining.labels import LabelSummary


@dataclass(frozen=True, eq=False)
class Measured:
    """One model on one evaluation set.

    Attributes:
        name: what reasons call it: "candidate", "champion version 3".
        evaluation_set: digest of the images and their truth, whatever their order and folder.
        protocol: digest of what else must agree for figures to be comparable: classes, protocol, view.
        has_truth: False if it was measured against the labels of a teacher: figures are then agreement.
        classes: C names.
        images: N names, sorted.
        truth: pixels of each class in the truth of each image, int64 (N, C).
        predicted: pixels that the model gave to the class, where the truth is not ignored, int64 (N, C).
        correct: pixels where both agree, int64 (N, C).
        seconds_per_image: to label an image; None if unknown.
        model_bytes: size of the model on disk; None if unknown.
        label_classes: K names; None if unknown.
        label_histogram: share of each class in the labelled pixels, float64 (K,); None if unknown.
        labels_digest: of the labels; None if unknown.
    """

    name: str
    evaluation_set: str
    protocol: str
    has_truth: bool
    classes: tuple[str, ...]
    images: tuple[str, ...]
    truth: npt.NDArray[np.int64]
    predicted: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    seconds_per_image: float | None = None
    model_bytes: int | None = None
    label_classes: tuple[str, ...] | None = None
    label_histogram: npt.NDArray[np.float64] | None = None
    labels_digest: str | None = None


def read_measured(
    folder: Storage | str | os.PathLike[str],
    name: str,
    *,
    model_bytes: int | None = None,
    labels: LabelSummary | None = None,
) -> Measured:
    """Read what ``maskmill evaluate`` has measured of a model.

    Args:
        folder: with ``evaluation.json`` and ``images.parquet``, local or remote.
        name: what reasons call the model.
        model_bytes: its size, if it is known.
        labels: what it was trained on, if that is known.

    Raises:
        MaskMillError: as ``read_results``; ``file_damaged``; ``input_missing`` if the folder holds no
            evaluation, or one of an older version, without counts per image.
    """
    place = folder.uri if isinstance(folder, Storage) else folder
    found = [(at, result) for at, result in read_results(place) if isinstance(result, EvaluationResult)]
    if not found:
        raise _missing(str(place), f"there is no {EVALUATION_FILE}")
    storage, result = found[0]
    counts = read_images(storage, result)
    if counts is None or result.conditions is None:
        raise _missing(storage.uri, "an older MaskMill wrote it, without the counts of each image")
    work = result.labelling
    total = 0 if labels is None else sum(labels.class_pixels)
    return Measured(
        name=name,
        evaluation_set=counts.evaluation_set,
        protocol=result.conditions,
        has_truth=result.dataset.has_truth,
        classes=tuple(entry.name for entry in result.classes),
        images=counts.names,
        truth=counts.truth,
        predicted=counts.predicted,
        correct=counts.correct,
        seconds_per_image=None if work is None else work.seconds / work.images,
        model_bytes=model_bytes,
        label_classes=None if labels is None else labels.classes,
        label_histogram=None if labels is None else np.array(labels.class_pixels) / max(1, total),
        labels_digest=None if labels is None else labels.digest,
    )


def _missing(place: str, why: str) -> WrongUse:
    return WrongUse(
        "input_missing",
        f"{place} cannot be compared with another model: {why}.",
        "Run maskmill evaluate again, into a new --output.",
    )
