"""The layout of Cityscapes.

    leftImg8bit/SPLIT/CITY/NAME_leftImg8bit.png      images of other formats are encoded as PNG
    gtFine/SPLIT/CITY/NAME_gtFine_labelIds.png       ids
    gtFine/SPLIT/CITY/NAME_gtFine_labelTrainIds.png  ids of the classes that are trained, 255 elsewhere
    gtFine/SPLIT/CITY/NAME_gtFine_color.png          colours, RGB
    labels.csv                                       name, id, train id and colour of each class

If all classes are labels of Cityscapes, by name, the ids are those of Cityscapes, and pixels without a class
are 0, "unlabeled". Else both ids of a class are its own, from 0, and 255 is without a class. The city is the
image's folder, and "all" for images in none.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Final, cast

import numpy as np

from models.errors import WrongUse
from pipeline.files.documents import decoded, read_document
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.base import Entry, Imported, ReadSample, Sample, Written
from pipeline.formats.classes import FoundClass, hex_color, ontology_of
from pipeline.formats.escapes import escape, percent, unescape
from pipeline.formats.labelmap import VOID, to_indices
from pipeline.formats.masks import read_mask, relabel
from pipeline.formats.names import suffix_of
from pipeline.formats.pictures import as_png, painted_png
from pipeline.ontology.ontology import MAX_CLASSES_8BIT, Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import encode_mask
from pipeline.table.statistics import Labels

LABELS_FILE = "labels.csv"
COLUMNS = ("name", "id", "trainId", "color")
IMAGES = "leftImg8bit"
TRUTH = "gtFine"
UNLABELED = 0
"""Cityscapes' id of pixels without a class."""

#: Id and train id of Cityscapes' labels, after cityscapesscripts.helpers.labels; 255 is not trained.
CITYSCAPES: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "unlabeled": (0, 255), "ego vehicle": (1, 255), "rectification border": (2, 255),
        "out of roi": (3, 255), "static": (4, 255), "dynamic": (5, 255), "ground": (6, 255),
        "road": (7, 0), "sidewalk": (8, 1), "parking": (9, 255), "rail track": (10, 255),
        "building": (11, 2), "wall": (12, 3), "fence": (13, 4), "guard rail": (14, 255),
        "bridge": (15, 255), "tunnel": (16, 255), "pole": (17, 5), "polegroup": (18, 255),
        "traffic light": (19, 6), "traffic sign": (20, 7), "vegetation": (21, 8), "terrain": (22, 9),
        "sky": (23, 10), "person": (24, 11), "rider": (25, 12), "car": (26, 13), "truck": (27, 14),
        "bus": (28, 15), "caravan": (29, 255), "trailer": (30, 255), "train": (31, 16),
        "motorcycle": (32, 17), "bicycle": (33, 18),
    }
)  # fmt: skip

_NO_CITY = "all"
_OF_CITYSCAPES = re.compile(r"[^_]+_[0-9]{6}_[0-9]{6}")


