"""The training-free MaskCLIP teacher as a Labeller.

Shapes: B batch, C classes, P prompts, D channels; H W the image's own size; Hn Wn the network's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from models.clip.loading import load_clip
from models.clip.text import TextClassifier
from models.device import DTYPES, best_device
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from pipeline.labelling.labeller import Prediction


class Words(NamedTuple):
    """Class names as text embeddings.

    Attributes:
        embeddings: (P, D) float32, rows of length 1.
        class_ids: (P,) int64, the class of each row.
    """

    embeddings: np.ndarray
    class_ids: np.ndarray


class MaskClipLabeller:
    """The training-free teacher (Zhou et al., ECCV 2022, section 3.2).

    Args:
        model, pretrained: as ``models.clip.loading.load_clip``; only the visual tower is kept.
        words: gives the class names, embedded; called last, so that it may wait for them.
        num_classes: C.
        thresholds: (C,) minimum confidence per class, in [0, 1]; 0 keeps every pixel.
        settings: how the CLIP is read.
        precision: ``fp32``, ``bf16`` or ``fp16``; the softmaxes are fp32 in any case.
        batch_size: 0 chooses 1 on a CPU (measured fastest there) and 16 on a GPU.
        ignore_index: id of pixels below their threshold.
        threads: CPU threads of each call of ``label``, of which several may run at a time in threads of their
            own; 0 leaves torch's choice.
    """

    def __init__(
        self,
        *,
        model: str,
        pretrained: str | None,
        words: Callable[[], Words],
        num_classes: int,
        thresholds: Sequence[float],
        settings: MaskClipSettings,
        precision: str,
        batch_size: int,
        ignore_index: int,
        threads: int = 0,
    ) -> None:
        self._threads = threads
        self.device = best_device()
        self.batch_size = batch_size or (1 if self.device.type == "cpu" else 16)
        self._pad_batches = self.device.type != "cpu"
        self._ignore_index = ignore_index
        self._thresholds = torch.tensor(list(thresholds), dtype=torch.float32, device=self.device)
        clip = load_clip(model, pretrained, device=self.device, dtype=DTYPES[precision], towers="visual")
        embeddings, class_ids = words()
        text = TextClassifier(torch.tensor(embeddings), torch.tensor(class_ids), num_classes)
        self._maskclip = MaskClip(clip, text, settings)

    @torch.inference_mode()
    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """See ``Labeller.label``."""
        if self._threads:
            torch.set_num_threads(self._threads)  # holds for the calling thread
        count = len(images)
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        if self._pad_batches and count < self.batch_size:
            # One shape for every batch: the same kernels run, so that an image's labels do not depend on
            # how many others were in its batch.
            batch = torch.cat([batch, batch[-1:].expand(self.batch_size - count, -1, -1, -1)])
        scores = self._maskclip.grid_scores(batch.to(self.device))[:count]
        network_size = (batch.shape[2], batch.shape[3])
        predictions = []
        for score, size in zip(scores, sizes, strict=True):
            labels, confidence = label_map(
                score,
                network_size=network_size,
                image_size=size,
                temperature=self._maskclip.confidence_temperature,
                thresholds=self._thresholds if bool(self._thresholds.any()) else None,
                ignore_index=self._ignore_index,
            )
            predictions.append(Prediction(labels.cpu().numpy(), confidence.cpu().numpy()))
        return predictions
