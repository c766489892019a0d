"""The interface of all Labellers: MaskCLIP, students, CLIPSeg, and any added later.

To add a kind of Labeller:

1. Derive from ``pipeline.labelling.base.BaseLabeller`` in a module of this folder: load the network in
   ``__init__`` and turn a batch into class scores in ``scores``.
2. Write a function in ``pipeline.labelling.prepare`` that finds its weights and embeds the class names, and
   let ``prepare_labeller`` choose it. Labelling, evaluation, the page, MLflow's models and benchmarks follow.
3. Add its settings to ``pipeline.labelling.recipes``, and the Labeller to
   ``tests/pipeline/labelling/test_labellers.py``, which tests the common contract.

Imports no torch, because stages that only decode or encode import this module too.

Shapes: H W the image's own size; Hn Wn the size fed to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np

from pipeline.files.images import ImageSettings
from pipeline.files.large.picture import Picture
from pipeline.ontology.ontology import MAX_CLASSES_8BIT

Agreement = Literal["none", "size", "flip"]
"""A second reading of each image; see ``LabellerSettings``."""


@dataclass(frozen=True)
class Prediction:
    """Pseudo-labels of one image.

    Attributes:
        labels: (H, W) class ids, uint8, or uint16 above 254 classes; ``ignore_index`` where uncertain.
        confidence: (H, W) uint8, round(255 p) of the chosen class, before any threshold.
        agreement: of each class of ``labels``, by ascending id, with a second reading of the image; None if
            there was none. See ``pipeline.table.statistics.agreement``.
    """

    labels: np.ndarray
    confidence: np.ndarray
    agreement: list[float] | None = None


@dataclass(frozen=True)
class Strip:
    """Pseudo-labels of some rows of an image.

    Attributes:
        top: the first row.
        labels, confidence: (rows, W), as in ``Prediction``.
    """

    top: int
    labels: np.ndarray
    confidence: np.ndarray


class Labeller(Protocol):
    """Turns decoded images into pseudo-labels.

    Attributes:
        batch_size: preferred number of images per forward pass.
    """

    batch_size: int

    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Label images that share one network size.

        Args:
            images: (Hn, Wn, 3) uint8 RGB each, at most ``batch_size``.
            sizes: (H, W) of each original image and of its label map.
        """
        ...

    def label_picture(self, picture: Picture, settings: ImageSettings) -> Iterator[Strip]:
        """Label an image that is too large to be decoded whole, in windows.

        Args:
            picture: the image.
            settings: the size of windows, their overlap, and how each is resized for the network.

        Returns:
            Strips from top to bottom.

        Raises:
            ImageError: a region cannot be read.
            MaskMillError: ``labelling_failed``.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LabellerSettings:
    """Settings common to all Labellers.

    Attributes:
        num_classes: C, including background.
        ignore_index: id of pixels without a label; not a class id.
        thresholds: C minimum confidences in [0, 1]; pixels below their class's threshold are ignored. Empty
            keeps every pixel.
        precision: ``fp32``, ``bf16`` or ``fp16`` for the network; scores and confidence are always fp32.
        batch_size: images per forward pass; 0 lets the Labeller choose.
        agreement: how each image is read a second time: ``size``, at three quarters of its size, ``flip``,
            mirrored, or ``none``.
        threads: CPU threads of each call of ``label``; calls may run concurrently in different threads. 0
            keeps torch's default.
    """

    num_classes: int
    ignore_index: int = 255
    thresholds: tuple[float, ...] = ()
    precision: str = "fp32"
    batch_size: int = 0
    agreement: Agreement = "none"
    threads: int = 0

    def __post_init__(self) -> None:
        assert len(self.thresholds) in (0, self.num_classes), "one threshold per class"
        assert self.ignore_index >= self.num_classes, "the ignore index must not be a class"


@dataclass(frozen=True)
class PreparedLabeller:
    """A picklable recipe for a Labeller, with weights found and class names embedded.

    Attributes:
        make: builds the Labeller from settings.
        settings: settings of the run; ``precision`` is never "auto".
        weights: ``model``, ``pretrained`` and ``fingerprint``; for a student also ``text``, the same three of
            the CLIP that embeds its class names.
        files: local files that ``build`` reads, other than downloads, which every machine gets by itself.
    """

    make: Callable[[LabellerSettings], Labeller]
    settings: LabellerSettings
    weights: dict[str, Any]
    files: tuple[str, ...] = ()

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        return self.settings.precision

    def build(self, *, threads: int = 0, precision: str | None = None) -> Labeller:
        """Build the Labeller in this process.

        Args:
            threads: see ``LabellerSettings``.
            precision: overrides the prepared one.

        Raises:
            MaskMillError: the weights cannot be loaded, or are no longer the same.
        """
        return self.make(replace(self.settings, threads=threads, precision=precision or self.precision))


def label_dtype(num_classes: int) -> type[np.uint8] | type[np.uint16]:
    """The dtype of label maps, as in ``Ontology.mask_dtype``; it can hold ``ignore_index`` too."""
    return np.uint8 if num_classes <= MAX_CLASSES_8BIT else np.uint16
