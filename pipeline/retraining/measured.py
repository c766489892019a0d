"""One model as it was measured: what the gate compares.

N images, C classes that were measured, K classes of the labels that the model was trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


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
