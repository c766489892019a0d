"""What a source of images gives, and what is said of one that gives nothing."""

from __future__ import annotations

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


PathsByReason = dict[str, list[str]]


@dataclass
class ImageList:
    """The images of a source, in order, duplicates included.

    Attributes:
        uris: canonical; those of a manifest are unchecked.
        optional: values of those ``OPTIONAL_COLUMNS`` that the source has.
        ids: ids from a manifest, unchecked.
        left_out: paths that were found and not taken, by reason.
    """

    uris: list[str]
    optional: dict[str, list[int | None]] = field(default_factory=dict)
    ids: list[int] | None = None
    left_out: PathsByReason = field(default_factory=dict)


def describe_left_out(left_out: PathsByReason) -> str:
    """How many paths were not taken, why, and some of them, in one line; "" if there is none.

    >>> describe_left_out({".heic": ["/a/x.heic", "/a/y.heic"]})
    '2 not taken: 2 × .heic (x.heic, y.heic)'
    """
    reasons = sorted(left_out.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = []
    for reason, paths in reasons:
        names = ", ".join(_name(path) for path in sorted(paths)[:_SHOWN])
        more = ", …" if len(paths) > _SHOWN else ""
        shown.append(f"{len(paths):,} × {reason} ({names}{more})")
    total = sum(len(paths) for paths in left_out.values())
    return f"{total:,} not taken: {'; '.join(shown)}" if total else ""


def _name(path: str) -> str:
    name = without_signature(path).rstrip("/").rpartition("/")[2]
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def leave_out(left_out: PathsByReason, reason: str, path: str) -> None:
    """Record that a path is not taken."""
    left_out.setdefault(reason, []).append(path)


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
        "source_missing",
        f"{what} {without_signature(uri)}",
        f"Give an existing folder, glob, list file ({', '.join(LIST_EXTENSIONS)}), .tar or manifest.",
    )


def bad_list(place: str, text: str) -> WrongUse:
    """``source_invalid`` for a list; ``place`` is its URI, with the line if known."""
    return WrongUse(
        "source_invalid",
        f"{without_signature(place)}: {text}",
        "A list has a path or URI per line (.txt), or a column 'uri' and, where known, offset, length, width"
        " and height (.csv, .parquet), or an object with 'uri' or 'file_name' per line (.jsonl).",
    )


def bad_manifest(uri: str, text: str) -> WrongUse:
    """``source_invalid`` for a manifest."""
    return WrongUse(
        "source_invalid",
        f"{without_signature(uri)}: {text}",
        "Build it again from its source; in a plain list of images leave out the column 'id'. Images "
        "themselves are expected in a column of bytes, or of structs with bytes, called image.",
    )
