"""What every Labeller agrees on: MaskCLIP, a student, CLIPSeg, and whatever comes next.

To add a kind of Labeller:

1. Derive from ``pipeline.labelling.base.BaseLabeller`` in a module of this folder: load the network in
   ``__init__`` and turn a batch into class scores in ``scores``.
2. Write a function in ``pipeline.labelling.prepare`` that finds its weights and embeds the class names, and
   let ``prepare_labeller`` choose it. Labelling, evaluation, the page, MLflow's models and benchmarks follow.
3. Put its settings into ``pipeline.labelling.recipes``, and the kind into
   ``tests/pipeline/labelling/test_labellers.py``, which tests what all of them promise.

No torch in here: stages that only decode or encode import this module too.

Shapes: H W the image's own size; Hn Wn the size fed to the network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from pipeline.ontology.ontology import MAX_CLASSES_8BIT


@dataclass(frozen=True)
class Prediction:
    """Pseudo-labels of one image.

    Attributes:
        labels: (H, W) class ids, uint8, or uint16 above 254 classes; ``ignore_index`` where unsure.
        confidence: (H, W) uint8, round(255 p) of the chosen class, before any threshold.
    """

    labels: np.ndarray
    confidence: np.ndarray


class Labeller(Protocol):
    """Turns decoded images into pseudo-labels.

    Attributes:
        batch_size: images per forward pass that it likes best.
    """

    batch_size: int

    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """Label images that share one network size.

        Args:
            images: (Hn, Wn, 3) uint8 RGB each, at most ``batch_size``.
            sizes: (H, W) of each original image; the label maps come at this size.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LabellerSettings:
    """What all Labellers are told.

    Attributes:
        num_classes: C, background included.
        ignore_index: id of pixels without a label, not a class.
        thresholds: C minimum confidences in [0, 1]; a class's pixels below its own are ignored. Empty keeps
            every pixel.
        precision: ``fp32``, ``bf16`` or ``fp16`` for the network; scores and confidence are fp32 in any case.
        batch_size: images per forward pass; 0 lets the Labeller choose.
        threads: CPU threads of each call of ``label``, of which several may run at a time in different
            threads; 0 leaves torch's choice.
    """

    num_classes: int
    ignore_index: int = 255
    thresholds: tuple[float, ...] = ()
    precision: str = "fp32"
    batch_size: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        assert len(self.thresholds) in (0, self.num_classes), "one threshold per class"
        assert self.ignore_index >= self.num_classes, "the ignore index must not be a class"


@dataclass(frozen=True)
class PreparedLabeller:
    """A Labeller that any process can build: picklable, its weights found and its class names embedded.

    Attributes:
        make: builds it from settings.
        settings: of the run; ``precision`` is never "auto".
        weights: model, the word that chose the weights, and their fingerprint; of a student also ``text``,
            the CLIP (with the same three) that its class names are embedded by.
    """

    make: Callable[[LabellerSettings], Labeller]
    settings: LabellerSettings
    weights: dict[str, Any]

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        return self.settings.precision

    def build(self, *, threads: int = 0, precision: str | None = None) -> Labeller:
        """The Labeller, in this process.

        Args:
            threads: see ``LabellerSettings``.
            precision: another than was prepared for.

        Raises:
            MaskMillError: the weights cannot be loaded, or are no longer the same.
        """
        return self.make(replace(self.settings, threads=threads, precision=precision or self.precision))


def label_dtype(num_classes: int) -> type[np.uint8] | type[np.uint16]:
    """The type of label maps, as ``Ontology.mask_dtype``; ``ignore_index`` fits as well."""
    return np.uint8 if num_classes <= MAX_CLASSES_8BIT else np.uint16
