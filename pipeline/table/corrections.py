"""Corrections: what people say of the labels of a table, as a label table of their own.

It lies in ``corrections/`` of the table it corrects, or anywhere else, and has a row an image. Where labels
are believed (training, evaluation, export), that row takes the place of the table's row of the same id:

- a row with labels, which a person has accepted or painted, is the truth of the image;
- a row with the status ``rejected`` takes the image out.

The corrected table itself is never changed, so corrections survive a relabelling. One that was made of
another image of that name, by the SHA-256 of the file, does not count.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.files.fetch import file_version
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import (
    OK,
    decode_confidence,
    decode_mask,
    encode_confidence,
    encode_mask,
    iter_batches,
    table_files,
)
from pipeline.table.record import find_table_record
from pipeline.table.statistics import quality, segments

CORRECTIONS_DIR: Final = "corrections"
"""Folder of a table in which its corrections are."""
REJECTED: Final = "rejected"
"""Status of an image whose labels a person has refused."""
OFF: Final = "off"
"""What ``--corrections`` says to leave the labels as they are."""
_NO_CLASS = -1
_READERS = 16


@dataclass(frozen=True, eq=False)
class Corrections:
    """The corrections of one table; see ``open_corrections``. Picklable.

    Attributes:
        place: where they are.
        storage: the folder of their files.
        files: the file and the row in it, by id of the image; only of images that are those of the table.
        rejected: ids of images whose labels were refused, int64, sorted.
        outdated: ids of those that do not count, because their image has changed since, int64, sorted.
        elsewhere: ids of those that do not count, because the table does not have their image, int64, sorted.
        identity: SHA-256 (hex) of the ids and of the versions of the files.
        lookup: id of the corrected table by id of the corrections; None if they are the same.
        ignore_index: of the corrected table.
    """

    place: str
    storage: Storage
    files: Mapping[int, tuple[str, int]]
    rejected: npt.NDArray[np.int64]
    outdated: npt.NDArray[np.int64]
    elsewhere: npt.NDArray[np.int64]
    identity: str
    lookup: npt.NDArray[Any] | None
    ignore_index: int
    _last: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    """Rows of the file that was read last: images come in the order of their table."""

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Of all images that are corrected, sorted."""
        return np.array(sorted(self.files), np.int64)

    def described(self) -> str:
        """In words, for terminals and pages."""
        count = len(self.files)
        said = f"{count:,} correction{'' if count == 1 else 's'} from {self.place}"
        if len(self.rejected):
            said += f", {len(self.rejected):,} of them rejected"
        if len(self.outdated):
            said += f"; {len(self.outdated):,} more are of images that have changed since"
        if len(self.elsewhere):
            said += f"; {len(self.elsewhere):,} more are of images that the table does not have"
        return said

    def corrected(self, row: dict[str, Any]) -> dict[str, Any]:
        """A row of the table, or in its place that of its correction, with the same columns.

        Args:
            row: of the table, with ``id`` and any columns of ``pipeline.table.labels.LABEL_SCHEMA``.

        Raises:
            MaskMillError: ``table_damaged``.
        """
        place = self.files.get(row["id"])
        if place is None:
            return row
        found = self._read(*place)
        # The address stays that of the table: it may lie elsewhere than when it was corrected.
        return row | {name: found[name] for name in row if name in found and name != "uri"}

    def _read(self, file: str, row: int) -> dict[str, Any]:
        if file not in self._last:
            self._last.clear()
            batches = iter_batches(self.storage, names=[file])
            self._last[file] = [one for batch in batches for one in batch.to_pylist()]
        found = self._last[file][row]
        if self.lookup is None or found["status"] != OK:
            return found
        labels = self.lookup[decode_mask(found["mask"]["bytes"])]
        confidence = np.where(
            labels == self.ignore_index, 0, decode_confidence(found["confidence"]["bytes"])
        ).astype(np.uint8)
        return found | {
            "mask": {"bytes": encode_mask(labels), "path": None},
            "confidence": {"bytes": encode_confidence(confidence), "path": None},
            "segments": segments(labels, confidence, ignore_index=self.ignore_index),
            "quality": quality(confidence, labels, ignore_index=self.ignore_index),
        }


