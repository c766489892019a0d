"""What every export format shares: the samples that go out and come in, and the parts of a format.

A format is a frozen dataclass (its fields are its options) in a module of its own, which writes an export in
two steps, so that workers write side by side and an interrupted export resumes:

1. ``write_part``, once for some files of the table, on any worker: writes what belongs to these images
   alone (masks, shards) and returns a JSON-serialisable entry for each.
2. ``finish``, once: writes what names them all (annotation files, lists) from the entries, which are
   streamed and never held at once.

Both write the same bytes if they are run again. ``read_x`` beside them is the inverse where the format can
carry label maps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from pipeline.files.storage import Storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.statistics import Confidence, Labels

Entry = dict[str, Any]
"""What ``finish`` needs to know of one image, as plain JSON values; ``lost`` is left to the engine."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its label map.

    Attributes:
        number: position of its row in the table, from 0: small, unique, stable; rows that failed leave gaps.
        id: of the row in the label table.
        name: relative path without suffix, unique within the export in any case of its letters, with "/"
            between folders; it never leaves the output (see ``names.py``).
        uri: address of the image.
        suffix: of an image file, such as ".jpg", in lower case.
        split: such as "train".
        labels: (H, W) class ids and ignore index, upright (after EXIF orientation), uint8 for up to 254
            classes, else uint16.
        confidence: uint8 (H, W), round(255 p); None if unknown.
        image: encoded image, upright without EXIF orientation; None unless asked for.
    """

    number: int
    id: int
    name: str
    uri: str
    suffix: str
    split: str = "train"
    labels: Labels
    confidence: Confidence | None = None
    image: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class ReadSample:
    """An image of a dataset that is read, whose label map is read when it is first asked for.

    So one that cannot be read keeps no reader from the next, and workers read side by side.

    Attributes:
        read: reads the labels.
        number, id, name, uri, suffix, split, image: see ``Sample``.
    """

    number: int
    id: int
    name: str
    uri: str
    suffix: str
    split: str = "train"
    read: Callable[[], Labels]
    image: bytes | None = None

    @functools.cached_property
    def labels(self) -> Labels:
        """See ``Sample``.

        Raises:
            MaskMillError: ``dataset_invalid`` or ``mask_invalid``, naming the file.
        """
        return self.read()


@dataclass
class Loss:
    """What a format could not carry; losses of images add up.

    Attributes:
        pixels: labelled pixels that come back as another class or none.
        holes: holes of segments that are filled or left out.
        segments: connected components that are left out, such as too small ones.
    """

    pixels: int = 0
    holes: int = 0
    segments: int = 0

    def add(self, other: Loss) -> None:
        """Add the loss of another image."""
        self.pixels += other.pixels
        self.holes += other.holes
        self.segments += other.segments


@dataclass(frozen=True)
class Written:
    """One image of a part: the entry for ``finish``, and what the format lost of it."""

    entry: Entry
    lost: Loss = field(default_factory=Loss)


class Format(Protocol):
    """An export format: a frozen dataclass whose fields are its options."""

    name: ClassVar[str]
    with_images: ClassVar[bool]
    """Whether the format is of no use without copies of the images."""
    with_confidence: ClassVar[bool]
    """Whether it writes the confidence. Decoding it takes longer than decoding the labels, so that others get
    None."""
    max_classes: ClassVar[int]
    """Most classes that it can carry; more are refused before anything is written."""

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """Write the files of these images; yields one result a sample, in order.

        Args:
            part: name of the part, unique and stable, fit for a file name, such as "00012".
            samples: the labelled images of a part of the table.
            ontology: the classes of the labels.
            output: the export; files are put there atomically, with ``write_bytes`` or ``new_file``. They are
                written in the background, and are all there once the part is done: do not read them back.
        """
        ...

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """Write what names all images.

        Args:
            entries: of all parts, in the order of the table; may be iterated once.
            ontology: the classes of the labels.
            output: the export.

        Returns:
            The files that a reader opens first, relative to the export.
        """
        ...


@dataclass(frozen=True)
class Imported:
    """A dataset with label maps that was read.

    Attributes:
        ontology: its classes; built from the format's own names and colours.
        samples: its images in a stable order, read one by one. ``number`` counts from 0; ``uri`` is the
            address of the image.
        count: number of samples if the format tells without reading them all.
        left_out: tells, once all samples have been read, what else was found and not taken, a line each.
    """

    ontology: Ontology
    samples: Iterable[Sample | ReadSample]
    count: int | None = None
    left_out: Callable[[], list[str]] = list
