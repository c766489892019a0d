"""The toy world as a dataset: scenes drawn from a seed in memory, without files."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.datasets.base import Dataset, Labels, Sample, Source
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld import scenes as toyworld

SOURCE = Source(
    "The toy world", "this project (pipeline/toyworld/scenes.py)", "no files: scenes are drawn from a seed"
)


@dataclass(frozen=True)
class ToySample(Sample):
    """A scene; ``index`` is its number among the scenes of the seed."""

    index: int = 0


@dataclass(frozen=True)
class ToyDataset(Dataset):
    """Scenes of one seed, with a side of ``size`` pixels."""

    seed: int
    size: int

    def scene(self, sample: Sample) -> toyworld.Scene:
        """Draw image, labels and caption together."""
        assert isinstance(sample, ToySample)
        return toyworld.scene(self.seed, sample.index, self.size)

    def truth(self, sample: Sample) -> Labels:
        """See ``Dataset.truth``; uint8 (size, size)."""
        return self.scene(sample).labels

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """See ``Dataset.image``; (size, size, 3)."""
        return self.scene(sample).image

    def image_and_truth(self, sample: Sample) -> tuple[npt.NDArray[np.uint8], Labels]:
        """See ``Dataset.image_and_truth``."""
        scene = self.scene(sample)
        return scene.image, scene.labels


def open_toyworld(
    root: str | None = None, *, split: str = "seed-2", count: int = 64, size: int = 128
) -> ToyDataset:
    """Open scenes of the toy world.

    Args:
        root: must be None.
        split: ``seed-N``. The bundled CLIP was trained on seed 0, and its model card reports seed 1.
        count: number of scenes, at least 1.
        size: side in pixels, at least 16.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    match = re.fullmatch(r"seed-(\d{1,9})", split)
    if root is not None or match is None or count < 1 or size < 16:
        raise WrongUse(
            "wrong_use",
            f"The toy world cannot be opened with {root=}, {split=}, {count=}, {size=}.",
            "Give no root, a split such as seed-2, a count of at least 1 and a size of at least 16 pixels.",
        )
    seed = int(match[1])
    return ToyDataset(
        name="toyworld",
        split=split,
        classes=load_ontology("toyworld"),
        samples=tuple(ToySample(f"scene_{index:06d}", "", None, index) for index in range(count)),
        identity=f"{size} pixels",
        seed=seed,
        size=size,
    )
