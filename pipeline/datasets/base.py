"""Base of the benchmark datasets: samples, exact mask reading, and errors with a remedy.

A reader never downloads. It lists each folder once, compares the listing with the split and reports missing
files before any work starts. After that, ``truth`` and ``image`` need only the sample.

Shapes: H W pixels at the image's original size, N samples.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from models.errors import MaskMillError, WrongUse
from pipeline.files.documents import decoded, read_document
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError, decode
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.masks import MAX_SHOWN, Labels, read_mask, relabel, shown, unreadable
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import builtin_ontologies, load_ontology

_Dataset = TypeVar("_Dataset", bound="Dataset")


@dataclass(frozen=True)
class Sample:
    """An image and the location of its truth.

    Attributes:
        name: unique in the dataset; for files, the image's relative POSIX path without extension.
        image: path or URI; "" if the image is generated.
        truth: path or URI of the mask; None if the truth is not a separate file.
    """

    name: str
    image: str
    truth: str | None = None


@dataclass(frozen=True)
class LeftOut:
    """Entries of one kind that a reader did not take.

    Attributes:
        what: one such entry, in words: "annotation without an area".
        count: their number.
        examples: the first few.
    """

    what: str
    count: int
    examples: tuple[str, ...] = ()

    @classmethod
    def of(cls, what: str, entries: Sequence[str]) -> LeftOut:
        """Count entries, and keep the first few as examples."""
        return cls(what, len(entries), tuple(entries[:MAX_SHOWN]))

    def __str__(self) -> str:
        more = self.count > len(self.examples) == MAX_SHOWN
        named = ", ".join(self.examples) + (", …" if more else "")
        return f"{self.count:,} × {self.what}" + (f" ({named})" if self.examples else "")


class Counts:
    """Counts what is left out, by kind."""

    def __init__(self) -> None:
        self._numbers: Counter[str] = Counter()
        self._examples: dict[str, dict[str, None]] = {}

    def add(self, what: str, example: str) -> None:
        """Count an entry; see ``LeftOut``. Only the first few different examples are kept."""
        self._numbers[what] += 1
        examples = self._examples.setdefault(what, {})
        if len(examples) < MAX_SHOWN:
            examples[example] = None

    def left_out(self) -> tuple[LeftOut, ...]:
        """All kinds, in the order of their first entries."""
        return tuple(
            LeftOut(what, count, tuple(self._examples[what])) for what, count in self._numbers.items()
        )


class SegmentationDataset(Protocol):
    """Images with true label maps. Picklable, as workers call ``image`` and ``truth``.

    Attributes:
        name: name of the benchmark.
        split: the part of it.
        class_names: names by id.
        ontology: name of the built-in ontology of the ids, or None.
        ignore_index: id of ignored pixels.
        samples: sorted by name.
    """

    @property
    def name(self) -> str: ...
    @property
    def split(self) -> str: ...
    @property
    def class_names(self) -> tuple[str, ...]: ...
    @property
    def ontology(self) -> str | None: ...
    @property
    def ignore_index(self) -> int: ...
    @property
    def samples(self) -> Sequence[Sample]: ...

    def truth(self, sample: Sample) -> Labels:
        """Ids (H, W), uint8 or uint16; ``ignore_index`` where unknown."""
        ...

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """RGB (H, W, 3), upright."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) that identifies the ground truth."""
        ...


