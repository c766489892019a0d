"""Phrases that describe parts of toy scenes without a class name, and a measure of how well scores find them.

``PATTERN_WORDS`` and ``COLOUR_WORDS`` occur in some captions. ``COMPOSITIONS`` combine a colour and a
pattern, which no caption does: captions give a thing at most one adjective.

Shapes: n scenes, s side in pixels, h w grid cells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.toyworld.captions import CLASSES

#: Class by pattern phrase.
PATTERN_WORDS: Mapping[str, str] = {
    "something striped": "zebra",
    "something spotted": "ladybug",
    "something checkered": "chessboard",
    "something scaly": "fish",
    "something fluffy": "cloud",
    "something wavy": "water",
}
#: Hue range in degrees by colour phrase, for cells whose mean colour has a saturation of at least 0.4.
COLOUR_WORDS: Mapping[str, tuple[float, float]] = {
    "something red": (-20.0, 15.0),
    "something orange": (18.0, 38.0),
    "something green": (75.0, 150.0),
    "something blue": (190.0, 240.0),
}
#: Class and hue range in degrees by phrase with colour and pattern.
COMPOSITIONS: Mapping[str, tuple[str, tuple[float, float]]] = {
    "a red spotted thing": ("ladybug", (-20.0, 20.0)),
    "a yellow spotted thing": ("ladybug", (35.0, 70.0)),
    "a blue scaly thing": ("fish", (190.0, 250.0)),
    "a purple scaly thing": ("fish", (255.0, 320.0)),
    "a brown checkered thing": ("chessboard", (10.0, 45.0)),
}


def phrase_cells(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], cell: int
) -> dict[str, NDArray[np.bool_]]:
    """Find the grid cells that each phrase describes.

    Args:
        images: (n, s, s, 3) RGB.
        labels: (n, s, s) class ids.
        cell: side of a grid cell in pixels; divides s.

    Returns:
        bool (n, h, w) by phrase. A cell takes the class of its centre and the hue of its mean colour.
    """
    ids = labels[:, cell // 2 :: cell, cell // 2 :: cell]
    count, side = images.shape[0], images.shape[1] // cell
    blocks = images.reshape(count, side, cell, side, cell, 3).astype(np.float32) / 255
    mean = blocks.mean((2, 4))
    red, green, blue = np.moveaxis(mean, -1, 0)
    hue = np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))
    high, low = mean.max(-1), mean.min(-1)
    vivid = (high - low) >= 0.4 * high

    def of_hue(first: float, last: float) -> Any:
        return ((hue - first) % 360) <= last - first

    cells = {phrase: ids == CLASSES.index(name) for phrase, name in PATTERN_WORDS.items()}
    cells |= {phrase: vivid & of_hue(*hues) for phrase, hues in COLOUR_WORDS.items()}
    cells |= {
        phrase: (ids == CLASSES.index(name)) & of_hue(*hues) & ((high - low) >= 0.15 * high)
        for phrase, (name, hues) in COMPOSITIONS.items()
    }
    return cells


def class_cells(labels: NDArray[np.uint8], phrase: str, cell: int) -> NDArray[np.bool_]:
    """Cells (n, h, w) of the class of a phrase in ``COMPOSITIONS``, whatever their hue."""
    ids = labels[:, cell // 2 :: cell, cell // 2 :: cell]
    return ids == CLASSES.index(COMPOSITIONS[phrase][0])


def auc(scores: NDArray[np.floating[Any]], truth: NDArray[np.bool_]) -> float:
    """Area under the ROC curve (Mann-Whitney); NaN if ``truth`` is all True or all False."""
    positive = truth.ravel()
    count = int(positive.sum())
    if count in (0, positive.size):
        return float("nan")
    from scipy.stats import rankdata  # takes a second, which a refused command need not wait for

    ranks = rankdata(scores.ravel())
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (positive.size - count)))
