"""Ultralytics' YOLO segmentation: polygons as shares of the image's sides, beside the images.

    data.yaml                  folders of the splits, and names of the classes
    images/SPLIT/NAME.jpg      images of formats that Ultralytics does not read are encoded as PNG
    labels/SPLIT/NAME.txt      a line for each segment: class, x, y, x, y, …

A segment is a connected piece of one class. YOLO has no holes: a bridge leads to each (see ``outlines.py``),
so that no pixel is lost. Background is what has no polygon. Pixels without a class have none either: with a
background among the classes, they become background.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, cast

import numpy as np
import yaml
from pydantic import Field

from models.errors import WrongUse
from pipeline.files.documents import decoded, parsed_yaml, read_document
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.base import Entry, Imported, Loss, ReadSample, Sample, Written
from pipeline.formats.classes import FoundClass, ontology_of
from pipeline.formats.devkit import image_paths
from pipeline.formats.escapes import escape, percent, unescape
from pipeline.formats.names import refuse_outside, suffix_of
from pipeline.formats.outlines import Corners, outlines
from pipeline.formats.pictures import as_png, image_size
from pipeline.ontology.ontology import BACKGROUND, MAX_CLASSES, Ontology
from pipeline.table.statistics import Labels

DATA_FILE = "data.yaml"
IMAGES = "images"
LABELS = "labels"
SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
"""Images that all versions of Ultralytics read."""

_UNLABELLED = "unlabelled"
_NO_SPLIT = frozenset(
    ("names", "nc", "path", "channels", "download", "kpt_shape", "flip_idx", "yaml_file", _UNLABELLED)
)
# Some readers cut off what is behind the point, others round: a quarter of a pixel suits both.
_WITHIN = 0.25
# Of pieces that have no area: corners within the one pixel, or the two, so that their box has some.
_TINY = ((0.1, 0.1), (0.4, 0.1), (0.25, 0.4))


@dataclass(frozen=True)
class Yolo:
    """See the module.

    Attributes:
        smallest: pixels; smaller segments are left out, and counted as lost.
    """

    name: ClassVar[str] = "yolo"
    with_images: ClassVar[bool] = True
    with_confidence: ClassVar[bool] = False
    max_classes: ClassVar[int] = MAX_CLASSES

    smallest: Annotated[int, Field(ge=1)] = 1

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """See ``Format``."""
        for sample in samples:
            split, name = _split_folder(sample.split), _image_name(sample.name)
            lines, lost = self._lines(sample.labels, ontology)
            output.write_bytes(
                f"{LABELS}/{split}/{name}.txt", "".join(f"{line}\n" for line in lines).encode()
            )
            if sample.image is not None:
                known = sample.suffix in SUFFIXES
                output.write_bytes(
                    f"{IMAGES}/{split}/{name}{sample.suffix if known else '.png'}",
                    sample.image if known else as_png(sample.image),
                )
            yield Written({"split": sample.split}, lost)

    def _lines(self, labels: Labels, ontology: Ontology) -> tuple[list[str], Loss]:
        import cv2

        offset = int(_has_background(ontology))
        drawn = np.full(labels.shape, _unlabelled(ontology), np.int32)
        lost = Loss()
        lines = []
        for number in np.unique(labels).tolist():
            if number == ontology.ignore_index or number < offset:
                continue
            mask = (labels == number).view(np.uint8)
            areas = None
            if self.smallest > 1:
                _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
                areas = stats[:, cv2.CC_STAT_AREA][pieces]
            for corners in outlines(mask):
                x, y = corners[0]
                if areas is not None and areas[y, x] < self.smallest:
                    lost.segments += 1
                    continue
                cv2.fillPoly(drawn, [corners], number)
                lines.append(f"{number - offset} {_shares(corners, labels.shape)}")
        # What a reader will see is compared with what was there, rather than trusted to be the same.
        lost.pixels = int(((drawn != labels) & (labels != ontology.ignore_index)).sum())
        return lines, lost

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """See ``Format``."""
        found = {entry["split"] for entry in entries}
        splits = {split: f"{IMAGES}/{_split_folder(split)}" for split in ("train", "val", "test")}
        folders = {split: folder for split, folder in splits.items() if split in found}
        for split in sorted(found - folders.keys()):
            key = f"{split}_" if split in _NO_SPLIT else split
            folders[key] = f"{IMAGES}/{_split_folder(split)}"
        first = next(iter(folders.values()), splits["train"])
        # Ultralytics refuses a file without these two.
        required = {split: folders.pop(split, first) for split in ("train", "val")}
        names = ontology.names[int(_has_background(ontology)) :]
        unlabelled = BACKGROUND if _has_background(ontology) else "ignored"
        data = {**required, **folders, "names": dict(enumerate(names)), _UNLABELLED: unlabelled}
        head = "# Ultralytics YOLO, segmentation. Paths are relative to this file.\n"
        text = yaml.safe_dump(data, allow_unicode=True, sort_keys=False, width=1_000_000)
        output.write_bytes(DATA_FILE, f"{head}{text}".encode())
        return [DATA_FILE]


def _has_background(ontology: Ontology) -> bool:
    return ontology.num_classes > 1 and ontology.names[0].casefold() == BACKGROUND


def _unlabelled(ontology: Ontology) -> int:
    """The label of pixels without a polygon."""
    return 0 if _has_background(ontology) else ontology.ignore_index


def _split_folder(split: str) -> str:
    return _component(escape(split, "/\\"))


def _image_name(name: str) -> str:
    return "/".join(map(_component, escape(name).split("/")))


def _component(name: str) -> str:
    # The path of the labels is that of the image with the last "images" replaced.
    return percent(name) if name in (IMAGES, LABELS) else name


def _shares(corners: Corners, size: tuple[int, ...]) -> str:
    """Corners as shares of width and height, in one line; at least three corners."""
    height, width = size
    if len(corners) < 3:
        begin, *_, end = corners.tolist() if len(corners) > 1 else corners.tolist() * 2
        points = np.array([begin, end, end]) + np.array(_TINY)
    else:
        points = corners + _WITHIN
    digits = max(6, math.ceil(math.log10(max(size))) + 3)
    return " ".join(f"{value:.{digits}f}" for value in (points / (width, height)).ravel().tolist())


def read_yolo(place: str, *, images: str | None = None) -> Imported:
    """Read segmentations of Ultralytics' YOLO.

    Pixels without a polygon are class 0, "background", unless the export says that they are ignored. Where
    polygons overlap, the smaller is in front, as Ultralytics has it.

    Args:
        place: path or URI of the folder with ``data.yaml``.
        images: folder of the images, instead of ``images``.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``.
    """
    storage = open_storage(place)
    where = storage.uri_of(DATA_FILE)
    try:
        data = parsed_yaml(
            read_document(storage, DATA_FILE, code="dataset_invalid"), where, code="dataset_invalid"
        )
    except FileNotFoundError:
        raise WrongUse(
            "dataset_missing",
            f"There is no {DATA_FILE} in {storage.uri}.",
            "Give the folder with data.yaml, images/ and labels/.",
        ) from None
    names = data.get("names") if isinstance(data, dict) else None
    if isinstance(names, dict):
        by_number = {int(key): name for key, name in names.items() if str(key).isdigit()}
        complete = len(by_number) == len(names) and [*sorted(by_number)] == [*range(len(names))]
        names = [by_number[number] for number in range(len(names))] if complete else None
    if not isinstance(names, list) or not names:
        raise WrongUse(
            "dataset_invalid",
            f"{where}: 'names' must be a list of names, or have the keys 0, 1, 2, …",
            "Correct the file.",
        )
    ignored = data.get(_UNLABELLED) == "ignored"
    listed = [str(name) for name in names] if ignored else [BACKGROUND, *map(str, names)]
    ontology = ontology_of("yolo", map(FoundClass, listed), where=where)
    return Imported(ontology, _Samples(storage, ontology, _folders(data, where), images))


def _folders(data: dict[str, Any], where: str) -> tuple[tuple[str, str], ...]:
    """Split and folder of images, each folder once."""
    found: dict[str, str] = {}
    for split, folder in data.items():
        if split in _NO_SPLIT or not isinstance(split, str) or not isinstance(folder, str):
            continue
        path = PurePosixPath(refuse_outside(str(PurePosixPath(folder)), where))
        if IMAGES in path.parts:
            own = unescape(path.name)
            # Validation on the images of another split, for want of any, is not a split of its own.
            found[str(path)] = own if own in (split, split[:-1]) else found.get(str(path), str(split))
    if not found:
        raise WrongUse(
            "dataset_invalid",
            f"{where} names no folder below {IMAGES}/.",
            "Give train: images/train and val: images/val.",
        )
    return tuple((split, folder) for folder, split in found.items())


@dataclass(frozen=True)
class _Samples:
    """The samples of a dataset, split by split; may be iterated again."""

    storage: Storage
    ontology: Ontology
    folders: tuple[tuple[str, str], ...]
    images: str | None

    def __iter__(self) -> Iterator[ReadSample]:
        number = 0
        for split, folder in self.folders:
            parts = PurePosixPath(folder).parts
            last = len(parts) - 1 - parts[::-1].index(IMAGES)
            below = "/".join(parts[last + 1 :])
            pictures = self.storage.child(folder)
            if self.images is not None:
                pictures = open_storage(self.images).child(below) if below else open_storage(self.images)
            labels = self.storage.child("/".join((*parts[:last], LABELS, *parts[last + 1 :])))
            for name, image in sorted(image_paths(pictures).items()):
                uri = pictures.uri_of(image)
                yield ReadSample(
                    number=number,
                    id=number,
                    name=unescape(name),
                    uri=uri,
                    suffix=suffix_of(uri),
                    split=split,
                    read=functools.partial(_drawn, labels, f"{name}.txt", uri, self.ontology),
                )
                number += 1


def _drawn(place: Storage, name: str, image: str, ontology: Ontology) -> Labels:
    """The labels (H, W) of an image; all without a polygon if it has no file."""
    import cv2

    size = image_size(image)
    where = place.uri_of(name)
    try:
        data = read_document(place, name, code="dataset_invalid")
    except FileNotFoundError:
        data = b""
    offset = int(_has_background(ontology))
    polygons: list[tuple[int, Corners]] = []
    for row, line in enumerate(decoded(data, where, code="dataset_invalid").splitlines(), 1):
        if values := line.split():
            polygons.append(_polygon(values, size, ontology.num_classes - offset, f"{where}:{row}"))
    polygons.sort(key=lambda polygon: -cv2.contourArea(polygon[1]))
    drawn = np.full(size, _unlabelled(ontology), np.int32)
    for number, corners in polygons:
        cv2.fillPoly(drawn, [corners], number + offset)
    return cast(Labels, drawn.astype(ontology.mask_dtype))


def _polygon(values: list[str], size: tuple[int, int], classes: int, where: str) -> tuple[int, Corners]:
    """Class and corners of a line."""
    try:
        number, shares = float(values[0]), np.array(values[1:], np.float64)
    except ValueError:
        number, shares = math.nan, np.empty(0)
    if len(shares) == 4:
        reason = "a box, not a polygon"
    elif not number.is_integer() or not 0 <= number < classes:
        reason = f"{values[0]!r} is no class; there are {classes}"
    elif len(shares) < 6 or len(shares) % 2:
        reason = f"{len(shares)} numbers are no polygon"
    elif not (np.abs(shares) <= 1.01).all():  # NaN as well; Ultralytics allows as much
        reason = "its corners are no shares of the image's sides, from 0 to 1"
    else:
        height, width = size
        return int(number), np.rint(shares.reshape(-1, 2) * (width, height)).astype(np.int32)
    raise WrongUse("dataset_invalid", f"{where}: {reason}.", "A line is: class x y x y x y …")
