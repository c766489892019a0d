"""The rows of a label table as samples: the one place where exports read labels and images."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from models.errors import Damaged, MaskMillError
from pipeline.corpus.manifest import stable_id
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError, suffix_of_content, upright
from pipeline.files.storage import Storage
from pipeline.formats.base import Sample
from pipeline.formats.names import Naming, suffix_of
from pipeline.table.changed import Images
from pipeline.table.corrections import Corrections, corrected_rows
from pipeline.table.labels import (
    MAP_TOO_LARGE,
    OK,
    decode_confidence,
    decode_mask,
    is_large,
    iter_batches,
    large_map,
)
from pipeline.table.splits import Split
from pipeline.table.statistics import Confidence, Labels
from pipeline.table.views import TableView

TRAIN, VAL = "train", "val"
CHANGED = "image_changed"
"""Reason of images that are not those that were labelled; others are the row's status, an image's code, or
``map_too_large``."""
IN_NO_PART = "in_no_part"
"""Reason of images that the split of the table has in no part."""
_BATCH = 16
_READERS = 16


@dataclass(frozen=True)
class Source:
    """Which samples of a table are wanted.

    Attributes:
        table: the label table.
        view: what becomes of its labels; None leaves them as they are.
        with_confidence: also decode the confidence.
        with_images: also fetch the images.
        val_share: share of the images, 0 to 1, that go into the split "val".
        split: the split of each image, instead of ``val_share``; images that are in no part of it are left
            out.
        images: where images are that are not whole files at their address.
        corrections: what people say of the labels, or is known, which counts instead of them.
        only: ids of the images that are wanted; None is all. Nothing is told of the others.
    """

    table: Storage
    view: TableView | None = None
    with_confidence: bool = False
    with_images: bool = False
    val_share: float = 0.0
    split: Split | None = None
    images: Images = field(default_factory=lambda: Images(None))
    corrections: Corrections | None = None
    only: frozenset[int] | None = None


@dataclass(frozen=True)
class LeftOut:
    """A row without a sample.

    Attributes:
        id, uri: of the row.
        reason: its status, ``CHANGED``, or the code of an image that cannot be read now.
        text: for people.
        again: whether another run may find the image.
    """

    id: int
    uri: str
    reason: str
    text: str
    again: bool = False


def samples_of(
    source: Source, file: str, first: int, naming: Naming, leave_out: Callable[[LeftOut], None]
) -> Iterator[Sample]:
    """The samples in a file of the table, read a few rows at a time.

    Args:
        source: the table, and what is wanted of it.
        file: name of the file, relative to the table.
        first: number of its first row.
        naming: for the names of the images.
        leave_out: told of rows that have no sample: those that failed, those whose maps are too large to be
            decoded whole and, if images are wanted, those whose image has changed or is gone.

    Raises:
        MaskMillError: ``table_damaged``; ``storage_unreachable``.
    """
    columns = ["id", "uri", "sha256", "status", "error", "height", "width", "mask"]
    needs_confidence = source.with_confidence or source.view is not None
    if needs_confidence or source.corrections is not None:
        columns.append("confidence")
    number = first - 1
    with ThreadPoolExecutor(_READERS) as pool:
        for batch in iter_batches(source.table, columns, batch_size=_BATCH, names=[file]):
            rows = [
                row if source.only is None or row["id"] in source.only else None
                for row in corrected_rows(batch.to_pylist(), source.corrections)
            ]
            fetch_all = pool.map if source.with_images else map
            images = fetch_all(functools.partial(_image, source=source), rows)
            for row, image in zip(rows, images, strict=True):
                number += 1
                if row is None or image is None:
                    continue
                if isinstance(image, LeftOut):
                    leave_out(image)
                    continue
                data, suffix = image
                split = _split(row, source)
                if isinstance(split, LeftOut):
                    leave_out(split)
                    continue
                labels, confidence = _maps(row, source, file, needs_confidence)
                yield Sample(
                    number=number,
                    id=row["id"],
                    name=naming.name(row["uri"], row["id"]),
                    uri=row["uri"],
                    suffix=suffix or suffix_of(row["uri"]),
                    split=split,
                    labels=labels,
                    confidence=confidence if source.with_confidence else None,
                    image=data,
                )


def _split(row: Mapping[str, Any], source: Source) -> str | LeftOut:
    """The split of a row; or why it is in none."""
    if source.split is None:
        return split_of(row["id"], source.val_share)
    part = source.split.part_of(row["id"])
    if part is None:
        text = "the split of the table has it in no part: maskmill split looks at new images"
        return LeftOut(row["id"], row["uri"], IN_NO_PART, text, again=True)
    return part


def split_of(row_id: int, val_share: float) -> str:
    """The split of an image, which depends on its id alone."""
    digest = blake2b(row_id.to_bytes(8, "little", signed=True), digest_size=8, person=b"split").digest()
    return VAL if int.from_bytes(digest, "little") < val_share * 2**64 else TRAIN


def _maps(
    row: Mapping[str, Any], source: Source, file: str, needs_confidence: bool
) -> tuple[Labels, Confidence | None]:
    try:
        labels = decode_mask(row["mask"]["bytes"])
        confidence = decode_confidence(row["confidence"]["bytes"]) if needs_confidence else None
    except (MaskMillError, TypeError) as error:  # a type error: there is no mask at all
        why = error.message if isinstance(error, MaskMillError) else "the row has no mask"
        raise Damaged(
            "table_damaged",
            f"{source.table.uri_of(file)}, image {row['uri']}: {why}.",
            f"Run: maskmill verify {source.table.uri} --repair",
        ) from error
    if source.view is not None:
        assert confidence is not None
        return source.view.apply(labels, confidence)
    return labels, confidence


def _image(row: Mapping[str, Any] | None, source: Source) -> tuple[bytes | None, str] | LeftOut | None:
    """The upright image and its suffix, "" if that of its address fits; or why there is none."""
    if row is None:
        return None

    def left_out(reason: str, text: str, *, again: bool = True) -> LeftOut:
        return LeftOut(row["id"], row["uri"], reason, text, again)

    if row["status"] != OK:
        return left_out(row["status"], row["error"] or "", again=False)
    if row["mask"] is not None and is_large(row["mask"]["bytes"] or b""):
        return left_out(MAP_TOO_LARGE, large_map(row["height"], row["width"]), again=False)
    if not source.with_images:
        return None, ""
    if row["id"] not in source.images and row["id"] != stable_id(row["uri"]):
        return left_out(
            "not_a_file", "it is a byte range of its address: give the manifest that has it", again=False
        )
    start, length = source.images.byte_range(row["id"])
    try:
        data = fetch(source.images.address(row), start=start, length=length)
        if hashlib.sha256(data).digest() != row["sha256"]:
            return left_out(CHANGED, "its content is not what was labelled")
        data, suffix = upright(data)
        return data, suffix or suffix_of(row["uri"], "") or suffix_of_content(data)
    except ImageError as error:
        return left_out(error.code, error.message)
