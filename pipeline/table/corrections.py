"""Corrections: what people say of the labels of a table, as a label table of their own.

It lies in ``corrections/`` of the table it corrects, or anywhere else, and has a row an image. Where labels
are believed (training, evaluation, export), that row takes the place of the table's row of the same id:

- a row with labels, which a person has accepted or painted, is the truth of the image;
- a row with the status ``rejected`` takes the image out.

The corrected table itself is never changed, so corrections survive a relabelling. One that was made of
another image of that name, by the SHA-256 of the file, does not count.

*Known labels* (``open_known``) are the same, but leave what they do not know to the table: where they ignore
a pixel, its label stays. So truth of some images, classes or pixels and labels of a model are one table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.files.fetch import file_version
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.labels import (
    OK,
    encode_confidence,
    encode_mask,
    is_large,
    iter_batches,
    table_files,
)
from pipeline.table.record import find_table_record, read_table_record
from pipeline.table.statistics import quality, segments
from pipeline.table.viewed import decode_maps
from pipeline.table.views import TableView

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
        unknown: id by which known labels leave a pixel to the table; None for corrections, which say all.
        view: of known labels.
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
    unknown: int | None = None
    view: TableView | None = None
    _last: dict[str, list[dict[str, Any]]] = field(default_factory=dict, repr=False)
    """Rows of the file that was read last: images come in the order of their table."""

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Of all images that are corrected, sorted."""
        return np.array(sorted(self.files), np.int64)

    def described(self) -> str:
        """In words, for terminals and pages."""
        count = len(self.files)
        what = "correction" if self.unknown is None else "known label map"
        said = f"{count:,} {what}{'' if count == 1 else 's'} from {self.place}"
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
            row: of the table, with ``id`` and any columns of ``pipeline.table.labels.LABEL_SCHEMA``; known
                labels want ``status``, ``mask`` and ``confidence``.

        Raises:
            MaskMillError: ``table_damaged``; ``mask_invalid`` if known labels have another size.
        """
        place = self.files.get(row["id"])
        if place is None:
            return row
        found = self._read(*place)
        if found["status"] == OK and (self.lookup is not None or self.unknown is not None):
            found = found | self._maps(found, row)
        # The address stays that of the table: it may lie elsewhere than when it was corrected.
        return row | {name: found[name] for name in row if name in found and name != "uri"}

    def _read(self, file: str, row: int) -> dict[str, Any]:
        if file not in self._last:
            self._last.clear()
            batches = iter_batches(self.storage, names=[file])
            self._last[file] = [one for batch in batches for one in batch.to_pylist()]
        return self._last[file][row]

    def _maps(self, found: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
        """Maps of a correction in the classes of the table, and what is computed from them."""
        kept = self.unknown is not None and row["status"] == OK
        if is_large(found["mask"]["bytes"]) or (kept and is_large(row["mask"]["bytes"])):
            return {}  # left out by whoever decodes maps
        own, confidence = decode_maps(found["mask"]["bytes"], found["confidence"]["bytes"], self.view)
        labels = own if self.lookup is None else self.lookup[own]
        confidence = np.where(labels == self.ignore_index, 0, confidence).astype(np.uint8)
        if kept:
            guesses, sure = decode_maps(row["mask"]["bytes"], row["confidence"]["bytes"], None)
            if guesses.shape != labels.shape:
                raise WrongUse(
                    "mask_invalid",
                    f"{row['uri']} has {labels.shape[1]} x {labels.shape[0]} pixels in {self.place}, and "
                    f"{guesses.shape[1]} x {guesses.shape[0]} in the table.",
                    "Label the image anew, or give the known labels that belong to it.",
                )
            labels = np.where(own == self.unknown, guesses, labels)
            confidence = np.where(own == self.unknown, sure, confidence)
        return {
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
        MaskMillError: ``input_missing`` if there is no label table in ``given``; ``wrong_use`` if it holds
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
            "input_missing",
            f"There is no label table in {storage.uri}.",
            f"Give a table of corrections or of true labels, or {OFF}.",
        )
    if record.source == "pseudo":
        raise WrongUse(
            "wrong_use",
            f"{storage.uri} holds labels of a model, not corrections by people.",
            f"Give a table of corrections or of true labels, or {OFF}.",
        )
    found = _opened(root, storage, record.ontology)
    return found if found.files or len(found.outdated) else None


def open_known(table: str, given: str, view: TableView | None = None) -> Corrections:
    """Labels that are believed, over those of a table; see the top of this module.

    Args:
        table: the label table.
        given: the table whose labels are believed.
        view: of the latter.

    Raises:
        MaskMillError: ``input_missing``; ``table_damaged``; ``classes_differ`` if they have no class in
            common; ``wrong_use`` if they have no image in common.
    """
    root, storage = open_storage(table), open_storage(given)
    ontology = read_table_record(given).ontology if view is None else view.ontology
    found = _opened(root, storage, ontology, "Leave --known out, or give a table with the same classes.")
    if not found.files:
        raise WrongUse(
            "wrong_use",
            f"{storage.uri} knows none of the images of {root.uri}.",
            "Label its images too: known labels take the place of those of a table.",
        )
    said = f"{found.identity} known {'' if view is None else view.view.canonical}"
    return replace(
        found,
        identity=hashlib.sha256(said.encode()).hexdigest(),
        unknown=ontology.ignore_index,
        view=view,
    )


def _opened(root: Storage, storage: Storage, ontology: Ontology, *remedy: str) -> Corrections:
    """Rows of a table that take the place of those of another.

    Args:
        root: the other table.
        storage: the table.
        ontology: its classes.
        remedy: if none of them is the other's, for the error.
    """
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
    lookup = None
    if mine is not None:
        lookup = class_lookup(ontology, mine.ontology, storage.uri, root.uri, *remedy)
    return Corrections(
        storage.uri,
        folder,
        found,
        np.array(sorted(rejected & found.keys()), np.int64),
        np.array(outdated, np.int64),
        np.array(elsewhere, np.int64),
        _identity(folder, parts, found),
        lookup,
        ontology.ignore_index if mine is None else mine.ontology.ignore_index,
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


def class_lookup(
    own: Ontology,
    table: Ontology,
    where: str,
    other: str,
    remedy: str = f"Leave these corrections out: --corrections {OFF}.",
) -> npt.NDArray[Any] | None:
    """Id of a table by id of its corrections, matched by name; None if they are the same.

    Args:
        own: classes of the corrections.
        table: classes of the table.
        where: the corrections, for errors.
        other: the table, for errors.
        remedy: for errors.

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
            remedy,
        )
    lookup: npt.NDArray[Any] = np.full(1 << 16, table.ignore_index, table.mask_dtype)
    lookup[: len(ids)] = [table.ignore_index if number < 0 else number for number in ids]
    return lookup


def corrected_rows(rows: Sequence[dict[str, Any]], corrections: Corrections | None) -> list[dict[str, Any]]:
    """Rows of a table, corrected where there are corrections."""
    return list(rows) if corrections is None else [corrections.corrected(row) for row in rows]
