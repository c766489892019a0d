"""What PASCAL VOC and CVAT's masks share: lists of names by split, a labelmap, masks of indices or colours.

ImageSets/Segmentation/train.txt …   names by split, a line each
SegmentationClass/NAME.png
JPEGImages/NAME.jpg
labelmap.txt
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, cast

import numpy as np

from models.errors import WrongUse
from pipeline.files.documents import decoded, read_document
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.base import Entry, Imported, ReadSample
from pipeline.formats.escapes import escape, unescape
from pipeline.formats.labelmap import VOID, LabelMap, read_labelmap
from pipeline.formats.masks import decode_ids, relabel, unreadable
from pipeline.formats.names import refuse_outside, suffix_of
from pipeline.formats.pictures import decode_painted, is_painted
from pipeline.ontology.ontology import Ontology
from pipeline.table.statistics import Labels

LISTS = "ImageSets/Segmentation"
MASKS = "SegmentationClass"
IMAGES = "JPEGImages"

_SLASH = "/\\"
_FIRST = ("train", "val", "test")


def write_lists(
    entries: Iterable[Entry], output: Storage, *, together: Mapping[str, Sequence[str]], always: Sequence[str]
) -> list[str]:
    """Write a list of names for each split.

    Args:
        entries: with ``name``, as it stands in the lists, and ``split``.
        output: the export.
        together: splits that go into a list of this name as well.
        always: lists that are written even if nothing is in them.

    Returns:
        The lists, sorted.
    """
    files: dict[str, IO[bytes]] = {}
    with ExitStack() as stack:

        def opened(split: str) -> IO[bytes]:
            if split not in files:
                files[split] = stack.enter_context(output.new_file(f"{LISTS}/{escape(split, _SLASH)}.txt"))
            return files[split]

        for split in always:
            opened(split)
        for entry in entries:
            line = f"{entry['name']}\n".encode()
            opened(entry["split"]).write(line)
            for name, splits in together.items():
                if entry["split"] in splits:
                    opened(name).write(line)
    return sorted(f"{LISTS}/{escape(split, _SLASH)}.txt" for split in files)


def read_devkit(
    place: str, *, images: str | None, name: str, default: Ontology | None, ignored: Sequence[str] = ()
) -> Imported:
    """Read a folder of this layout.

    Args:
        place: path or URI.
        images: folder of the images, instead of ``JPEGImages``.
        name: of the format.
        default: the classes if there is no ``labelmap.txt``.
        ignored: lists that repeat others.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``; ``mask_invalid`` while
            the samples are read.
    """
    storage = open_storage(place)
    try:
        labels = read_labelmap(storage, name=name)
    except FileNotFoundError:
        if default is None:
            raise _missing(storage, "labelmap.txt") from None
        colors = np.vstack([default.palette(), np.full((1, 3), 255, np.uint8)])
        labels = LabelMap(default, colors)
    lists = [PurePosixPath(path) for path in storage.list(LISTS)]
    stems = [path.stem for path in lists if path.suffix == ".txt"]
    if not stems:
        raise _missing(storage, f"{LISTS}/….txt")
    wanted = [stem for stem in stems if stem not in ignored] or stems
    wanted.sort(key=lambda stem: (_FIRST.index(stem) if stem in _FIRST else len(_FIRST), stem))
    return Imported(labels.ontology, _Samples(storage, labels, tuple(wanted), images))


@dataclass(frozen=True)
class _Samples:
    """The samples of a folder, split by split; may be iterated again."""

    storage: Storage
    labels: LabelMap
    lists: tuple[str, ...]
    images: str | None

    def __iter__(self) -> Iterator[ReadSample]:
        pictures = open_storage(self.images) if self.images is not None else self.storage.child(IMAGES)
        found = image_paths(pictures)
        seen: set[str] = set()
        number = 0
        for split in self.lists:
            where = self.storage.uri_of(f"{LISTS}/{split}.txt")
            for line in lines_of(self.storage, f"{LISTS}/{split}.txt"):
                refuse_outside(line, where)
                if line in seen:
                    continue
                seen.add(line)
                image = found.get(line)
                uri = pictures.uri_of(image if image is not None else f"{line}.jpg")
                yield ReadSample(
                    number=number,
                    id=number,
                    name=unescape(line),
                    uri=uri,
                    suffix=suffix_of(uri),
                    split=unescape(split),
                    read=functools.partial(
                        read_class_mask, self.storage.uri_of(f"{MASKS}/{line}.png"), self.labels
                    ),
                )
                number += 1


def lines_of(storage: Storage, name: str) -> Iterator[str]:
    """The names of a list, without blanks around them."""
    data = read_document(storage, name, code="dataset_invalid")
    for line in decoded(data, storage.uri_of(name), code="dataset_invalid").split("\n"):
        if stripped := line.strip():
            yield stripped


def image_paths(place: Storage) -> dict[str, str]:
    """Path of each file of a folder, by its path without suffix."""
    return {str(PurePosixPath(path).with_suffix("")): path for path in place.list(recursive=True)}


def read_class_mask(uri: str, labels: LabelMap) -> Labels:
    """Read a mask of indices, or of the labelmap's colours.

    Raises:
        MaskMillError: ``dataset_invalid``, ``mask_invalid``.
    """
    try:
        data = fetch(uri)
    except ImageError as error:
        raise unreadable(uri, str(error)) from error
    if is_painted(data):
        painted = decode_painted(data, uri, labels.colors)
        return cast(Labels, labels.ids[painted].astype(labels.ontology.mask_dtype))
    ids = {VOID: labels.ontology.ignore_index, **dict(enumerate(labels.ids.tolist()))}
    return cast(Labels, relabel(decode_ids(data, uri), ids, classes=labels.ontology, where=uri))


def _missing(storage: Storage, what: str) -> WrongUse:
    return WrongUse(
        "dataset_missing",
        f"There is no {what} in {storage.uri}.",
        f"Give the folder with {LISTS}/, {MASKS}/ and labelmap.txt.",
    )
