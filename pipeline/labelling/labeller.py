"""The one protocol of everything that labels. Light on purpose: stages that only decode import it as well.

Shapes: H W the image's own size; Hn Wn the size fed to the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


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
    """Turns decoded images into pseudo-labels. Teacher, student and prompt models all are Labellers.

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
