"""Label an image in windows that overlap, a strip at a time: nothing has the size of the image.

Shapes: K classes, h w the grid of scores; H W the image, Hn Wn the network's input.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from models.mosaic import Mosaic, Rule, spread
from pipeline.files import images
from pipeline.files.images import ImageSettings
from pipeline.files.large.picture import Picture
from pipeline.labelling.labeller import LabellerSettings, Strip, label_dtype


class WindowScores(NamedTuple):
    """Scores of one window.

    Attributes:
        scores: fp32 (K, h, w), times the temperature if they have one.
        network_size: (Hn, Wn), on which their grid lies.
        ids: int64 (K,), ascending; None if all classes are there.
    """

    scores: Tensor
    network_size: tuple[int, int]
    ids: Tensor | None


class LabelsWindows(Protocol):
    """What is asked of a Labeller; see ``pipeline.labelling.base.BaseLabeller``."""

    settings: LabellerSettings
    batch_size: int

    @property
    def scored_classes(self) -> int: ...

    def rule(self) -> Rule: ...

    def window_scores(self, images: Sequence[np.ndarray], size: tuple[int, int]) -> list[WindowScores]: ...


def label_picture(labeller: LabelsWindows, picture: Picture, settings: ImageSettings) -> Iterator[Strip]:
    """See ``pipeline.labelling.labeller.Labeller.label_picture``.

    The next windows are read while the network works on these.
    """
    size = (picture.height, picture.width)
    window = min(settings.large_window, size[0]), min(settings.large_window, size[1])
    tops, lefts = (spread(length, settings.large_window, settings.large_overlap) for length in size)
    mosaic = Mosaic(size, window, tops, lefts, num_classes=labeller.scored_classes, rule=labeller.rule())
    dtype = label_dtype(labeller.settings.num_classes)

    def read(places: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        return [
            images.fit(picture.read(tops[row], lefts[column], *window), settings) for row, column in places
        ]

    batches = [
        [(row, column) for column in range(start, min(len(lefts), start + labeller.batch_size))]
        for row in range(len(tops))
        for start in range(0, len(lefts), labeller.batch_size)
    ]
    with ThreadPoolExecutor(1, thread_name_prefix="windows") as reader:
        ahead = reader.submit(read, batches[0])
        strip: Strip | None = None
        for number, places in enumerate(batches):
            seen = ahead.result()
            if number + 1 < len(batches):
                ahead = reader.submit(read, batches[number + 1])
            found = labeller.window_scores(seen, window)
            for (row, column), (scores, network_size, ids) in zip(places, found, strict=True):
                block = mosaic.add(row, column, scores, network_size=network_size, ids=ids)
                rows, columns = block.labels.shape
                if strip is None:
                    strip = Strip(
                        tops[row], np.empty((rows, size[1]), dtype), np.empty((rows, size[1]), np.uint8)
                    )
                area = slice(block.left, block.left + columns)
                strip.labels[:, area] = block.labels.cpu().numpy()
                strip.confidence[:, area] = block.confidence.cpu().numpy()
                if column + 1 == len(lefts):
                    yield strip
                    strip = None
