"""Triplets from benchmark datasets: referring expressions, label maps, and COCO instances.

Shapes: N pairs, P phrases, C classes, H W pixels.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.datasets.base import Dataset, Sample
from pipeline.datasets.cocojson import CocoDataset, CocoSample, draw_instances
from pipeline.datasets.phrasecut import PhraseCutDataset, PhraseSample
from pipeline.ontology.ontology import BACKGROUND
from pipeline.training.clipseg.sources.base import (
    IGNORED,
    OBJECT,
    OTHER,
    Example,
    Pairs,
    TripletSource,
    fingerprint,
)

_READERS = 8


# --- referring expressions ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PhraseSource(TripletSource):
    """PhraseCut; see ``open_phrase_source``. Polygons are flattened into one array to keep pickles small."""

    _reader: PhraseCutDataset
    _images: tuple[tuple[str, int, tuple[int, int]], ...]  # URI, Visual Genome's id, (H, W)
    _points: npt.NDArray[np.float64]  # (n, 2)
    _polygon_bounds: npt.NDArray[np.int64]  # polygon i has the points [i] to [i + 1]
    _pair_bounds: npt.NDArray[np.int64]  # (N + 1,): pair i has the polygons [i] to [i + 1]

    def read(self, pair: int) -> Example:
        """See ``TripletSource.read``.

        Raises:
            MaskMillError: ``dataset_invalid``; ``mask_invalid`` if the annotation has another size.
        """
        uri, number, size = self._images[int(self.pairs.image[pair])]
        first, last = self._pair_bounds[pair : pair + 2].tolist()
        bounds = self._polygon_bounds[first : last + 1].tolist()
        sample = PhraseSample(
            name=str(pair),
            image=uri,
            phrase=self.pairs.phrases[int(self.pairs.phrase[pair])][0],
            image_id=number,
            size=size,
            polygons=tuple(self._points[start:end].tobytes() for start, end in itertools.pairwise(bounds)),
        )
        image, truth = self._reader.image_and_truth(sample)
        return Example(image, truth.astype(np.uint8))


def open_phrase_source(
    dataset: PhraseCutDataset, *, drop: Callable[[str], bool] = lambda _phrase: False
) -> PhraseSource:
    """Open the pairs of PhraseCut without further reading.

    Phrases that differ in case or spaces are different, as in the reference.

    Args:
        dataset: from ``pipeline.datasets.phrasecut.open_phrasecut``.
        drop: whether a phrase names an unseen class (``pipeline.training.clipseg.unseen``); such phrases are
            neither asked for nor used as negatives.

    Raises:
        MaskMillError: ``too_few_images``.
    """
    dropped = {phrase: drop(phrase) for phrase in set(dataset.phrases)}
    samples = [
        sample
        for sample in dataset.samples
        if isinstance(sample, PhraseSample) and not dropped[sample.phrase]
    ]
    phrases = {text: number for number, text in enumerate(sorted({sample.phrase for sample in samples}))}
    keys = [(sample.image, sample.image_id, sample.size) for sample in samples]
    images = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    polygons = [np.frombuffer(polygon) for sample in samples for polygon in sample.polygons]
    return PhraseSource(
        name=f"{dataset.name} {dataset.split}",
        fingerprint=fingerprint(dataset.fingerprint(), sorted(phrases)),
        pairs=Pairs.of(
            [(text,) for text in phrases],
            [images[key] for key in keys],
            [phrases[sample.phrase] for sample in samples],
        ),
        _reader=dataset.reader(),
        _images=tuple(images),
        _points=np.concatenate([np.empty(0), *polygons]).reshape(-1, 2),
        _polygon_bounds=np.cumsum([0, *(len(polygon) // 2 for polygon in polygons)], dtype=np.int64),
        _pair_bounds=np.cumsum([0, *(len(sample.polygons) for sample in samples)], dtype=np.int64),
    )


# --- classes ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ClassSource(TripletSource):
    """Label maps; see ``open_class_source``."""

    _reader: Dataset
    _samples: tuple[Sample, ...]
    _class_ids: npt.NDArray[np.int64]  # (N,)

    def read(self, pair: int) -> Example:
        """See ``TripletSource.read``; raises what the dataset raises."""
        image, truth = self._reader.image_and_truth(self._samples[int(self.pairs.image[pair])])
        mask = np.where(truth == self._class_ids[pair], OBJECT, OTHER)
        return Example(image, np.where(truth == self._reader.ignore_index, IGNORED, mask).astype(np.uint8))


def open_class_source(
    dataset: Dataset,
    *,
    class_ids: Sequence[int] | None = None,
    synonyms: bool = True,
    min_area: int = 1,
) -> ClassSource:
    """Open one pair per class and image. Reads every mask once.

    Args:
        dataset: any dataset of label maps; ``ignore_index`` pixels are ignored in all masks.
        class_ids: classes to ask for; None is all but the background.
        synonyms: also call classes by their synonyms, all wordings being equally likely.
        min_area: pixels that a class needs in an image to be asked for; below it, the class is not a negative
            of the image either.

    Raises:
        MaskMillError: ``wrong_use`` for an unknown class id; ``too_few_images``.
    """
    wanted = asked_classes(dataset.class_names, class_ids)

    def areas(sample: Sample) -> npt.NDArray[np.int64]:
        truth = dataset.truth(sample)
        counts = np.bincount(truth[truth != dataset.ignore_index], minlength=len(dataset.class_names))
        return counts[wanted]

    with ThreadPoolExecutor(_READERS) as pool:
        found = np.stack([np.empty(len(wanted), np.int64), *pool.map(areas, dataset.samples)])[1:]
    image, phrase = np.nonzero(found >= max(min_area, 1))
    return ClassSource(
        name=f"{dataset.name} {dataset.split}",
        fingerprint=fingerprint(dataset.fingerprint(), [wanted.tolist(), synonyms, min_area]),
        pairs=Pairs.of(
            wordings(dataset, wanted, synonyms=synonyms),
            image,
            phrase,
            unsure=np.argwhere((found > 0) & (found < min_area)),
        ),
        left_out=_without_pairs(len(found), image.tolist()),
        _reader=dataset.reader(),
        _samples=tuple(dataset.samples),
        _class_ids=wanted[phrase],
    )


@dataclass(frozen=True, eq=False)
class InstanceSource(TripletSource):
    """COCO instances; see ``open_instance_source``."""

    _reader: CocoDataset
    _samples: tuple[CocoSample, ...]
    _class_ids: npt.NDArray[np.int64]  # (N,)

    def read(self, pair: int) -> Example:
        """See ``TripletSource.read``.

        Raises:
            MaskMillError: ``dataset_invalid`` for the image; ``mask_invalid`` if the annotation has another
                size than the image.
        """
        sample = self._samples[int(self.pairs.image[pair])]
        image = self._reader.image(sample)
        if image.shape[:2] != tuple(sample.size):
            raise WrongUse(
                "mask_invalid",
                f"{sample.image} has {image.shape[0]} x {image.shape[1]} pixels, its annotation "
                f"{sample.size[0]} x {sample.size[1]}.",
                "Use the images that the annotation belongs to; they may not have been resized.",
            )
        drawn = [
            [OBJECT, *instance[1:]]
            for instance in json.loads(sample.instances)
            if instance[0] == self._class_ids[pair]
        ]
        mask: npt.NDArray[Any] = np.full(sample.size, OTHER, np.uint8)
        return Example(image, draw_instances(mask, drawn).astype(np.uint8))


def open_instance_source(
    dataset: CocoDataset, *, class_ids: Sequence[int] | None = None, synonyms: bool = True
) -> InstanceSource:
    """Open one pair per class and image of a COCO or LVIS instances file; no image is read.

    Unlike in ``open_class_source``, masks are complete where another class covers them. LVIS is not annotated
    exhaustively, and the instances file does not say for which classes, so a few negatives may be false.

    Args:
        dataset: from ``pipeline.datasets.cocojson``.
        class_ids: see ``open_class_source``.
        synonyms: see ``open_class_source``.

    Raises:
        MaskMillError: ``wrong_use``, ``too_few_images``.
    """
    wanted = asked_classes(dataset.class_names, class_ids)
    number_of = {int(class_id): number for number, class_id in enumerate(wanted)}
    samples = tuple(sample for sample in dataset.samples if isinstance(sample, CocoSample))
    found = [
        (image, number_of[class_id])
        for image, sample in enumerate(samples)
        for class_id in sorted({instance[0] for instance in json.loads(sample.instances)})
        if class_id in number_of
    ]
    phrases = [phrase for _, phrase in found]
    return InstanceSource(
        name=f"{dataset.name} {dataset.split}",
        fingerprint=fingerprint(dataset.fingerprint(), [wanted.tolist(), synonyms]),
        pairs=Pairs.of(wordings(dataset, wanted, synonyms=synonyms), [image for image, _ in found], phrases),
        left_out=_without_pairs(len(samples), [image for image, _ in found]),
        _reader=dataset.reader(),
        _samples=samples,
        _class_ids=wanted[phrases],
    )


def _without_pairs(images: int, used: Sequence[int]) -> dict[str, int]:
    """The number of images of which nothing is asked, by reason."""
    return {"images that show none of the classes": images - len(set(used))}


def asked_classes(names: Sequence[str], class_ids: Sequence[int] | None) -> npt.NDArray[np.int64]:
    """Ids of the classes to ask for, ascending: those given, or all but the background.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    if class_ids is None:
        return np.array([number for number, name in enumerate(names) if name != BACKGROUND], np.int64)
    ids = np.unique(np.asarray(class_ids, np.int64))
    if len(ids) and not 0 <= ids[0] <= ids[-1] < len(names):
        raise WrongUse(
            "wrong_use",
            f"{list(class_ids)}: class ids must be from 0 to {len(names) - 1}.",
            "Correct the ids.",
        )
    return ids


def wordings(dataset: Dataset, class_ids: Iterable[int], *, synonyms: bool) -> list[tuple[str, ...]]:
    """Wordings of each class: its name alone, or with its synonyms."""
    prompts = dataset.classes.prompts()
    return [
        tuple(prompts[number]) if synonyms else (dataset.class_names[number],)
        for number in (int(class_id) for class_id in class_ids)
    ]
