"""The training-free MaskCLIP teacher as a Labeller (Zhou et al., ECCV 2022, section 3.2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.clip.loading import load_clip
from models.clip.text import TextClassifier
from models.errors import FailedWork
from models.helper import helper_of
from models.maskclip import Described, MaskClip
from models.settings import MaskClipSettings
from pipeline.labelling.base import BaseLabeller
from pipeline.labelling.labeller import LabellerSettings
from pipeline.labelling.windows import WindowScores
from pipeline.memory.index import load_memory


class Scored(NamedTuple):
    """Scores (C, h, w) and the image uint8 (3, Hn, Wn) that they are of."""

    scores: Tensor
    image: Tensor


class MaskClipLabeller(BaseLabeller):
    """A CLIP that scores every patch against the class names.

    Args:
        settings: see ``LabellerSettings``.
        model: see ``models.clip.loading.load_clip``; only the visual tower is loaded.
        pretrained: see ``load_clip``.
        text: classifier of the class names.
        reading: how to compute dense scores.
        memory: fingerprint of the memory that ``reading`` names.
        key_block: for ``describe``.

    Raises:
        MaskMillError: as ``load_clip``, ``helper_of`` and ``MaskClip``.
    """

    def __init__(
        self,
        settings: LabellerSettings,
        *,
        model: str,
        pretrained: str | None,
        text: TextClassifier,
        reading: MaskClipSettings,
        memory: str = "",
        key_block: int | None = None,
    ) -> None:
        super().__init__(settings)
        clip = load_clip(model, pretrained, device=self.device, dtype=self.dtype, towers="visual")
        found = None
        if reading.memory:
            found, record = load_memory(reading.memory, self.device)
            if record.fingerprint != memory:
                raise FailedWork(
                    "labelling_failed",
                    f"The memory in {reading.memory} has changed since this run began.",
                    "Build it first, and then label.",
                )
        helper = helper_of(reading, device=self.device, dtype=self.dtype)
        self._maskclip = MaskClip(clip, text, reading, memory=found, key_block=key_block, helper=helper)
        self.temperature = self._maskclip.confidence_temperature

    @property
    def text(self) -> TextClassifier:
        """The classes in use."""
        return self._maskclip.text

    def set_text(self, text: TextClassifier) -> None:
        """Switch to other classes, without thresholds and bias. Do not call while another thread labels."""
        config = self._maskclip.config
        config = config.replace(classes=config.classes.replace(calibrate=0.0, bias=()))
        own = self._maskclip
        self._maskclip = MaskClip(own.clip, text, config, memory=own.memory, helper=own.helper)
        self._take_classes(text.num_classes)

    def scores(self, images: Tensor) -> Iterator[Scored]:
        """See ``BaseLabeller.scores``: cosines, unless the settings say otherwise, with their images."""
        return map(Scored, self._maskclip.grid_scores(images), images)

    def describe(self, image: np.ndarray) -> tuple[Described, Tensor]:
        """What a memory keeps of an image (Hn, Wn, 3), and the image itself, uint8 (3, Hn, Wn)."""
        pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        return self._maskclip.describe(pixels[None]), pixels

    def label_of(
        self, scores: Scored, network_size: tuple[int, int], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """See ``BaseLabeller.label_of``; scores are refined by the image if the settings say so."""
        thresholds = self.settings.thresholds
        return self._maskclip.label_scores(
            scores.image,
            scores.scores,
            size,
            thresholds=torch.tensor(thresholds) if any(thresholds) else None,
            ignore_index=self.settings.ignore_index,
        )

    def window_of(self, scores: Scored, network_size: tuple[int, int], size: tuple[int, int]) -> WindowScores:
        """See ``BaseLabeller.window_of``; each window is refined by itself."""
        found, network_size, ids = self._maskclip.final_scores(scores.image, scores.scores, size)
        return WindowScores(
            found if self.temperature is None else found * self.temperature, network_size, ids
        )
