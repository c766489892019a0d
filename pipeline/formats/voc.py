"""PASCAL VOC: masks with a palette, beside JPEGs and lists.

    JPEGImages/NAME.jpg              images of other formats are encoded as JPEG
    SegmentationClass/NAME.png       palette index i is line i of labelmap.txt; 255 has no class
    ImageSets/Segmentation/SPLIT.txt names by split; trainval.txt is train and val together
    labelmap.txt                     names and colours of the classes

Read by torchvision's ``VOCSegmentation`` (the folder named ``VOCdevkit/VOC2012``), MMSegmentation, Datumaro.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from pipeline.files.storage import Storage
from pipeline.formats.base import Entry, Imported, Sample, Written
from pipeline.formats.devkit import IMAGES, MASKS, read_devkit, write_lists
from pipeline.formats.escapes import escape
from pipeline.formats.labelmap import (
    LABELMAP_FILE,
    VOID,
    VOID_COLOR,
    distinct_colors,
    to_indices,
    write_labelmap,
)
from pipeline.formats.pictures import Colors, as_jpeg, palette_png
from pipeline.ontology.ontology import MAX_CLASSES_8BIT, Ontology
from pipeline.ontology.reading import load_ontology

TRAINVAL = "trainval"


@dataclass(frozen=True)
class Voc:
    """See the module.

    Attributes:
        quality: of JPEGs that are made from images of other formats, 1 to 100.
    """

    name: ClassVar[str] = "voc"
    with_images: ClassVar[bool] = True
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES_8BIT

    quality: Annotated[int, Field(ge=1, le=100)] = 95

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """See ``Format``."""
        palette = _palette(ontology)
        for sample in samples:
            name = escape(sample.name)
            output.write_bytes(
                f"{MASKS}/{name}.png", palette_png(to_indices(sample.labels, ontology), palette)
            )
            if sample.image is not None:
                output.write_bytes(f"{IMAGES}/{name}.jpg", as_jpeg(sample.image, self.quality))
            yield Written({"name": name, "split": sample.split})

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """See ``Format``."""
        write_labelmap(ontology, output)
        lists = write_lists(
            entries, output, together={TRAINVAL: ("train", "val")}, always=("train", "val", TRAINVAL)
        )
        return [*lists, LABELMAP_FILE]


def _palette(ontology: Ontology) -> Colors:
    palette = np.zeros((256, 3), np.uint8)
    palette[: ontology.num_classes] = distinct_colors(ontology)[:-1]
    palette[VOID] = VOID_COLOR
    return palette


def read_voc(place: str, *, images: str | None = None) -> Imported:
    """Read PASCAL VOC: what ``Voc`` wrote, or the dataset itself, which has no ``labelmap.txt``.

    Args:
        place: path or URI of the folder with ``SegmentationClass``.
        images: folder of the images, instead of ``JPEGImages``.

    Raises:
        MaskMillError: see ``read_devkit``.
    """
    return read_devkit(place, images=images, name="voc", default=load_ontology("voc21"), ignored=(TRAINVAL,))
