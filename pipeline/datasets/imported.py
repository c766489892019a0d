"""A benchmark dataset as a dataset to import."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import cast

from PIL import Image

from pipeline.datasets.base import Dataset
from pipeline.datasets.base import Sample as DatasetSample
from pipeline.formats.base import Imported, ReadSample
from pipeline.table.statistics import Labels


def as_imported(dataset: Dataset) -> Imported:
    """The images of a dataset with their truth; those that are generated as PNG."""
    return Imported(dataset.classes, _Samples(dataset), len(dataset.samples))


@dataclass(frozen=True)
class _Samples:
    dataset: Dataset

    def __iter__(self) -> Iterator[ReadSample]:
        for number, sample in enumerate(self.dataset.samples):
            image = None
            if not sample.image:
                file = io.BytesIO()
                Image.fromarray(self.dataset.image(sample)).save(file, "PNG")
                image = file.getvalue()
            yield ReadSample(
                number=number,
                id=number,
                name=sample.name,
                uri=sample.image,
                suffix=PurePosixPath(sample.image).suffix.lower() if sample.image else ".png",
                split=self.dataset.split,
                read=functools.partial(self._labels, sample),
                image=image,
            )

    def _labels(self, sample: DatasetSample) -> Labels:
        return cast(Labels, self.dataset.truth(sample))
