"""The labels that a model was trained on: what they are, and how good they seem.

A summary is made in one pass over the label table, row group by row group, and is small enough to stay with
the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, model_validator

from pipeline.files.records import find_record
from pipeline.files.storage import Storage
from pipeline.table.labels import OK, Counts, iter_batches
from pipeline.table.record import read_table_record
from pipeline.table.statistics import QualityScore

SCHEMA_VERSION = 1
LABELS_FILE = "labels.json"
_ROWS = 64
_MODULUS = 1 << 256


class LabelSummary(BaseModel):
    """What the labels of a table are.

    Attributes:
        digest: SHA-256-sized (hex) sum over the labelled images: the same for the same masks of the same
            images with the same classes, whatever their order, their files and where they lie.
        classes: K names, by id.
        class_pixels: labelled pixels of each class (K,).
        class_images: images with each class (K,).
        pixels: of the labelled images, ignored ones included.
        images: rows of the table.
        status: rows by status; ``ok`` for a labelled image.
        mean_quality: mean of the images' label quality, in [0, 1]; None without labelled images.
        score: what quality that is; older versions knew but one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    schema_version: int = SCHEMA_VERSION
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    classes: tuple[str, ...]
    class_pixels: tuple[NonNegativeInt, ...]
    class_images: tuple[NonNegativeInt, ...]
    pixels: NonNegativeInt
    images: NonNegativeInt
    status: dict[str, NonNegativeInt]
    mean_quality: FiniteFloat | None
    score: QualityScore = "softmin"

    @model_validator(mode="after")
    def _fits(self) -> LabelSummary:
        if not len(self.classes) == len(self.class_pixels) == len(self.class_images):
            raise ValueError(f"{len(self.classes)} classes have {len(self.class_pixels)} counts of pixels")
        if sum(self.class_pixels) > self.pixels or sum(self.status.values()) != self.images:
            raise ValueError("the counts do not add up")
        return self

    @property
    def labelled(self) -> int:
        """Images with labels."""
        return self.status.get(OK, 0)

    @property
    def failed_share(self) -> float:
        """Share of the images without labels, in [0, 1]; 0 without images."""
        return 1 - self.labelled / self.images if self.images else 0.0

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that have no class, in [0, 1]; 0 without pixels."""
        return 1 - sum(self.class_pixels) / self.pixels if self.pixels else 0.0

    @property
    def shares(self) -> dict[str, float]:
        """Share of each class in the pixels that have one, by name; empty without any."""
        total = sum(self.class_pixels)
        found = zip(self.classes, self.class_pixels, strict=True)
        return {name: pixels / total for name, pixels in found} if total else {}


def summarise_labels(table: str) -> LabelSummary:
    """Summarise a label table in bounded memory. Reads all masks, and decodes none.

    Args:
        table: the output of a labelling run.

    Raises:
        MaskMillError: ``input_missing``, ``table_damaged``, ``newer_version``.
    """
    record = read_table_record(table)
    ontology = record.ontology
    names = ontology.names
    counts, total = Counts(), 0
    columns = [*Counts.COLUMNS, "sha256", "mask"]
    for batch in iter_batches(table, columns, batch_size=_ROWS):
        counts.count(batch)
        rows = zip(
            batch.column("status").to_pylist(),
            batch.column("sha256").to_pylist(),
            batch.column("mask").field("bytes").to_pylist(),
            strict=True,
        )
        # A sum does not depend on the order, and adding a row costs nothing.
        total += sum(_row_digest(image, mask) for status, image, mask in rows if status == OK)
    found = counts.to_dict()
    meaning = json.dumps([names, ontology.ignore_index], ensure_ascii=False).encode()
    digest = hashlib.sha256((total % _MODULUS).to_bytes(32, "big") + meaning).hexdigest()
    return LabelSummary(
        digest=digest,
        classes=names,
        class_pixels=_by_id(found["class_pixels"], len(names)),
        class_images=_by_id(found["class_images"], len(names)),
        pixels=found["pixels"],
        images=found["images"],
        status=found["status"],
        mean_quality=found["mean_quality"],
        score=record.quality,
    )


def _row_digest(image: bytes | None, mask: bytes) -> int:
    known = image or b""
    return int.from_bytes(hashlib.sha256(len(known).to_bytes(1, "big") + known + mask).digest(), "big")


def _by_id(counts: Mapping[str, int], classes: int) -> tuple[int, ...]:
    return tuple(counts.get(str(number), 0) for number in range(classes))


def write_labels(storage: Storage, summary: LabelSummary) -> None:
    """Write ``labels.json``."""
    storage.write_json(LABELS_FILE, summary.model_dump(mode="json"))


def read_labels(storage: Storage) -> LabelSummary | None:
    """Read ``labels.json``; None if there is none.

    Raises:
        MaskMillError: ``newer_version``, ``file_damaged``.
    """
    remedy = "Delete it; it is made again from the label table."
    return find_record(LabelSummary, storage, LABELS_FILE, SCHEMA_VERSION, remedy=remedy)
