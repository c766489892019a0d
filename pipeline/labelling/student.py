"""A trained student as a Labeller (MaskCLIP+: Zhou et al., ECCV 2022, section 3.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from models.clip.text import TextClassifier
from models.errors import WrongUse
from pipeline.labelling.base import BaseLabeller
from pipeline.labelling.labeller import LabellerSettings
from pipeline.trained.student import load_student, read_student_record


class StudentLabeller(BaseLabeller):
    """A student with its own or other classes.

    Cross entropy trained its logits without scaling, hence a temperature of 1.

    Args:
        settings: see ``LabellerSettings``.
        uri: the student's folder, local or in an object store.
        fingerprint: the expected weights; None accepts any.
        text: classifier of other classes; None keeps the one that it was trained with.

    Raises:
        MaskMillError: as ``read_student_record`` and ``load_student``; ``weights_do_not_fit`` if the folder
            holds other weights than ``fingerprint``.
    """

    def __init__(
        self,
        settings: LabellerSettings,
        *,
        uri: str,
        fingerprint: str | None = None,
        text: TextClassifier | None = None,
    ) -> None:
        super().__init__(settings)
        record = read_student_record(uri)
        if fingerprint is not None and fingerprint != record.fingerprint:
            raise WrongUse(
                "weights_do_not_fit",
                f"{record.uri} now holds another student ({record.fingerprint[:12]}).",
                "Start the run again.",
            )
        self._network = load_student(record, device=self.device, dtype=self.dtype)
        if self.device.type == "cuda":  # as in training, and as batches are
            self._network.to(memory_format=torch.channels_last)
        self._own_text = self._network.text
        if text is not None:
            self._network.set_classifier(text)
        assert self._network.num_classes == settings.num_classes, "the classes of the settings"

    def set_text(self, text: TextClassifier | None) -> None:
        """Switch to other classes (None: its own), without thresholds.

        Do not call while another thread labels.
        """
        self._network.set_classifier(self._own_text if text is None else text)
        self._take_classes(self._network.num_classes)

    def scores(self, images: Tensor) -> Tensor:
        """See ``BaseLabeller.scores``: logits."""
        return self._network.grid_logits(self._network.features(images)).float()
