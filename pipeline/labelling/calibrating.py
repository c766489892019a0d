"""The first pass over a sample of a corpus, which measures how high each class's scores are by themselves.

A recipe asks for it (``maskclip.classes.calibrate``); what it finds becomes its ``bias`` and is recorded with
the table, so that a run that resumes, or labels new images, uses the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

import numpy as np
import pyarrow as pa

from pipeline.cluster.disks import Landmarks
from pipeline.cluster.mapping import on_ray
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import ADDRESS
from pipeline.corpus.selection import some_of
from pipeline.files.images import ImageSettings
from pipeline.labelling.labeller import PreparedLabeller
from pipeline.labelling.recipes import LabelRecipe
from pipeline.labelling.stages import Decode

if TYPE_CHECKING:
    from models.calibration import Histogram
    from pipeline.labelling.maskclip import MaskClipLabeller

IMAGES_A_PART = 32
"""Each part loads the model once."""


def plain_scores(recipe: LabelRecipe) -> LabelRecipe:
    """The recipe whose scores are measured: without candidates, purification and a bias of its own."""
    return recipe.with_classes(
        candidates=0, candidates_above=0.0, redundant_below=0.0, ambiguous_above=0.0, calibrate=0.0, bias=()
    )


def calibrated(recipe: LabelRecipe, histogram: Histogram) -> LabelRecipe:
    """The recipe with the bias that a histogram of its plain scores leads to.

    Raises:
        MaskMillError: ``labelling_failed`` if nothing was counted.
    """
    from models.calibration import bias_of

    asked = recipe.maskclip.classes
    return recipe.with_classes(bias=bias_of(histogram, asked.calibrate, asked.calibrate_weight))


def count_scores(labeller: MaskClipLabeller, images: Iterable[np.ndarray]) -> Histogram:
    """Histograms (C, K) of the plain scores of images (Hn, Wn, 3), uint8 RGB."""
    import torch

    from models.calibration import BINS, score_histogram

    total = np.zeros((labeller.text.num_classes, BINS), np.int64)
    for image in images:
        batch = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
        for scored in labeller.scores(batch.to(labeller.device)):
            total += score_histogram(scored.scores)
    return total


def count_corpus(
    recipe: LabelRecipe,
    corpus: Corpus,
    prepared: PreparedLabeller,
    *,
    workers: int,
    notice: Callable[[str], None] = lambda _text: None,
) -> Histogram:
    """``count_scores`` of a sample of a corpus, on Ray, which must be running.

    Images that cannot be read are left out.

    Args:
        recipe: says how many images, and how they are decoded.
        corpus: the images.
        prepared: of ``plain_scores(recipe)``.
        workers: parallel tasks.
        notice: called with what the user should know.
    """
    sample = some_of(corpus, recipe.maskclip.classes.calibrate_images).table()
    parts = [str(start) for start in range(0, sample.num_rows, IMAGES_A_PART)]
    addresses = sample[ADDRESS if ADDRESS in sample.column_names else "uri"].to_pylist()
    count = functools.partial(_count_part, sample=sample, images=recipe.images, prepared=prepared)
    landmarks = Landmarks.of(address for address in addresses if address)
    found = list(on_ray(count, parts, workers, notice=notice, landmarks=landmarks))
    return sum(found[1:], found[0])


def _count_part(
    part: str, *, sample: pa.Table, images: ImageSettings, prepared: PreparedLabeller
) -> Histogram:
    labeller = cast("MaskClipLabeller", prepared.build(threads=1))
    rows = sample.slice(int(part), IMAGES_A_PART)

    def decoded() -> Iterable[np.ndarray]:
        for chunk in Decode(images)(rows):
            for row in chunk.to_pylist():
                if row["status"] == "ok":
                    shape = (row["network_height"], row["network_width"], 3)
                    yield np.frombuffer(row["pixels"], np.uint8).reshape(shape)

    return count_scores(labeller, decoded())