@dataclass(frozen=True)
class Cityscapes:
    """See the module."""

    name: ClassVar[str] = "cityscapes"
    with_images: ClassVar[bool] = True
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES_8BIT

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """See ``Format``."""
        ids, train_ids = _ids(ontology)
        for sample in samples:
            split = escape(sample.split, "/\\")
            city, name = _city_and_name(sample.name)
            truth = f"{TRUTH}/{split}/{city}/{name}_{TRUTH}"
            indices = to_indices(sample.labels, ontology)
            output.write_bytes(f"{truth}_labelIds.png", encode_mask(ids[indices]))
            output.write_bytes(f"{truth}_labelTrainIds.png", encode_mask(train_ids[indices]))
            output.write_bytes(f"{truth}_color.png", painted_png(indices, ontology.palette()))
            if sample.image is not None:
                output.write_bytes(f"{IMAGES}/{split}/{city}/{name}_{IMAGES}.png", as_png(sample.image))
            yield Written({})

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """See ``Format``."""
        ids, train_ids = _ids(ontology)
        text = io.StringIO(newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        for number, (name, color) in enumerate(zip(ontology.names, ontology.palette().tolist(), strict=True)):
            table.writerow((name, int(ids[number]), int(train_ids[number]), hex_color(color)))
        output.write_bytes(LABELS_FILE, text.getvalue().encode())
        return [LABELS_FILE]


def _ids(ontology: Ontology) -> tuple[np.ndarray, np.ndarray]:
    """Id and train id by class, and by ``VOID``, uint8 (256,) each."""
    names = [name.casefold() for name in ontology.names]
    ids = np.arange(256).astype(np.uint8)
    train_ids = ids.copy()
    if all(name in CITYSCAPES and CITYSCAPES[name][0] != UNLABELED for name in names):
        ids[VOID] = UNLABELED
        for number, name in enumerate(names):
            ids[number], train_ids[number] = CITYSCAPES[name]
    return ids, train_ids


def _city_and_name(name: str) -> tuple[str, str]:
    """Folder and file of an image, without the endings; ``_sample_name`` is the inverse."""
    folder, _, stem = name.rpartition("/")
    city = percent(_NO_CITY) if folder == _NO_CITY else escape(folder, "/\\") or _NO_CITY
    bare = stem.removesuffix(f"_{IMAGES}")
    if bare != stem and _OF_CITYSCAPES.fullmatch(bare):
        return city, bare
    if _OF_CITYSCAPES.fullmatch(stem):  # else it would be the same file
        return city, f"{stem[:-1]}{percent(stem[-1])}"
    # Readers take what stands before the first ending.
    return city, escape(stem).replace(f"_{IMAGES}", f"{percent('_')}{IMAGES}")


def _sample_name(city: str, stem: str) -> str:
    name = f"{stem}_{IMAGES}" if _OF_CITYSCAPES.fullmatch(stem) else unescape(stem)
    return name if city in ("", _NO_CITY) else f"{unescape(city)}/{name}"


def read_cityscapes(place: str, *, images: str | None = None) -> Imported:
    """Read Cityscapes: what ``Cityscapes`` wrote, or the benchmark, which has no ``labels.csv``.

    Args:
        place: path or URI of the folder with ``gtFine``.
        images: folder of the images, instead of ``leftImg8bit``.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; ``mask_invalid`` while
            the samples are read.
    """
    storage = open_storage(place)
    others = {number: VOID for number, _ in CITYSCAPES.values()}
    try:
        ontology, ids = _read_table(storage)
    except FileNotFoundError:
        ontology = load_ontology("cityscapes19")
        ids = {CITYSCAPES[name][0]: number for number, name in enumerate(ontology.names)}
    if [*ids] == [*range(len(ids))]:
        others = {}
    meant = {**others, VOID: VOID, **ids}
    ids = {number: ontology.ignore_index if label == VOID else label for number, label in meant.items()}
    if not storage.exists(TRUTH):
        raise WrongUse(
            "dataset_missing",
            f"There is no {TRUTH} in {storage.uri}.",
            f"Give the folder with {IMAGES}/ and {TRUTH}/.",
        )
    return Imported(ontology, _Samples(storage, ontology, ids, images))


def _read_table(storage: Storage) -> tuple[Ontology, dict[int, int]]:
    """The classes, and their number by id."""
    where = storage.uri_of(LABELS_FILE)
    data = read_document(storage, LABELS_FILE, code="dataset_invalid")
    rows = csv.DictReader(io.StringIO(decoded(data, where, code="dataset_invalid"), newline=""))
    found: list[FoundClass] = []
    ids: dict[int, int] = {}
    for row in rows:
        color = re.fullmatch(r"#([0-9a-fA-F]{6})", row.get("color") or "")
        number = row.get("id") or ""
        if (
            not row.get("name")
            or color is None
            or not re.fullmatch(r"[0-9]{1,3}", number)
            or int(number) in ids
        ):
            raise WrongUse(
                "dataset_invalid",
                f"{where}:{rows.line_num}: not a class with an id of its own and a colour #rrggbb.",
                "Correct the file, or export the dataset again.",
            )
        ids[int(number)] = len(found)
        found.append(FoundClass(str(row["name"]), tuple(bytes.fromhex(color[1]))))
    return ontology_of("cityscapes", found, where=where), ids


@dataclass(frozen=True)
class _Samples:
    """The samples of a folder, split by split; may be iterated again."""

    storage: Storage
    ontology: Ontology
    ids: Mapping[int, int]
    images: str | None

    def __iter__(self) -> Iterator[ReadSample]:
        pictures = open_storage(self.images) if self.images is not None else self.storage.child(IMAGES)
        ending = f"_{TRUTH}_labelIds.png"
        number = 0
        for path in self.storage.list(TRUTH, recursive=True):
            if not path.endswith(ending):
                continue
            below = path.removeprefix(f"{TRUTH}/").removesuffix(ending)
            split, _, rest = below.partition("/")
            city, _, stem = rest.rpartition("/")
            mask = self.storage.uri_of(path)
            uri = pictures.uri_of(f"{below}_{IMAGES}.png")
            yield ReadSample(
                number=number,
                id=number,
                name=_sample_name(city, stem),
                uri=uri,
                suffix=suffix_of(uri),
                split=unescape(split),
                read=functools.partial(self._labels, mask),
            )
            number += 1

    def _labels(self, mask: str) -> Labels:
        return cast(Labels, relabel(read_mask(mask), self.ids, classes=self.ontology, where=mask))
