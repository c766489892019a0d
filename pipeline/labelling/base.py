"""The base class of MaskCLIP, students and CLIPSeg: from a list of images to label maps.

Shapes: B batch, C classes; H W the image's own size; Hn Wn the network's; h w the grid of scores.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from models.device import DTYPES, best_device
from models.labelmap import label_map
from models.mosaic import Rule, best_class
from pipeline.files.images import ImageSettings, resize
from pipeline.files.large.picture import Picture
from pipeline.labelling.labeller import LabellerSettings, Prediction, Strip, label_dtype
from pipeline.labelling.windows import WindowScores, label_picture
from pipeline.table.statistics import agreement

SMALLER = 0.75
"""Size of the second reading that looks for agreement."""
Self = TypeVar("Self", bound="BaseLabeller")


class BaseLabeller(ABC):
    """A Labeller around a network; see ``pipeline.labelling.labeller`` for how to add one.

    An image's labels do not depend on its batch, because the network always sees the same shape: single
    images on a CPU, which is fastest there, and padded batches on a GPU.

    Attributes:
        settings: see ``LabellerSettings``.
        device: the GPU if there is one, else the CPU.
        dtype: dtype of the network.
        batch_size: images per call of ``label``; by default 1 on a CPU and ``GPU_BATCH`` on a GPU.
        temperature: of the softmax that turns scores into confidences; None as in ``label_map``.
    """

    GPU_BATCH = 16
    temperature: float | None = 1.0

    def __init__(self, settings: LabellerSettings) -> None:
        self.settings = settings
        self.device = best_device()
        self.dtype = DTYPES[settings.precision]
        self.batch_size = settings.batch_size or (1 if self.device.type == "cpu" else self.GPU_BATCH)

    def with_thresholds(self: Self, thresholds: Sequence[float]) -> Self:
        """A copy with other thresholds (none if empty) that shares the loaded network."""
        other = copy.copy(self)
        other.settings = dataclasses.replace(self.settings, thresholds=tuple(thresholds))
        return other

    @abstractmethod
    def scores(self, images: Tensor) -> Iterable[Any]:
        """Compute the class scores of a batch.

        Args:
            images: uint8 (B, 3, Hn, Wn) RGB on ``device``.

        Returns:
            fp32 (C, h, w) for each image, or whatever ``label_of`` takes.
        """

    def label_of(
        self, scores: Any, network_size: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Labels and uint8 confidence (H, W) of one image, from the class with the best score.

        Args:
            scores: (C, h, w), from ``scores``.
            network_size: (Hn, Wn).
            size: (H, W).

        Raises:
            MaskMillError: ``labelling_failed``.
        """
        thresholds = self.settings.thresholds
        return label_map(
            scores,
            network_size=network_size,
            image_size=size,
            temperature=self.temperature,
            thresholds=torch.tensor(thresholds) if any(thresholds) else None,
            ignore_index=self.settings.ignore_index,
        )

    def window_of(self, scores: Any, network_size: tuple[int, int], size: tuple[int, int]) -> WindowScores:
        """Scores of a window of a larger image, as ``rule`` takes their mean.

        Args:
            scores, network_size, size: as in ``label_of``.
        """
        return WindowScores(
            scores if self.temperature is None else scores * self.temperature, network_size, None
        )

    def rule(self) -> Rule:
        """How labels come from the mean scores of windows, as in ``label_of``."""
        thresholds = self.settings.thresholds
        return best_class(
            torch.tensor(thresholds) if any(thresholds) else None,
            self.settings.ignore_index,
            share=self.temperature is None,
        )

    @property
    def scored_classes(self) -> int:
        """Number of classes that scores have."""
        return self.settings.num_classes

    @torch.inference_mode()
    def window_scores(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> list[WindowScores]:
        """Scores of windows of a larger image.

        Args:
            images: (Hn, Wn, 3) uint8 RGB each, at most ``batch_size``.
            size: (H, W) of every window in the image's pixels.
        """
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        return [
            self.window_of(scores, (image.shape[0], image.shape[1]), size)
            for scores, image in zip(self._each_score(images), images, strict=True)
        ]

    def label_picture(self, picture: Picture, settings: ImageSettings) -> Iterator[Strip]:
        """See ``Labeller.label_picture``."""
        return label_picture(self, picture, settings)

    @torch.inference_mode()
    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """See ``Labeller.label``.

        Raises:
            MaskMillError: ``labelling_failed``.
        """
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)  # per thread
        dtype = label_dtype(self.settings.num_classes)
        # A GPU gets the work for all images before the host waits for the first result.
        found = self._maps(images, sizes)
        again = self._read_again(images, sizes)
        predictions = []
        for index, (labels, confidence) in enumerate(found):
            ids = labels.cpu().numpy().astype(dtype, copy=False)
            agree = None
            if again is not None:
                other = again[index].cpu().numpy().astype(dtype, copy=False)
                agree = agreement(ids, other, ignore_index=self.settings.ignore_index)
            predictions.append(Prediction(ids, confidence.cpu().numpy(), agree))
        return predictions

    def _maps(
        self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Labels and confidence of each image."""
        return [
            self.label_of(scores, (image.shape[0], image.shape[1]), size)
            for scores, image, size in zip(self._each_score(images), images, sizes, strict=True)
        ]

    def _read_again(
        self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
    ) -> list[Tensor] | None:
        """Labels (H, W) of a second reading of each image, if the settings ask for one."""
        how = self.settings.agreement
        if how == "none":
            return None
        if how == "flip":
            mirrored = [np.ascontiguousarray(image[:, ::-1]) for image in images]
            return [labels.flip(1) for labels, _ in self._maps(mirrored, sizes)]
        height, width = images[0].shape[:2]
        smaller = max(1, round(SMALLER * height)), max(1, round(SMALLER * width))
        return [labels for labels, _ in self._maps([resize(image, smaller) for image in images], sizes)]

    def _each_score(self, images: Sequence[np.ndarray]) -> Iterator[Any]:
        if self.device.type == "cpu":
            for image in images:
                yield from self.scores(_batch([image]))
            return
        # Another batch size may select other kernels, which round differently.
        missing = max(0, self.batch_size - len(images))
        batch = _batch([*images, *[images[-1]] * missing], pinned=self.device.type == "cuda")
        batch = batch.to(self.device, non_blocking=True)
        yield from itertools.islice(self.scores(batch), len(images))

    def _take_classes(self, num_classes: int) -> None:
        """Switch to this many classes, without thresholds."""
        ignore_index = max(self.settings.ignore_index, num_classes)
        self.settings = dataclasses.replace(
            self.settings, num_classes=num_classes, ignore_index=ignore_index, thresholds=()
        )


def _batch(images: Sequence[np.ndarray], *, pinned: bool = False) -> Tensor:
    """uint8 (B, 3, H, W); pinned memory is copied to a GPU while the host continues."""
    batch = torch.empty((len(images), *images[0].shape), dtype=torch.uint8, pin_memory=pinned)
    np.stack(images, out=batch.numpy())
    return batch.permute(0, 3, 1, 2)