@dataclass(frozen=True)
class Dataset(ABC):
    """Base class of the readers; see ``SegmentationDataset``.

    Attributes:
        name: name of the benchmark.
        split: the part of it.
        classes: meaning of the ids.
        samples: sorted by name.
        identity: source of the truth, in words or as a hash; part of the fingerprint.
        left_out: what the reader found and did not take.
    """

    name: str
    split: str
    classes: Ontology
    samples: tuple[Sample, ...]
    identity: str
    left_out: tuple[LeftOut, ...] = field(default=(), kw_only=True)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by id."""
        return self.classes.names

    @property
    def ontology(self) -> str | None:
        """Name of the built-in ontology of the ids, or None."""
        name = self.classes.name
        return name if name in builtin_ontologies() and load_ontology(name) == self.classes else None

    @property
    def ignore_index(self) -> int:
        """Id of ignored pixels."""
        return self.classes.ignore_index

    @property
    def has_truth(self) -> bool:
        """False if ``truth`` gives the labels of another model: what is measured is agreement with it."""
        return True

    @abstractmethod
    def truth(self, sample: Sample) -> Labels:
        """Ids (H, W), uint8 or uint16; ``ignore_index`` where unknown.

        Raises:
            MaskMillError: ``dataset_invalid``, ``mask_invalid``; both name the file.
        """

    def image(self, sample: Sample) -> npt.NDArray[np.uint8]:
        """RGB (H, W, 3), upright.

        Raises:
            MaskMillError: ``dataset_invalid``, naming the file.
        """
        return read_image(sample.image)

    def image_and_truth(self, sample: Sample) -> tuple[npt.NDArray[np.uint8], Labels]:
        """Both, checked to have the same size.

        Raises:
            MaskMillError: those of ``image`` and ``truth``; ``mask_invalid`` if the sizes differ.
        """
        image, truth = self.image(sample), self.truth(sample)
        if image.shape[:2] != truth.shape:
            raise WrongUse(
                "mask_invalid",
                f"{sample.truth or sample.name}: the mask has {truth.shape[0]} x {truth.shape[1]} pixels, "
                f"the image {sample.image} {image.shape[0]} x {image.shape[1]}.",
                "Use the masks that belong to these images; neither may have been resized.",
            )
        return image, truth

    def fingerprint(self) -> str:
        """SHA-256 (hex) of name, split, classes, ignore index, ``identity`` and the names of all samples.

        Paths are excluded, so a copy elsewhere has the same fingerprint. Mask files count by name, not by
        pixels: reading thousands of files to identify a run would cost as much as the run.
        """
        parts = [
            self.name, self.split, self.class_names, self.ignore_index, self.identity,
            [sample.name for sample in self.samples],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()

    def reader(self: _Dataset) -> _Dataset:
        """A copy without samples, small enough for every task; ``image`` and ``truth`` still work."""
        return replace(self, samples=())


@dataclass(frozen=True)
class MaskDataset(Dataset):
    """A dataset whose truth is one PNG of ids per image.

    Attributes:
        ids: id in ``classes``, or ``ignore_index``, by id in the files. Any other id is an error.
    """

    ids: Mapping[int, int]

    def truth(self, sample: Sample) -> Labels:
        """See ``Dataset.truth``."""
        assert sample.truth is not None
        return relabel(read_mask(sample.truth), self.ids, classes=self.classes, where=sample.truth)


@dataclass(frozen=True)
class Source:
    """Origin and folder layout of a benchmark.

    Attributes:
        title: full name.
        home: its official page.
        layout: the expected folder tree.
    """

    title: str
    home: str
    layout: str

    def missing(self, place: str | None, what: str) -> MaskMillError:
        """The error for a missing benchmark or part of it."""
        where = f" in {place}" if place else ""
        return WrongUse(
            "dataset_missing",
            f"{self.title}: {what}{where}.",
            f"Nothing is downloaded for you. Get it from {self.home}, lay it out as\n\n{self.layout}\n\n"
            "and name the top folder (a path, or s3://bucket/prefix): --root DIR.",
        )

    def open(self, root: str | None, markers: Iterable[str], inner: Sequence[str] = ()) -> Storage:
        """Find the benchmark's folder: ``root`` or one of its subfolders.

        Args:
            root: as the user gave it.
            markers: folders of which at least one must exist.
            inner: subfolders to try after ``root``.

        Raises:
            MaskMillError: ``dataset_missing``.
        """
        if root is None:
            raise self.missing(None, "no folder was given")
        markers = tuple(markers)
        storage = open_storage(root)
        for folder in ("", *inner):
            place = storage.child(folder) if folder else storage
            if any(place.exists(marker) for marker in markers):
                return place
        raise self.missing(storage.uri, f"there is no {' or '.join(markers)}")

    def samples(
        self, names: Iterable[str], images: Mapping[str, str], masks: Mapping[str, str], place: Storage
    ) -> tuple[Sample, ...]:
        """One sample per name, sorted.

        Args:
            names: names in the split; must not be empty.
            images: path of the image within ``place``, by name.
            masks: path of the mask within ``place``, by name.
            place: the benchmark's folder.

        Raises:
            MaskMillError: ``dataset_missing`` for an empty split, or counting and naming the missing files.
        """
        wanted = sorted(set(names))
        if not wanted:
            raise self.missing(place.uri, "the split has no images")
        gaps = [
            f"{len(absent):,} of {len(wanted):,} {kind} are missing ({shown(absent)})"
            for kind, have in (("images", images), ("masks", masks))
            if (absent := [name for name in wanted if name not in have])
        ]
        if gaps:
            raise WrongUse(
                "dataset_missing",
                f"{self.title} in {place.uri}: {'; '.join(gaps)}.",
                f"Complete the folder, or shorten the split's list. The layout is\n\n{self.layout}",
            )
        return tuple(Sample(name, place.uri_of(images[name]), place.uri_of(masks[name])) for name in wanted)


def list_files(
    place: Storage,
    folder: str,
    suffixes: str | tuple[str, ...],
    *,
    recursive: bool = False,
    others: Counts | None = None,
) -> dict[str, str]:
    """List the files in a folder that have one of the suffixes, without hidden files.

    Args:
        place: parent of the folder.
        folder: "" for ``place`` itself.
        suffixes: case-insensitive; the longest match is stripped.
        recursive: enter subfolders; names then contain slashes.
        others: counts the files with other suffixes.

    Returns:
        Path within ``place``, by name relative to the folder without suffix. Empty if there is no folder.

    Raises:
        MaskMillError: ``dataset_invalid`` if two files share a name (``a.jpg`` and ``a.png``), or a name is
            not UTF-8.
    """
    endings = sorted((suffixes,) if isinstance(suffixes, str) else suffixes, key=len, reverse=True)
    found: dict[str, str] = {}
    for path in place.list(folder, recursive=recursive):
        name = path[len(folder) :].lstrip("/") if folder else path
        ending = next((end for end in endings if name.lower().endswith(end.lower())), None)
        if any(part.startswith(".") for part in PurePosixPath(name).parts):
            continue
        if not name.isprintable() and any("\udc80" <= letter <= "\udcff" for letter in name):
            raise WrongUse(
                "dataset_invalid",
                f"{place.uri}: the name of a file is not UTF-8: {name.encode('utf-8', 'surrogateescape')!r}.",
                "Rename it (for example with convmv).",
            )
        if ending is None:
            if others is not None:
                others.add(f"{PurePosixPath(name).suffix or 'file without ending'}, which is not read", path)
            continue
        name = name[: len(name) - len(ending)]
        if name in found:
            raise WrongUse(
                "dataset_invalid",
                f"{place.uri}: {found[name]} and {path} have the same name.",
                "Keep one of them, or rename it.",
            )
        found[name] = path
    return found


def read_list(place: Storage, name: str) -> list[str]:
    """First word of each non-empty line of a text file; see ``read_text``."""
    return [line.split()[0] for line in read_text(place, name).splitlines() if line.strip()]


def read_text(place: Storage, name: str) -> str:
    """A text file.

    Raises:
        FileNotFoundError: there is none.
        MaskMillError: ``dataset_invalid`` if it is no file, or naming the line that is not UTF-8.
    """
    data = read_document(place, name, code="dataset_invalid")
    return decoded(data, place.uri_of(name), code="dataset_invalid")


def read_image(uri: str) -> npt.NDArray[np.uint8]:
    """RGB (H, W, 3), upright.

    Raises:
        MaskMillError: ``dataset_invalid``, naming the file.
    """
    try:
        return decode(fetch(uri))
    except ImageError as error:
        raise unreadable(uri, str(error)) from error
