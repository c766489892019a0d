"""One-shot segmentation: the folds of Pascal-5i and COCO-20i, and reproducible episodes.

An episode shows a model one or more images with the mask of a class (the support) and asks for that class in
another image (the query). The references draw episodes without a seed. Here, episode i of a seed is always
the same, whatever else is drawn, so that all models get the same episodes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from models.errors import MaskMillError, WrongUse
from pipeline.datasets.base import SegmentationDataset
from pipeline.datasets.cocoobject import NAME as COCO_OBJECT


@dataclass(frozen=True)
class OneShotBenchmark:
    """Folds of classes and a way to draw episodes.

    Attributes:
        name: name of the benchmark.
        dataset: name in the registry; ``folds`` has its ids.
        split: the split that query and support come from.
        folds: ids of the test classes per fold; the other classes are for training.
        draw: ``image``: every image with a test class, in order, with a random one of its test classes;
            ``pair``: every (image, class) pair in order, cycling;
            ``class``: a random class, then a random image of it.
        episodes: number of episodes; None for one per image.
        min_area: minimum pixels of a class for an image to count as showing it.
    """

    name: str
    dataset: str
    split: str
    folds: tuple[tuple[int, ...], ...]
    draw: Literal["image", "pair", "class"]
    episodes: int | None
    min_area: int


@dataclass(frozen=True)
class Episode:
    """A query image, its support images, and the class to find.

    Attributes:
        query: name of the sample to segment.
        support: names of other samples that show the class.
        class_id: id in the dataset.
    """

    query: str
    support: tuple[str, ...]
    class_id: int


_PASCAL_FOLDS = tuple(tuple(range(5 * fold + 1, 5 * fold + 6)) for fold in range(4))

BENCHMARKS: Mapping[str, OneShotBenchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        # PFENet's lists and area limit, as used by CLIPSeg.
        OneShotBenchmark("pascal5i", "voc21", "val", _PASCAL_FOLDS, "image", None, 2 * 32 * 32),
        # HSNet (arXiv 2104.01538): 1000 episodes over pairs.
        OneShotBenchmark("pascal5i-hsnet", "voc21", "val", _PASCAL_FOLDS, "pair", 1000, 1),
        # HSNet: thing f, f + 4, f + 8, ... of COCO 2014; id 0 is background here.
        OneShotBenchmark(
            "coco20i",
            COCO_OBJECT,
            "val2014",
            tuple(tuple(fold + 4 * step + 1 for step in range(20)) for fold in range(4)),
            "class",
            1000,
            1,
        ),
    )
}


def class_areas(dataset: SegmentationDataset) -> npt.NDArray[np.int64]:
    """Pixels per image and class, (N, C), in the order of ``samples``. Reads every mask.

    Rows are independent, so workers can compute parts to be stacked.
    """
    count = len(dataset.class_names)
    areas = np.zeros((len(dataset.samples), count), np.int64)
    for row, sample in enumerate(dataset.samples):
        truth = dataset.truth(sample)
        areas[row] = np.bincount(truth[truth != dataset.ignore_index], minlength=count)
    return areas


def draw_episodes(
    benchmark: OneShotBenchmark,
    fold: int,
    names: Sequence[str],
    areas: npt.NDArray[np.int64],
    *,
    seed: int = 0,
    shots: int = 1,
    episodes: int | None = None,
) -> list[Episode]:
    """Draw the episodes of a fold. The support never contains the query.

    Args:
        benchmark: one of ``BENCHMARKS``.
        fold: 0 to 3.
        names: names of the N samples.
        areas: pixels (N, C) from ``class_areas``.
        seed: seed for the set of episodes.
        shots: support images per episode, all different.
        episodes: overrides the benchmark's number; with ``draw="image"`` at most one per image.

    Raises:
        MaskMillError: ``wrong_use`` for a fold out of range or a count below 1; ``dataset_invalid`` if no
            image shows a class of the fold, or if fewer than ``shots`` + 1 images show a drawn class.
    """
    if not 0 <= fold < len(benchmark.folds) or shots < 1 or (episodes is not None and episodes < 1):
        raise WrongUse(
            "wrong_use",
            f"{benchmark.name}: no episodes for {fold=}, {shots=}, {episodes=}.",
            f"Give a fold from 0 to {len(benchmark.folds) - 1}, at least one shot and one episode.",
        )
    shows = areas >= benchmark.min_area
    classes = benchmark.folds[fold]
    members = {
        number: [names[row] for row in np.flatnonzero(shows[:, number]).tolist()] for number in classes
    }
    members = {number: images for number, images in members.items() if images}
    shown_in = {name: [number for number in classes if shows[row, number]] for row, name in enumerate(names)}
    pairs = [(name, number) for name, numbers in shown_in.items() for number in numbers]
    queries = [name for name, numbers in shown_in.items() if numbers]
    if not pairs:
        raise _too_few(benchmark, fold, "no image shows one of its classes")
    count = episodes or benchmark.episodes or len(queries)
    if benchmark.draw == "image":
        count = min(count, len(queries))
    drawn = []
    for index in range(count):
        # Python's generator, seeded with a string, gives the same numbers on every version and machine.
        rng = random.Random(f"{benchmark.name}/{fold}/{seed}/{index}")
        if benchmark.draw == "image":
            query = queries[index]
            number = rng.choice(shown_in[query])
        elif benchmark.draw == "pair":
            query, number = pairs[index % len(pairs)]
        else:
            number = rng.choice(sorted(members))
            query = rng.choice(members[number])
        others = [name for name in members[number] if name != query]
        if len(others) < shots:
            raise _too_few(benchmark, fold, f"class {number} is in {len(others) + 1} images only")
        drawn.append(Episode(query, tuple(rng.sample(others, shots)), number))
    return drawn


def _too_few(benchmark: OneShotBenchmark, fold: int, why: str) -> MaskMillError:
    return WrongUse(
        "dataset_invalid",
        f"{benchmark.name}, fold {fold}: {why} (at least {benchmark.min_area:,} pixels count).",
        f"Use the whole {benchmark.split} split of {benchmark.dataset}.",
    )
