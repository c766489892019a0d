"""Triplets from a label table: CLIPSeg learns from another model's labels, without annotation.

Where people have corrected an image, it learns what they say.

Shapes: N pairs, C classes of the ontology, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.errors import WrongUse
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.corrections import Corrections
from pipeline.table.labels import DATASET_FILE
from pipeline.table.splits import Chosen
from pipeline.table.views import TableView
from pipeline.training.clipseg.sources.base import (
    IGNORED,
    OBJECT,
    OTHER,
    Example,
    Pairs,
    TripletSource,
    fingerprint,
)
from pipeline.training.clipseg.sources.benchmarks import asked_classes
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.corrected import open_corrected_samples
from pipeline.training.samples.index import read_index
from pipeline.training.samples.mixed import MixedSamples
from pipeline.training.samples.table import TableSamples

_MIXED_IMAGES = 64
"""Images within which the pairs of one image are spread out."""


@dataclass(frozen=True, eq=False)
class TableSource(TripletSource):
    """See ``open_table_source``.

    Only whole parts of a table can be read, so supports come from the query's part where possible.
    """

    _table: TableSamples | MixedSamples
    _class_ids: npt.NDArray[np.int64]  # (N,)

    def read(self, pair: int) -> Example:
        """See ``TripletSource.read``; the weight is the table's confidence, and 1 where people say it.

        Raises:
            MaskMillError: see ``TableSamples.load``.
        """
        found = self._table.read(int(self.pairs.image[pair]))
        known = found.maps["labels"] >= 0
        ids = np.where(known, found.maps["labels"], found.maps["teacher"])
        mask = np.where(ids == self._class_ids[pair], OBJECT, np.where(ids < 0, IGNORED, OTHER))
        weight = np.where(known, np.float32(1), found.maps["confidence"].astype(np.float32) / np.float32(255))
        return Example(found.image, mask.astype(np.uint8), weight)

    def order(self, epoch: int, seed: int, *, grouped: bool = False) -> npt.NDArray[np.int64]:
        """See ``TripletSource.order``.

        Images come in the order of ``TableSamples``, which reads each part once; the pairs of an image are
        spread over the next ``_MIXED_IMAGES`` images.
        """
        images = self._table.order(0 if grouped else epoch, seed)
        place = np.empty(self._table.num_images)
        place[images] = np.arange(len(images))
        at = place[self.pairs.image]
        if not grouped:
            at = at + np.random.default_rng((seed, epoch, 1)).uniform(0, _MIXED_IMAGES, len(at))
        return np.argsort(at, kind="stable")


def open_table_source(
    table: str,
    *,
    ontology: Ontology,
    class_ids: Sequence[int] | None = None,
    synonyms: bool = True,
    min_quality: float = 0.0,
    min_share: float = 0.0,
    min_confidence: float = 0.0,
    view: TableView | None = None,
    chosen: Chosen | None = None,
    corrections: Corrections | None = None,
) -> TableSource:
    """Open one pair per class and image of a table. Reads the table's index, and no labels without a view.

    In the loss, every pixel of every mask weighs as much as the confidence of its label. Unlabelled pixels
    are ignored.

    Args:
        table: output of a labelling run: a path or URI.
        ontology: class names; the table's classes are matched by name and synonym.
        class_ids: classes of the ontology to ask for; None is all but the background.
        synonyms: also call classes by their synonyms, all wordings being equally likely.
        min_quality: minimum quality score of a row, in [0, 1].
        min_share: minimum share of an image's labelled pixels that a class must cover to be asked for, in
            [0, 1].
        min_confidence: minimum mean confidence of a class in an image to be asked for, in [0, 1]. A class
            below either minimum is not a negative of that image either.
        view: of the table; see ``open_table_samples``.
        chosen: use only these images.
        corrections: what people say of the labels, which is believed instead of them.

    Raises:
        MaskMillError: see ``open_table_samples``; ``wrong_use``; ``too_few_images``.
    """
    wanted = asked_classes(ontology.names, class_ids)
    for name, value in (("min_share", min_share), ("min_confidence", min_confidence)):
        if not 0 <= value <= 1:
            raise WrongUse("wrong_use", f"{name} is {value}.", "Use a number from 0 to 1.")
    samples = open_corrected_samples(
        table,
        corrections,
        ontology=ontology,
        augment=AugmentSettings(),
        min_quality=min_quality,
        view=view,
        chosen=chosen,
    )
    image, class_of, share, confidence = _segments(samples)
    asked = np.isin(class_of, wanted)
    good = asked & (share >= min_share) & (confidence >= min_confidence)
    unsure = asked & ~good
    phrase = np.searchsorted(wanted, class_of)
    prompts = ontology.prompts()
    names = [prompts[number] if synonyms else prompts[number][:1] for number in wanted.tolist()]
    settings = [ontology.hash, wanted.tolist(), synonyms, min_quality, min_share, min_confidence]
    if view is not None:
        settings.append(view.view.hash)
    if chosen is not None:
        settings += [chosen.part, chosen.identity]
    if corrections is not None:
        settings.append(corrections.identity)
    return TableSource(
        name="label table" if view is None else f"label table ({'; '.join(view.view.described())})",
        fingerprint=fingerprint(open_storage(table).read_json(DATASET_FILE, None), settings),
        pairs=Pairs.of(
            names,
            image[good],
            phrase[good],
            block=_parts(samples)[image[good]],
            unsure=np.stack([image[unsure], phrase[unsure]], 1),
        ),
        left_out={f"images {reason}": number for reason, number in samples.left_out.items()},
        _table=samples,
        _class_ids=class_of[good],
    )


def _parts(samples: TableSamples | MixedSamples) -> npt.NDArray[np.int64]:
    """The part of each image, (N,); those of the corrections come after those of the table."""
    if isinstance(samples, TableSamples):
        return samples.part.astype(np.int64)
    own, other = samples.guessed, samples.known
    return np.concatenate([own.part, len(own.parts) + other.part[samples.only_known]]).astype(np.int64)


def _segments(
    samples: TableSamples | MixedSamples,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Per class and image: image, class of the ontology, share of the labelled pixels, mean confidence."""
    if isinstance(samples, TableSamples):
        return _segments_of_table(samples)
    guessed, known = _segments_of_table(samples.guessed), _segments_of_table(samples.known)
    place = samples.place_of_known
    kept = samples.known_of[guessed[0]] < 0
    image, class_of, share, confidence = (
        np.concatenate([one[kept], other])
        for one, other in zip(guessed, (place[known[0]], *known[1:]), strict=True)
    )
    return image, class_of, share, confidence


