"""A trained student as a Labeller.

Shapes: B batch, C classes, P classifier rows, D channels; H W the image's own size; Hn Wn the network's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch

from models.clip.text import TextClassifier
from models.device import DTYPES, best_device
from models.errors import WrongUse
from models.labelmap import label_map
from pipeline.labelling.labeller import Prediction
from pipeline.trained.student import load_student, read_student_record


class StudentLabeller:
    """A MaskCLIP+ student (Zhou et al., ECCV 2022, section 3.4), with its own classes or with others.

    Args:
        uri: the student's folder, local or in an object store.
        fingerprint: the weights that are meant; None takes those that are there.
        thresholds: (C,) minimum confidence per class, in [0, 1]; 0 keeps every pixel.
        embeddings: (P, D) float32 text embeddings of other classes than its own; None keeps the classifier
            that it was trained with.
        class_ids: (P,) int64, ascending: the class of each row of ``embeddings``.
        precision: ``fp32``, ``bf16`` or ``fp16`` for the network; scores and softmax are fp32 in any case.
        batch_size: 0 chooses 1 on a CPU and 16 on a GPU.
        ignore_index: id of pixels below their threshold.
        threads: CPU threads of each call of ``label``, of which several may run at a time in threads of their
            own; 0 leaves torch's choice.

    Raises:
        MaskMillError: as ``pipeline.trained.student.read_student_record`` and ``load_student``;
        ``weights_differ``
            if the fingerprint is another one by now.
    """

    def __init__(
        self,
        *,
        uri: str,
        fingerprint: str | None = None,
        thresholds: Sequence[float],
        embeddings: np.ndarray | None = None,
        class_ids: np.ndarray | None = None,
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
        record = read_student_record(uri)
        if fingerprint is not None and fingerprint != record.fingerprint:
            raise WrongUse(
                "weights_differ",
                f"{record.uri} holds another student by now ({record.fingerprint[:12]}).",
                "Start the run again.",
            )
        self._model = load_student(record, device=self.device, dtype=DTYPES[precision])
        if embeddings is not None:
            assert class_ids is not None, "embeddings come with the class of each row"
            self._model.set_classifier(
                TextClassifier(torch.tensor(embeddings), torch.tensor(class_ids), len(thresholds))
            )
        self._set_thresholds(thresholds)

    def with_thresholds(self, thresholds: Sequence[float]) -> StudentLabeller:
        """The same network with other thresholds; nothing is loaded again."""
        other = copy.copy(self)
        other._set_thresholds(thresholds)
        return other

    def _set_thresholds(self, thresholds: Sequence[float]) -> None:
        assert len(thresholds) == self._model.num_classes, "one threshold per class"
        limits = torch.tensor(list(thresholds), dtype=torch.float32, device=self.device)
        self._thresholds = limits if bool(limits.any()) else None

    @torch.inference_mode()
    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        """See ``Labeller.label``."""
        if self._threads:
            torch.set_num_threads(self._threads)  # holds for the calling thread
        count = len(images)
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        if self._pad_batches:
            if count < self.batch_size:
                # One shape for every batch, so that an image's labels do not depend on how many others were
                # in it: the same kernels run.
                batch = torch.cat([batch, batch[-1:].expand(self.batch_size - count, -1, -1, -1)])
            scores = self._grid_scores(batch.to(self.device))[:count]
        else:
            # One after the other, for the same reason.
            scores = torch.cat([self._grid_scores(image[None]) for image in batch])
        predictions = []
        for score, size in zip(scores, sizes, strict=True):
            labels, confidence = label_map(
                score,
                network_size=(batch.shape[2], batch.shape[3]),
                image_size=size,
                temperature=1.0,  # trained with cross entropy on these logits as they are
                thresholds=self._thresholds,
                ignore_index=self._ignore_index,
            )
            predictions.append(Prediction(labels.cpu().numpy(), confidence.cpu().numpy()))
        return predictions

    def _grid_scores(self, images: torch.Tensor) -> torch.Tensor:
        """Uint8 (B, 3, Hn, Wn) → fp32 (B, C, h, w) logits."""
        return self._model.grid_logits(self._model.features(images)).float()
