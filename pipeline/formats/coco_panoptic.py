"""COCO panoptic: a segment is an instance of a thing, or all of a stuff class in the image.

    annotations/panoptic_SPLIT.json        images, annotations with ``segments_info``, categories
    annotations/panoptic_SPLIT/NAME.png    RGB; the id of a segment is R + 256 G + 65536 B, 0 is unlabelled

Labels do not tell instances that touch: an instance is a connected component (8 neighbours) of a thing class.
What it shares with its relatives is in ``cocolike``.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import Field

from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.storage import Storage
from pipeline.formats.base import Entry, Imported, Loss, ReadSample, Sample, Written
from pipeline.formats.classes import ontology_of
from pipeline.formats.cocolike import (
    CocoImage,
    CocoSplit,
    Model,
    copy_image,
    image_entry,
    invalid,
    open_place,
    parsed,
    read_splits,
    title,
)
from pipeline.formats.jsonfile import JsonFiles
from pipeline.formats.masks import check_png_size, unreadable
from pipeline.formats.names import refuse_outside
from pipeline.ontology.ontology import MAX_CLASSES, Ontology
from pipeline.table.statistics import Labels

MOST_SEGMENTS = 2**24 - 1
"""Ids that fit three bytes, without 0."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), int)
_PREFIX = "panoptic_"


@dataclass(frozen=True)
class CocoPanoptic:
    """Segments for panoptic segmentation, as panopticapi reads them.

    Attributes:
        unspecified: what classes are whose ``kind`` the ontology leaves open.
        min_area: pixels; smaller segments become unlabelled.
    """

    name: ClassVar[str] = "coco-panoptic"
    with_images: ClassVar[bool] = False
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES
    unspecified: Literal["thing", "stuff"] = "stuff"
    min_area: int = 0

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """Write the PNGs; see ``Format``."""
        things = self._things(ontology)
        for sample in samples:
            ids, classes = find_segments(sample.labels, things, ontology.ignore_index)
            areas = np.bincount(ids.ravel(), minlength=len(classes) + 1)[1:]
            large = areas >= self.min_area
            lost = Loss(pixels=int(areas[~large].sum()), segments=int((~large).sum()))
            if lost.segments:
                ids = np.where(large, large.cumsum(), 0)[ids - 1] * (ids > 0)
                classes, areas = classes[large], areas[large]
            output.write_bytes(f"annotations/{_PREFIX}{sample.split}/{sample.name}.png", _encode(ids))
            copy_image(sample, output)
            segments = [
                {"id": number, "category_id": class_id + 1, "area": area, "bbox": box, "iscrowd": 0}
                for number, (class_id, area, box) in enumerate(
                    zip(classes.tolist(), areas.tolist(), _boxes(ids), strict=True), 1
                )
            ]
            annotation = {
                "image_id": sample.number + 1,
                "file_name": f"{sample.name}.png",
                "segments_info": segments,
            }
            entry = {"split": sample.split, "image": image_entry(sample), "annotation": annotation}
            yield Written(entry, lost)

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> list[str]:
        """Write the JSON files; see ``Format``."""
        head = {"info": {"description": ontology.name}, "categories": self._categories(ontology)}
        with JsonFiles(output, head, ("images", "annotations")) as files:
            for entry in entries:
                file = files[f"annotations/{_PREFIX}{entry['split']}.json"]
                file.add("images", entry["image"])
                file.add("annotations", entry["annotation"])
        return files.names

    def _things(self, ontology: Ontology) -> npt.NDArray[np.bool_]:
        return np.array([(kind or self.unspecified) == "thing" for kind in ontology.kinds()])

    def _categories(self, ontology: Ontology) -> list[dict[str, Any]]:
        rows = zip(ontology.names, self._things(ontology).tolist(), ontology.palette().tolist(), strict=True)
        return [
            {
                "id": number,
                "name": name,
                "supercategory": "thing" if thing else "stuff",
                "isthing": int(thing),
                "color": color,
            }
            for number, (name, thing, color) in enumerate(rows, 1)
        ]


