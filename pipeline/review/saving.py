"""What people say of images, saved: a table of corrections with one file an image.

A save is one atomic write under a name made from the image's id, so an image has one row however often it is
saved, and a server that is killed leaves the old row or the new. Each save says which one it follows (by an
entity tag, as HTTP has them): of two people who save the same image at once, the second is told. The same
save again changes nothing. What was painted and is replaced later is kept in ``set_aside/``.

To the columns of the label table come three: ``decision``, ``reviewer`` and ``reviewed``.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from pipeline.files.records import now
from pipeline.files.storage import Storage
from pipeline.files.versions import versions
from pipeline.labelling.recipes import LabelRecipe
from pipeline.ontology.ontology import Ontology
from pipeline.table.committed import LABELS_DIR, SET_ASIDE_DIR, part_name
from pipeline.table.corrections import REJECTED
from pipeline.table.labels import DATASET_FILE, LABEL_SCHEMA, decode_mask, failed_row, ok_row
from pipeline.table.record import TableRecord, find_table_record
from pipeline.table.statistics import Labels

Decision = Literal["accepted", "rejected", "painted"]
DECISIONS: Final[tuple[Decision, ...]] = get_args(Decision)
SCHEMA: Final = pa.schema(
    [*LABEL_SCHEMA, ("decision", pa.string()), ("reviewer", pa.string()), ("reviewed", pa.string())]
)
PACKAGES: Final = ("maskmill", "pyarrow", "opencv-python-headless", "numpy")
_READERS = 16
_TRIES = 5


@dataclass(frozen=True)
class Saved:
    """What is saved of an image.

    Attributes:
        decision: what a person said.
        reviewer: who.
        reviewed: when, UTC in ISO 8601.
        tag: entity tag of the file; the next save says that it follows it.
        mask: the labels as PNG; None if they were rejected.
    """

    decision: Decision
    reviewer: str
    reviewed: str
    tag: str
    mask: bytes | None


class SavedByAnother(MaskMillError):
    """The image was saved since the one that this save follows.

    Args:
        there: what is saved now.
    """

    def __init__(self, there: Saved) -> None:
        who = there.reviewer or "somebody"
        super().__init__(
            "saved_by_another",
            f"{who} has saved this image at {there.reviewed}: {there.decision}.",
            "Look at that, and save again to replace it. What was painted before is kept in set_aside/.",
        )
        self.there = there

    def __reduce__(self) -> tuple[type[SavedByAnother], tuple[Saved]]:  # type: ignore[override]
        return type(self), (self.there,)


def new_record(ontology: Ontology, about: str) -> TableRecord:
    """The ``dataset.json`` of corrections. Its recipe changes nothing: readers of tables expect one."""
    recipe = LabelRecipe(name=f"review of {about}", model="human", pretrained=None, precision="fp32")
    return TableRecord(
        created=now(),
        source="human",
        ontology=ontology,
        recipe=recipe.to_dict() | {"hash": recipe.hash},
        weights={"model": "human", "pretrained": about, "fingerprint": ""},
        precision="fp32",
        versions=versions(PACKAGES),
    )


class Saves:
    """The corrections of a table, to be read and written.

    Args:
        storage: their folder.
    """

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    def begin(self, ontology: Ontology, about: str) -> None:
        """Make the table of corrections if there is none.

        Args:
            ontology: of the corrected table.
            about: the corrected table.

        Raises:
            MaskMillError: ``output_differs`` if another table is there, or one with other classes.
        """
        record = find_table_record(self.storage)
        if record is None:
            made = new_record(ontology, about).model_dump_json(indent=2).encode() + b"\n"
            if self.storage.create_bytes(DATASET_FILE, made):
                return
            record = find_table_record(self.storage)
        assert record is not None, "it was there a moment ago"
        if record.source != "human":
            raise WrongUse(
                "output_differs",
                f"{self.storage.uri} holds labels that are no corrections.",
                "Name another place: --corrections.",
            )
        if record.ontology.names != ontology.names or record.ontology.ignore_index != ontology.ignore_index:
            raise WrongUse(
                "output_differs",
                f"{self.storage.uri} holds corrections with other classes than {about}.",
                "Name another place: --corrections. The old ones still count, by the names of their classes, "
                "where they are given.",
            )

    def read(self, row_id: int) -> Saved | None:
        """What is saved of an image; None if nothing is.

        Raises:
            MaskMillError: ``table_damaged``.
        """
        data = self._content(row_id)
        return None if data is None else self._parsed(row_id, data)

    def labels(self, saved: Saved) -> Labels:
        """The labels (H, W) that are saved; not of a rejection."""
        assert saved.mask is not None
        return decode_mask(saved.mask)

    def read_all(self, ids: Iterable[int]) -> dict[int, Saved]:
        """What is saved of some images, without those of which nothing is."""
        wanted = list(ids)
        there = set(self.storage.list(LABELS_DIR))
        wanted = [row_id for row_id in wanted if _name(row_id) in there]
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(self.read, wanted)
            return {row_id: saved for row_id, saved in zip(wanted, found, strict=True) if saved is not None}

    def save(
        self,
        row: dict[str, Any],
        decision: Decision,
        labels: Labels | None,
        *,
        reviewer: str,
        follows: str | None,
        ignore_index: int,
    ) -> Saved:
        """Save what a person says of an image.

        Args:
            row: of the table, with ``id``, ``uri``, ``sha256``, ``height``, ``width`` and ``version``.
            decision: what was said.
            labels: what is right, (H, W); None if the labels are rejected.
            reviewer: who says it.
            follows: tag of the save that this one replaces; None if there was none.
            ignore_index: of the labels.

        Raises:
            SavedByAnother: another one has been saved since ``follows``.
            MaskMillError: what the storage says.
        """
        new = _encoded(_row(row, decision, labels, reviewer, ignore_index))
        made = self._parsed(row["id"], new)
        name = _name(row["id"])
        for _ in range(_TRIES):
            old = self._content(row["id"])
            if old is None:
                if self.storage.create_bytes(name, new):
                    return made
                continue
            there = self._parsed(row["id"], old)
            if (there.decision, there.mask) == (made.decision, made.mask):
                return there  # the same again, perhaps because the answer was lost
            if there.tag != follows:
                raise SavedByAnother(there)
            if there.decision == "painted":
                stem = name.rpartition("/")[2].removesuffix(".parquet")
                self.storage.write_bytes(f"{SET_ASIDE_DIR}/{stem}-{there.tag[:12]}.parquet", old)
            if self.storage.swap_bytes(name, old, new):
                return made
        raise FailedWork(
            "storage_unreachable",
            f"{self.storage.uri_of(name)} changes faster than it can be saved.",
            "Save again.",
        )

    def _content(self, row_id: int) -> bytes | None:
        try:
            return self.storage.read_bytes(_name(row_id))
        except FileNotFoundError:
            return None

    def _parsed(self, row_id: int, data: bytes) -> Saved:
        try:
            found = pq.read_table(
                pa.BufferReader(data), columns=["id", "mask", "decision", "reviewer", "reviewed"]
            ).to_pylist()
            (row,) = found
            if row["id"] != row_id or row["decision"] not in DECISIONS:
                raise ValueError("it is of another image")
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise Damaged(
                "table_damaged",
                f"{self.storage.uri_of(_name(row_id))} is no correction: {' '.join(str(error).split())}",
                "Move the file away, and review the image again.",
            ) from error
        mask = row["mask"]
        return Saved(
            row["decision"],
            row["reviewer"] or "",
            row["reviewed"] or "",
            hashlib.sha256(data).hexdigest()[:32],
            None if mask is None else mask["bytes"],
        )


def _name(row_id: int) -> str:
    return f"{LABELS_DIR}/{part_name(np.array([row_id], np.int64))}"


def _row(
    row: dict[str, Any], decision: Decision, labels: Labels | None, reviewer: str, ignore_index: int
) -> dict[str, Any]:
    known: dict[str, Any] = {
        name: row.get(name) for name in ("id", "uri", "sha256", "height", "width", "version")
    }
    said = {"decision": decision, "reviewer": reviewer, "reviewed": now()}
    if decision == "rejected":
        return failed_row(**known, status=REJECTED, error=f"rejected by {reviewer or 'a person'}") | said
    assert labels is not None, "only a rejection has no labels"
    confidence = np.where(labels == ignore_index, 0, 255).astype(np.uint8)
    made = ok_row(**known, labels=labels, confidence=confidence, ignore_index=ignore_index)
    return made | said


def _encoded(row: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([row], schema=SCHEMA), buffer, write_page_checksum=True)
    return buffer.getvalue()