def _segments_of_table(
    samples: TableSamples,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    count = samples.num_classes
    keys, areas, sums = [np.empty(0, np.int64)], [np.empty(0)], [np.empty(0)]
    for number, part in enumerate(samples.parts):
        images = np.flatnonzero(samples.part == number)
        found = read_index(samples.storage, part, samples.view)[0]["segments"].combine_chunks()
        found = found.take(pa.array(samples.row[images]))
        owner = np.repeat(images, found.value_lengths().fill_null(0).to_numpy())
        flat = found.flatten()
        class_id, area, mean = (
            flat.field(name).to_numpy(zero_copy_only=False)
            for name in ("class_id", "area", "mean_confidence")
        )
        ids = samples.teacher[class_id.astype(np.int64)]
        known = ids >= 0
        keys.append(owner[known] * count + ids[known])
        areas.append(area[known].astype(np.float64))
        sums.append(areas[-1] * mean[known])
    # Two classes of the table may map to one of the ontology.
    pair, where = np.unique(np.concatenate(keys), return_inverse=True)
    area_of = np.bincount(where, np.concatenate(areas), len(pair))
    confidence = np.bincount(where, np.concatenate(sums), len(pair)) / np.maximum(area_of, 1)
    image, class_of = pair // count, pair % count
    labelled = np.bincount(image, area_of, samples.num_images)[image]
    return image, class_of, area_of / np.maximum(labelled, 1), confidence
