"""What a source of images gives, and what is said of one that gives nothing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import pyarrow as pa

from models.errors import MaskMillError, WrongUse
from pipeline.files.redaction import without_signature
from pipeline.files.storage import canonical_uri

#: File name extensions of images, in lower case.
IMAGE_EXTENSIONS: Final = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjp", ".pjpeg", ".mpo", ".png", ".apng", ".webp",
    ".tif", ".tiff", ".bmp", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx",
    ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
LIST_EXTENSIONS: Final = (".txt", ".csv", ".jsonl", ".json", ".parquet")
"""Of files that name images; JSON is COCO's."""
#: Optional columns of a list: a byte range within the URI, and the size in pixels.
OPTIONAL_COLUMNS: Final = {
    "offset": pa.int64(),
    "length": pa.int64(),
    "width": pa.int32(),
    "height": pa.int32(),
}

_SHOWN = 3  # examples of each kind of what was left out


BATCH: Final = 100_000
"""Images that a source gives at a time: smaller ones are sorted as a whole."""


@dataclass
class ImageList:
    """Some images of a source, in order, duplicates included.

    Attributes:
        uris: canonical; those of a manifest are unchecked.
        optional: values of those ``OPTIONAL_COLUMNS`` that the source has.
        ids: ids from a manifest, unchecked.
    """

    uris: list[str]
    optional: dict[str, list[int | None]] = field(default_factory=dict)
    ids: list[int] | None = None


class LeftOut:
    """What was found and not taken: how many paths for which reason, and some of them."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, reason: str, path: str) -> None:
        """Record that a path is not taken."""
        self._counts[reason] += 1
        self._examples[reason] = sorted([*self._examples.get(reason, ()), path])[:_SHOWN]

    def update(self, other: LeftOut) -> None:
        """Add what another has recorded."""
        self._counts += other._counts
        for reason, paths in other._examples.items():
            self._examples[reason] = sorted([*self._examples.get(reason, ()), *paths])[:_SHOWN]

    def __bool__(self) -> bool:
        return bool(self._counts)

    def describe(self) -> str:
        """How many paths, why, and some of them, in one line; "" if there is none.

        >>> left_out = LeftOut()
        >>> left_out.add(".heic", "/a/x.heic")
        >>> left_out.add(".heic", "/a/y.heic")
        >>> left_out.describe()
        '2 not taken: 2 × .heic (x.heic, y.heic)'
        """
        shown = []
        for reason, count in sorted(self._counts.items(), key=lambda item: (-item[1], item[0])):
            names = ", ".join(_name(path) for path in self._examples[reason])
            more = ", …" if count > _SHOWN else ""
            shown.append(f"{count:,} × {reason} ({names}{more})")
        return f"{self._counts.total():,} not taken: {'; '.join(shown)}" if shown else ""


def batches(paths: Iterable[str]) -> Iterator[list[str]]:
    """Lists of up to ``BATCH`` of the paths."""
    source = iter(paths)
    while batch := list(itertools.islice(source, BATCH)):
        yield batch


def _name(path: str) -> str:
    name = without_signature(path).rstrip("/").rpartition("/")[2]
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def on_the_web(uri: str) -> bool:
    """Whether an address is one of a web server."""
    return uri.startswith(("http://", "https://"))


def entry_uri(list_uri: str, entry: str, place: str) -> str:
    """Canonical URI of a list entry; relative entries are relative to the list's folder."""
    if not ("://" in entry or entry.startswith(("/", "file:"))):
        base = list_uri.partition("?")[0] if on_the_web(list_uri) else list_uri
        entry = f"{base.rpartition('/')[0]}/{entry.removeprefix('./')}"
    try:
        return canonical_uri(entry)
    except MaskMillError as error:
        raise WrongUse(error.code, f"{without_signature(place)}: {error.message}", error.remedy) from None


def missing(uri: str, what: str) -> WrongUse:
    return WrongUse(
        "input_missing",
        f"{what} {without_signature(uri)}",
        f"Give an existing folder, glob, list file ({', '.join(LIST_EXTENSIONS)}), .tar or manifest.",
    )


def bad_list(place: str, text: str) -> WrongUse:
    """``dataset_invalid`` for a list; ``place`` is its URI, with the line if known."""
    return WrongUse(
        "dataset_invalid",
        f"{without_signature(place)}: {text}",
        "A list has a path or URI per line (.txt), or a column 'uri' and, where known, offset, length, width"
        " and height (.csv, .parquet), or an object with 'uri' or 'file_name' per line (.jsonl).",
    )


def bad_manifest(uri: str, text: str) -> WrongUse:
    """``dataset_invalid`` for a manifest."""
    return WrongUse(
        "dataset_invalid",
        f"{without_signature(uri)}: {text}",
        "Build it again from its source; in a plain list of images leave out the column 'id'. Images "
        "themselves are expected in a column of bytes, or of structs with bytes, called image.",
    )
