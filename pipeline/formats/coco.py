"""COCO instances: each connected component of a class as a segment, with its holes.

    annotations/instances_SPLIT.json   images, annotations, categories
    classes.json                       the whole ontology, for MaskMill
    images/SPLIT/NAME.jpg              if images are copied

Segmentations are RLEs of pycocotools, so that holes and every pixel are kept; diagonal neighbours are
connected. The background is no category. Where the classes have one, an image's entry holds the pixels that
are ignored as an RLE ``ignored``, which other programs pass over. What it shares with its relatives is in
``cocolike``.

Datasets of others are read too: crowd regions are drawn first, then segments from large to small, so that of
those that overlap the smaller one wins. Pixels without a segment are background, if there is a background,
else ignored.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field

from pipeline.files.storage import Storage
from pipeline.formats.base import Entry, Imported, Loss, ReadSample, Sample, Written
from pipeline.formats.classes import CLASSES_FILE, ontology_of, read_classes, write_classes
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
from pipeline.formats.segmentation import checked, draw_instances
from pipeline.ontology.ontology import MAX_CLASSES, Ontology
from pipeline.table.statistics import Labels

_PREFIX = "instances_"

Components = npt.NDArray[np.int32]
"""(H, W): number of a component, from 1, at each of its pixels, else 0."""


@dataclass(frozen=True)
class Coco:
    """Instances, as pycocotools reads them.

    Attributes:
        min_area: pixels that a component needs to be a segment of its own.
        crowd: keep what is smaller, as one crowd region (iscrowd) for each class of an image.
    """

    name: ClassVar[str] = "coco"
    with_images: ClassVar[bool] = False
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES

    min_area: Annotated[int, Field(ge=1)] = 1
    crowd: bool = False

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """Find the segments; see ``Format``."""
        background = 0 if ontology.background is not None else None
        for sample in samples:
            copy_image(sample, output)
            segments, components, lost = find_segments(
                sample.labels,
                leave_out={ontology.ignore_index, background} - {None},
                min_area=self.min_area,
                crowd=self.crowd,
            )
            counts = encode_components(components, len(segments))
            annotations = [
                {
                    "image_id": sample.number + 1,
                    "category_id": segment.class_id + 1,
                    "segmentation": {"size": list(sample.labels.shape), "counts": text},
                    "area": segment.area,
                    "bbox": list(segment.bbox),
                    "iscrowd": int(segment.crowd),
                }
                for segment, text in zip(segments, counts, strict=True)
            ]
            image = image_entry(sample)
            ignored = sample.labels == ontology.ignore_index
            if background is not None and ignored.any():
                (text,) = encode_components(ignored.astype(np.int32), 1)
                image["ignored"] = {"size": list(ignored.shape), "counts": text}
            yield Written({"split": sample.split, "image": image, "annotations": annotations}, lost)

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """Write the JSON files; see ``Format``."""
        colours = ontology.palette().tolist()
        kinds = [kind or "" for kind in ontology.kinds()]
        first = int(ontology.background is not None)
        categories = [
            {
                "id": number + 1,
                "name": ontology.names[number],
                "supercategory": kinds[number],
                "color": colours[number],
            }
            for number in range(first, ontology.num_classes)
        ]
        head = {"info": {"description": ontology.name}, "licenses": [], "categories": categories}
        write_classes(output, ontology)
        number = 0
        with JsonFiles(output, head, ("images", "annotations")) as files:
            for entry in entries:
                file = files[f"annotations/{_PREFIX}{entry['split']}.json"]
                file.add("images", entry["image"])
                for annotation in entry["annotations"]:
                    number += 1
                    file.add("annotations", {"id": number} | annotation)
        return files.names


class Segment(NamedTuple):
    """A component, or a crowd region.

    Attributes:
        class_id: its class.
        area: in pixels.
        bbox: x, y, width and height in pixels.
        crowd: whether it is a crowd region.
    """

    class_id: int
    area: int
    bbox: tuple[int, int, int, int]
    crowd: bool = False


def find_segments(
    labels: Labels, *, leave_out: Iterable[int | None] = (), min_area: int = 1, crowd: bool = False
) -> tuple[list[Segment], Components, Loss]:
    """The connected components of a label map.

    Args:
        labels: (H, W).
        leave_out: ids that are no class.
        min_area: smaller components are left out, or joined if they are a crowd.
        crowd: whether they are.

    Returns:
        The segments by ascending class id, their components, and what was left out.
    """
    import cv2

    components: Components = np.zeros(labels.shape, np.int32)
    segments: list[Segment] = []
    lost = Loss()
    for class_id in np.flatnonzero(np.bincount(labels.ravel())).tolist():
        if class_id in leave_out:
            continue
        mask = labels == class_id
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        top, left = int(rows[0]), int(columns[0])
        box = slice(top, int(rows[-1]) + 1), slice(left, int(columns[-1]) + 1)
        # OpenCV takes connectivity with diagonals by default; said, since the format depends on it.
        _, found, statistics, _ = cv2.connectedComponentsWithStats(mask[box].view(np.uint8), connectivity=8)
        areas = statistics[:, cv2.CC_STAT_AREA]
        small = areas < min_area
        small[0] = False  # what is not of the class
        number = np.zeros(len(areas), np.int32)
        large = np.flatnonzero(~small)[1:]
        number[large] = len(segments) + 1 + np.arange(len(large))
        for one in large.tolist():
            x, y, width, height, area = statistics[one].tolist()
            segments.append(Segment(class_id, area, (left + x, top + y, width, height)))
        if small.any() and crowd:
            number[small] = len(segments) + 1
            segments.append(_crowd(class_id, statistics[small], left, top))
        elif small.any():
            lost.segments += int(small.sum())
            lost.pixels += int(areas[small].sum())
        inside = mask[box]
        components[box][inside] = number[found[inside]]
    return segments, components, lost


def _crowd(class_id: int, statistics: npt.NDArray[np.int32], left: int, top: int) -> Segment:
    """The union of components, from the statistics of OpenCV (n, 5): x, y, width, height, area."""
    x, y, width, height, area = statistics.T
    x0, y0 = int(x.min()), int(y.min())
    bbox = left + x0, top + y0, int((x + width).max()) - x0, int((y + height).max()) - y0
    return Segment(class_id, int(area.sum()), bbox, crowd=True)


def encode_components(components: Components, count: int) -> list[str]:
    """The compressed RLE of each component, as text; all of them in one pass over the image.

    Args:
        components: numbers 1 to ``count``, all of them there.
        count: number of components.
    """
    from pycocotools import mask as coco

    if not count:
        return []
    height, width = components.shape
    flat = components.ravel(order="F")
    starts = np.concatenate([[0], np.flatnonzero(np.diff(flat)) + 1])
    runs = np.stack([starts, np.append(starts[1:], flat.size)], 1)  # (R, 2): first pixel, one past the last
    numbers = flat[starts]
    order = np.argsort(numbers, kind="stable")
    bounds = np.searchsorted(numbers[order], np.arange(1, count + 2))
    plain = []
    for first, last in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = runs[order[first:last]].ravel()
        lengths = np.diff(own, prepend=0).tolist()
        if own[-1] < flat.size:
            lengths.append(flat.size - int(own[-1]))
        plain.append({"size": [height, width], "counts": lengths})
    return [rle["counts"].decode("ascii") for rle in coco.frPyObjects(plain, height, width)]


# --- reading ---


def read_coco(place: str, *, images: str | None = None) -> Imported:
    """Read all splits.

    The JSON files are read whole. Annotations without a segmentation, or without an area, are passed over.

    Args:
        place: path or URI of the dataset, of its folder ``annotations``, or of one JSON file.
        images: folder of the images, or of folders of splits, if they are elsewhere.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; also while samples are
            read: ``dataset_invalid`` for annotations that cannot be drawn.
    """
    storage, file = open_place(place)
    splits = read_splits(storage, _PREFIX, Coco.name, images, file=file)
    if storage.exists(CLASSES_FILE):
        ontology = read_classes(storage, Coco.name)
        unknown = [number for number in splits[0].classes if not 0 < number <= ontology.num_classes]
        if unknown:
            raise invalid(splits[0].where, f"category {unknown[0]} is no class of {CLASSES_FILE}")
        class_ids = {category: category - 1 for category in splits[0].classes}
    else:
        ontology = ontology_of(Coco.name, splits[0].classes.values(), where=splits[0].where)
        class_ids = {category: class_id for class_id, category in enumerate(splits[0].classes)}
    count = sum(len(split.images) for split in splits)
    return Imported(
        ontology, _Samples(splits, ontology, class_ids), count, functools.partial(left_out, splits)
    )


@dataclass(frozen=True)
class _Samples:
    """Samples in the order of the images; may be iterated again."""

    splits: list[CocoSplit]
    ontology: Ontology
    class_ids: dict[int, int]

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
        blank = 0 if self.ontology.background is not None else self.ontology.ignore_index
        labels: Any = np.full(image.size, blank, self.ontology.mask_dtype)
        instances = []
        if image.ignored is not None:
            parts = self._parts(image.ignored, image, f"image {image.id}", split)
            draw_instances(labels, [[self.ontology.ignore_index, 1, 0, parts]])
        for place, one in annotations:
            if not one.segmentation:
                continue
            parts = self._parts(one.segmentation, image, title(place), split)
            if parts:
                instances.append([self.class_ids[one.category_id], bool(one.iscrowd), place, parts])
        drawn: Labels = draw_instances(labels, instances)
        return drawn

    def _parts(self, segmentation: Any, image: CocoImage, what: str, split: CocoSplit) -> list[Any]:
        try:
            return checked(segmentation, *image.size)
        except ValueError as error:
            raise invalid(split.where, f"{what}: its segmentation cannot be drawn: {error}") from None
