"""CVAT's "Segmentation mask 1.1": masks of colours, of classes and of objects.

    SegmentationClass/NAME.png       RGB, the colours of labelmap.txt
    SegmentationObject/NAME.png      RGB, a colour for each object; black is none
    ImageSets/Segmentation/SPLIT.txt names by split
    labelmap.txt                     names and colours of the classes
    JPEGImages/NAME.jpg              if images are copied

An object is a connected piece of one class; where an image has more than 255, all pieces of a class are one
object, because the colours of VOC end there. Background and pixels without a class are no objects: CVAT shows
nothing there. To load it, make a task whose labels are the classes, zip the content of the folder, and choose
"Upload annotations", "Segmentation mask 1.1".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from pipeline.files.storage import Storage
from pipeline.formats.base import Entry, Imported, Sample, Written
from pipeline.formats.devkit import IMAGES, MASKS, read_devkit, write_lists
from pipeline.formats.escapes import escape
from pipeline.formats.labelmap import LABELMAP_FILE, VOID, distinct_colors, to_indices, write_labelmap
from pipeline.formats.pictures import Colors, painted_png
from pipeline.ontology.ontology import BACKGROUND, MAX_CLASSES_8BIT, Ontology

OBJECTS = "SegmentationObject"
MAX_OBJECTS = 255
"""Colours of objects in VOC, without black."""


@dataclass(frozen=True)
class Cvat:
    """See the module."""

    name: ClassVar[str] = "cvat"
    with_images: ClassVar[bool] = False
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES_8BIT

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """See ``Format``."""
        colors = np.zeros((256, 3), np.uint8)
        *classes, void = distinct_colors(ontology)
        colors[: len(classes)], colors[VOID] = classes, void
        object_colors = voc_colors()
        for sample in samples:
            name = escape(sample.name)
            indices = to_indices(sample.labels, ontology)
            output.write_bytes(f"{MASKS}/{name}.png", painted_png(indices, colors))
            output.write_bytes(
                f"{OBJECTS}/{name}.png", painted_png(objects(indices, ontology), object_colors)
            )
            if sample.image is not None:
                output.write_bytes(f"{IMAGES}/{name}{sample.suffix}", sample.image)
            yield Written({"name": name, "split": sample.split})

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """See ``Format``."""
        write_labelmap(ontology, output)
        return [LABELMAP_FILE, *write_lists(entries, output, together={}, always=())]


def objects(indices: npt.NDArray[np.uint8], ontology: Ontology) -> npt.NDArray[np.uint8]:
    """Number the objects of an image.

    Args:
        indices: (H, W) class ids, and ``VOID``.
        ontology: the classes.

    Returns:
        (H, W), 0 where there is no object, else 1 to 255.
    """
    import cv2

    skipped = {VOID} | ({0} if ontology.names[0].casefold() == BACKGROUND else set())
    present = [number for number in np.unique(indices).tolist() if number not in skipped]
    numbered = np.zeros(indices.shape, np.int32)
    count = 0
    for number in present:
        found, pieces = cv2.connectedComponents((indices == number).view(np.uint8), connectivity=8)
        numbered[pieces > 0] = pieces[pieces > 0] + count
        count += found - 1
    if count > MAX_OBJECTS:
        order = np.zeros(256, np.int32)
        order[present] = np.arange(1, len(present) + 1)
        numbered = order[indices]
    return numbered.astype(np.uint8)


def voc_colors() -> Colors:
    """The 256 colours of PASCAL VOC, (256, 3): a number's bits in turn, from the highest of each channel."""
    numbers = np.arange(256)
    colors = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colors[:, channel] |= ((numbers >> 3 * bit + channel & 1) << 7 - bit).astype(np.uint8)
    return colors


def read_cvat(place: str, *, images: str | None = None) -> Imported:
    """Read CVAT's segmentation masks: what ``Cvat`` wrote, or an archive that CVAT exported, unzipped.

    Args:
        place: path or URI of the folder with ``labelmap.txt``.
        images: folder of the images, instead of ``JPEGImages``.

    Raises:
        MaskMillError: see ``read_devkit``.
    """
    return read_devkit(place, images=images, name="cvat", default=None)
