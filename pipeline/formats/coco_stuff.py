"""COCO-Stuff: a pixel map per image, and JSON with one RLE per class and image.

    annotations/stuff_SPLIT.json                  images, annotations, categories
    annotations/stuff_SPLIT_pixelmaps/NAME.png    category ids, 0 is unlabelled

Every class is there, things as well, so annotations cover all labelled pixels and never overlap. Pixel maps
have a palette for up to 255 classes, else 16 bits. What it shares with its relatives is in ``cocolike``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from pipeline.files.storage import Storage
from pipeline.formats.base import Entry, Imported, ReadSample, Sample, Written
from pipeline.formats.classes import ontology_of
from pipeline.formats.cocolike import (
    CocoAnnotation,
    CocoImage,
    CocoSplit,
    copy_image,
    image_entry,
    invalid,
    left_out,
    open_place,
    read_splits,
    title,
)
from pipeline.formats.jsonfile import JsonFiles
from pipeline.formats.pictures import palette_png
from pipeline.formats.segmentation import checked, encoded
from pipeline.ontology.ontology import MAX_CLASSES, Ontology
from pipeline.table.labels import encode_mask
from pipeline.table.statistics import Labels

_PREFIX = "stuff_"
_MOST_IN_PALETTE = 255


@dataclass(frozen=True)
class CocoStuff:
    """Pixel maps and RLEs of classes, as the toolbox of COCO-Stuff reads them."""

    name: ClassVar[str] = "coco-stuff"
    with_images: ClassVar[bool] = False
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """Write the pixel maps; see ``Format``."""
        palette = np.vstack([np.zeros((1, 3), np.uint8), ontology.palette()])
        for sample in samples:
            ids = np.where(sample.labels == ontology.ignore_index, 0, sample.labels.astype(np.uint16) + 1)
            output.write_bytes(
                f"annotations/{_PREFIX}{sample.split}_pixelmaps/{sample.name}.png",
                palette_png(ids.astype(np.uint8), palette)
                if ontology.num_classes <= _MOST_IN_PALETTE
                else encode_mask(ids),
            )
            copy_image(sample, output)
            annotations = [
                {"image_id": sample.number + 1, "category_id": category_id, **rle, "iscrowd": 0}
                for category_id, rle in _rles(ids)
            ]
            entry = {"split": sample.split, "image": image_entry(sample), "annotations": annotations}
            yield Written(entry)

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> list[str]:
        """Write the JSON files; see ``Format``."""
        kinds = [kind or "stuff" for kind in ontology.kinds()]
        categories = [
            {"id": number, "name": name, "supercategory": kind}
            for number, (name, kind) in enumerate(zip(ontology.names, kinds, strict=True), 1)
        ]
        head = {"info": {"description": ontology.name}, "categories": categories}
        numbers: dict[str, int] = {}
        with JsonFiles(output, head, ("images", "annotations")) as files:
            for entry in entries:
                name = f"annotations/{_PREFIX}{entry['split']}.json"
                files[name].add("images", entry["image"])
                for annotation in entry["annotations"]:
                    numbers[name] = numbers.get(name, 0) + 1
                    files[name].add("annotations", {"id": numbers[name]} | annotation)
        return files.names


def _rles(ids: Labels) -> Iterator[tuple[int, dict[str, Any]]]:
    """Segmentation, area and box of each category id in a pixel map."""
    from pycocotools import mask as coco

    by_column = np.asfortranarray(ids)
    for category_id in np.flatnonzero(np.bincount(ids.ravel())).tolist():
        if category_id:
            rle = coco.encode((by_column == category_id).view(np.uint8))
            yield (
                category_id,
                {
                    "segmentation": {"size": list(ids.shape), "counts": rle["counts"].decode("ascii")},
                    "area": int(coco.area(rle)),
                    "bbox": [int(number) for number in coco.toBbox(rle)],
                },
            )


# --- reading ---


def read_coco_stuff(place: str, *, images: str | None = None) -> Imported:
    """Read all splits, from their JSON files alone.

    Args:
        place: path or URI of the dataset, of its folder ``annotations``, or of one JSON file.
        images: folder of the images, or of folders of splits, if they are elsewhere.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; also while samples are
            read: ``dataset_invalid`` for annotations that cannot be drawn or overlap.
    """
    storage, file = open_place(place)
    splits = read_splits(storage, _PREFIX, CocoStuff.name, images, file=file)
    ontology = ontology_of(CocoStuff.name, splits[0].classes.values(), where=splits[0].where)
    count = sum(len(split.images) for split in splits)
    return Imported(ontology, _Samples(splits, ontology), count, functools.partial(left_out, splits))


@dataclass(frozen=True)
class _Samples:
    """Samples in the order of the images; may be iterated again."""

    splits: list[CocoSplit]
    ontology: Ontology

    def __iter__(self) -> Iterator[ReadSample]:
        number = 0
        for split in self.splits:
            of_image = split.by_image()
            for image_id, image in split.images.items():
                yield split.sample(
                    number, image, functools.partial(self._drawn, image, of_image.pop(image_id), split)
                )
                number += 1

    def _drawn(
        self, image: CocoImage, annotations: list[tuple[int, CocoAnnotation]], split: CocoSplit
    ) -> Labels:
        from pycocotools import mask as coco

        class_ids = {category: class_id for class_id, category in enumerate(split.classes)}
        labels: Any = np.full(image.size, self.ontology.ignore_index, self.ontology.mask_dtype)
        for place, one in annotations:
            what = title(place)
            try:
                parts = checked(one.segmentation, *image.size)
            except ValueError as error:
                raise invalid(split.where, f"{what}: its segmentation cannot be drawn: {error}") from None
            if not parts:
                continue
            mask = coco.decode(encoded(parts, *image.size)).view(bool)
            if (labels[mask] != self.ontology.ignore_index).any():
                raise invalid(split.where, f"{what} overlaps another; in COCO-Stuff a pixel has one class")
            labels[mask] = class_ids[one.category_id]
        drawn: Labels = labels
        return drawn