def find_segments(
    labels: Labels, things: npt.NDArray[np.bool_], ignore_index: int, *, most: int = MOST_SEGMENTS
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Divide a label map into segments.

    Args:
        labels: (H, W).
        things: by class id, whether its connected components are instances.
        ignore_index: id of unlabelled pixels.
        most: with more segments, each class is one.

    Returns:
        Ids of segments (H, W) from 1, 0 for unlabelled pixels; and class ids by segment. Segments are sorted
        by class, and those of a class by their first pixel in reading order.
    """
    from scipy import ndimage

    ids = np.zeros(labels.shape, np.int32)
    classes: list[int] = []
    for value, box in enumerate(ndimage.find_objects(labels.astype(np.int32) + 1)):
        if box is None or value == ignore_index:
            continue
        mask = labels[box] == value
        found, count = ndimage.label(mask, _EIGHT_NEIGHBOURS) if things[value] else (mask, 1)
        ids[box][mask] = found[mask] + len(classes)
        classes += [value] * count
    if len(classes) > most:
        return find_segments(labels, np.zeros_like(things), ignore_index)
    return ids, np.array(classes, np.int64)


def _boxes(ids: npt.NDArray[np.int32]) -> list[list[int]]:
    """[x, y, width, height] by segment."""
    from scipy import ndimage

    return [
        [columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start]
        for rows, columns in ndimage.find_objects(ids)
    ]


def _encode(ids: npt.NDArray[np.int32]) -> bytes:
    """As PNG, losslessly compressed."""
    import cv2

    blue_first = np.stack([ids >> 16, ids >> 8 & 255, ids & 255], axis=-1).astype(np.uint8)
    done, data = cv2.imencode(".png", blue_first, [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert done
    return bytes(data)


# --- reading ---


class _Segment(Model):
    id: Annotated[int, Field(ge=1, le=MOST_SEGMENTS)]
    category_id: int


class _Annotation(Model):
    image_id: int
    file_name: str
    segments_info: list[_Segment]


def read_coco_panoptic(place: str, *, images: str | None = None) -> Imported:
    """Read all splits; segments become their classes.

    Args:
        place: path or URI of the dataset, of its folder ``annotations``, or of one JSON file.
        images: folder of the images, or of folders of splits, if they are elsewhere.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; also while samples are
            read: ``dataset_invalid``, ``mask_invalid``.
    """
    storage, file = open_place(place)
    splits = read_splits(storage, _PREFIX, CocoPanoptic.name, images, file=file)
    ontology = ontology_of(CocoPanoptic.name, splits[0].classes.values(), where=splits[0].where)
    count = sum(len(split.annotations) for split in splits)
    return Imported(ontology, _Samples(splits, ontology), count)


@dataclass(frozen=True)
class _Samples:
    """Samples in the order of the annotations; may be iterated again."""

    splits: list[CocoSplit]
    ontology: Ontology

    def __iter__(self) -> Iterator[ReadSample]:
        number = 0
        for split in self.splits:
            class_ids = {category: class_id for class_id, category in enumerate(split.classes)}
            for place, raw in enumerate(split.annotations, 1):
                what = title(place)
                one = parsed(_Annotation, raw, what, split.where)
                image = split.images.get(one.image_id)
                if image is None:
                    raise invalid(
                        split.where,
                        f"{what} is of image {one.image_id}, which the file does not list",
                    )
                file = f"{split.name.removesuffix('.json')}/{refuse_outside(one.file_name, split.where)}"
                mask = split.place.uri_of(file)
                read = functools.partial(self._labels, mask, image, one.segments_info, class_ids, split)
                yield split.sample(number, image, read)
                number += 1

    def _labels(
        self,
        mask: str,
        image: CocoImage,
        segments: list[_Segment],
        class_ids: dict[int, int],
        split: CocoSplit,
    ) -> Labels:
        known = {0: self.ontology.ignore_index}
        for one in segments:
            if one.id in known:
                raise invalid(split.where, f"two segments of {mask} have the id {one.id}")
            if one.category_id not in class_ids:
                raise invalid(split.where, f"segment {one.id} of {mask} is of no category of the file")
            known[one.id] = class_ids[one.category_id]
        ids = _decode(mask, image.size)
        lookup = np.full(int(ids.max()) + 1, -1, np.int32)
        for number, class_id in known.items():
            if number < len(lookup):
                lookup[number] = class_id
        found: Any = lookup[ids]
        if found.min() < 0:
            raise invalid(mask, f"segment {ids[found < 0][0]} has no entry in {split.where}")
        labels: Labels = found.astype(self.ontology.mask_dtype)
        return labels


def _decode(mask: str, size: tuple[int, int]) -> npt.NDArray[np.uint32]:
    """Ids of segments (H, W)."""
    try:
        data = fetch(mask)
    except ImageError as error:
        raise unreadable(mask, str(error)) from error
    check_png_size(data, mask, size)
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            mode, array = opened.mode, np.asarray(opened)
    except Exception as error:  # Pillow raises all sorts of exceptions on damaged files
        raise unreadable(mask, f"it is no whole PNG ({type(error).__name__})") from error
    if mode not in ("RGB", "RGBA"):
        raise invalid(mask, f"it is a picture of mode {mode}; ids of segments are in RGB")
    red, green, blue = (array[..., channel].astype(np.uint32) for channel in range(3))
    ids: npt.NDArray[np.uint32] = red | green << np.uint32(8) | blue << np.uint32(16)
    return ids
