"""Inputs of the tests of dense heads: images and class embeddings."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.text import TextClassifier


def classifier(width: int, count: int = 6) -> TextClassifier:
    """Random unit embeddings (count, width), one for each class."""
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    return TextClassifier(F.normalize(rows, dim=1), torch.arange(count), count)


def photographs(height: int, width: int, batch: int = 2) -> Tensor:
    """Images uint8 (B, 3, H, W), two halves of different noise: some patches are alike and others are not."""
    generator = torch.Generator().manual_seed(height)
    images = torch.randint(0, 256, (batch, 3, height, width), generator=generator)
    images[:, :, : height // 2] = 60 + images[:, :, : height // 2] // 16
    return images.to(torch.uint8)