def open_corrections(table: str, given: str | None = None) -> Corrections | None:
    """The corrections of a table.

    Args:
        table: the label table.
        given: where they are; None looks beside the table; ``off`` is none.

    Returns:
        None if there are none.

    Raises:
        MaskMillError: ``table_missing`` if there is no label table in ``given``; ``wrong_use`` if it holds
            labels of a model; ``table_damaged``; ``classes_differ`` if it has none of the table's classes.
    """
    if given == OFF:
        return None
    root = open_storage(table)
    storage = root.child(CORRECTIONS_DIR) if given is None else open_storage(given)
    record = find_table_record(storage)
    if record is None:
        if given is None:
            return None
        raise WrongUse(
            "table_missing",
            f"There is no label table in {storage.uri}.",
            f"Give a table of corrections or of true labels, or {OFF}.",
        )
    if record.source == "pseudo":
        raise WrongUse(
            "wrong_use",
            f"{storage.uri} holds labels of a model, not corrections by people.",
            f"Give a table of corrections or of true labels, or {OFF}.",
        )
    mine = find_table_record(root)
    folder, parts = table_files(storage)
    found: dict[int, tuple[str, int]] = {}
    hashes: dict[int, bytes | None] = {}
    rejected: set[int] = set()
    for part in parts:
        number = 0
        for batch in iter_batches(folder, ["id", "sha256", "status"], batch_size=4096, names=[part]):
            for row in batch.to_pylist():
                if row["status"] in (OK, REJECTED):
                    found[row["id"]] = (part, number)
                    hashes[row["id"]] = row["sha256"]
                    if row["status"] == REJECTED:
                        rejected.add(row["id"])
                number += 1
    outdated, elsewhere = _of_other_images(root, hashes)
    for row_id in (*outdated, *elsewhere):
        del found[row_id]
    if not found and not outdated:
        return None
    lookup = None if mine is None else class_lookup(record.ontology, mine.ontology, storage.uri, root.uri)
    return Corrections(
        storage.uri,
        folder,
        found,
        np.array(sorted(rejected & found.keys()), np.int64),
        np.array(outdated, np.int64),
        np.array(elsewhere, np.int64),
        _identity(folder, parts, found),
        lookup,
        record.ontology.ignore_index if mine is None else mine.ontology.ignore_index,
    )


def _identity(folder: Storage, parts: Sequence[str], found: Mapping[int, tuple[str, int]]) -> str:
    digest = hashlib.sha256(np.array(sorted(found), "<i8").tobytes())
    with ThreadPoolExecutor(_READERS) as pool:
        for version in pool.map(lambda part: file_version(folder.uri_of(part)), parts):
            digest.update(f"{version}\n".encode())
    return digest.hexdigest()


def _of_other_images(table: Storage, hashes: Mapping[int, bytes | None]) -> tuple[list[int], list[int]]:
    """Ids whose image in the table is not the one that was corrected, and ids that it lacks; both sorted."""
    wanted = np.array(sorted(hashes), np.int64)
    outdated, absent = [], set(hashes)
    for batch in iter_batches(table, ["id", "sha256"], batch_size=65_536):
        ids = batch["id"].to_numpy()
        for at in np.flatnonzero(np.isin(ids, wanted)).tolist():
            row_id, sha256 = int(ids[at]), batch["sha256"][at].as_py()
            absent.discard(row_id)
            if None not in (sha256, hashes[row_id]) and sha256 != hashes[row_id]:
                outdated.append(row_id)
    return sorted(outdated), sorted(absent)


def class_lookup(own: Ontology, table: Ontology, where: str, other: str) -> npt.NDArray[Any] | None:
    """Id of a table by id of its corrections, matched by name; None if they are the same.

    Args:
        own: classes of the corrections.
        table: classes of the table.
        where: the corrections, for errors.
        other: the table, for errors.

    Raises:
        MaskMillError: ``classes_differ`` if they have none in common.
    """
    if own.names == table.names and own.ignore_index == table.ignore_index:
        return None
    position = {name.casefold(): number for number, name in enumerate(table.names)}
    ids = [position.get(name.casefold(), _NO_CLASS) for name in own.names]
    if max(ids) < 0:
        raise WrongUse(
            "classes_differ",
            f"None of the classes of {where} is among those of {other}.",
            f"Leave these corrections out: --corrections {OFF}.",
        )
    lookup: npt.NDArray[Any] = np.full(1 << 16, table.ignore_index, table.mask_dtype)
    lookup[: len(ids)] = [table.ignore_index if number < 0 else number for number in ids]
    return lookup


def corrected_rows(rows: Sequence[dict[str, Any]], corrections: Corrections | None) -> list[dict[str, Any]]:
    """Rows of a table, corrected where there are corrections."""
    return list(rows) if corrections is None else [corrections.corrected(row) for row in rows]
