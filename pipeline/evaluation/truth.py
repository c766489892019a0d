"""Truth for some images of a table: another label table, or a folder of masks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, cast
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.masks import read_mask
from pipeline.ontology.ontology import Ontology
from pipeline.table.corrections import class_lookup
from pipeline.table.labels import OK, decode_mask, iter_batches, table_files
from pipeline.table.record import find_table_record
from pipeline.table.rows import Place, read_row
from pipeline.table.statistics import Labels

_ROWS = 65_536


@dataclass(frozen=True)
class Truth:
    """Truth by id of the table's rows.

    Attributes:
        folder: of its files.
        places: of rows of a label table, or names of masks.
        lookup: id of the table by id of the truth; None if they are the same.
        num_classes: of the table.
        ignore_index: of the table.
    """

    folder: Storage
    places: Mapping[int, Place | str]
    lookup: npt.NDArray[Any] | None
    num_classes: int
    ignore_index: int

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Rows whose truth is known, sorted."""
        return np.array(sorted(self.places), np.int64)

    def only(self, ids: npt.NDArray[np.int64]) -> Truth:
        """That of some of the images."""
        return dataclasses.replace(
            self, places={number: self.places[number] for number in ids.tolist() if number in self.places}
        )

    def read(self, row_id: int) -> Labels:
        """The truth of an image, (H, W), in ids of the table.

        Raises:
            MaskMillError: ``table_damaged``, ``mask_invalid``.
        """
        place = self.places[row_id]
        if isinstance(place, Place):
            labels = decode_mask(read_row(self.folder, place, ["mask"])["mask"]["bytes"])
            return labels if self.lookup is None else cast(Labels, self.lookup[labels])
        labels = cast(Labels, read_mask(self.folder.uri_of(place)))
        strange = labels[(labels >= self.num_classes) & (labels != self.ignore_index)]
        if strange.size:
            raise WrongUse(
                "mask_invalid",
                f"{self.folder.uri_of(place)} has {int(strange[0])}, which is no class of the table.",
                "Values are class ids of the table, or its ignore index.",
            )
        return labels


def find_truth(place: str, table: Storage, ontology: Ontology) -> Truth:
    """The truth of some rows of a table: rows of the same image or the same file name, if one has it alone.

    Args:
        place: a label table, or a folder of PNG masks with the names of the images.
        table: whose rows are looked for.
        ontology: its classes.

    Raises:
        MaskMillError: ``image_invalid`` if there is none; ``wrong_use`` for labels of a model;
            ``classes_differ``; ``table_damaged``.
    """
    storage = open_storage(place)
    record = find_table_record(storage)
    by_id: dict[int, Place | str] = {}
    by_stem: dict[str, Place | str | None] = {}
    folder, lookup = storage, None
    if record is not None:
        if record.source == "pseudo":
            raise WrongUse(
                "wrong_use",
                f"{storage.uri} holds labels of a model, which are no truth.",
                "Give true labels: the --output of maskmill import, or a folder of masks.",
            )
        lookup = class_lookup(record.ontology, ontology, storage.uri, table.uri)
        folder, files = table_files(storage)
        for file in files:
            number = 0
            for batch in iter_batches(folder, ["id", "uri", "status"], batch_size=_ROWS, names=[file]):
                for row in batch.to_pylist():
                    if row["status"] == OK:
                        by_id[row["id"]] = Place(file, number)
                        stem = _stem(row["uri"])
                        by_stem[stem] = None if stem in by_stem else Place(file, number)
                    number += 1
    else:
        for name in storage.list(recursive=True):
            if name.lower().endswith(".png"):
                by_stem[_stem(name)] = None if _stem(name) in by_stem else name
    places: dict[int, Place | str] = {}
    taken: dict[str, int] = {}
    for batch in iter_batches(table, ["id", "uri", "status"], batch_size=_ROWS):
        for row in batch.to_pylist():
            if row["status"] != OK:
                continue
            stem = _stem(row["uri"])
            found = by_id.get(row["id"])
            if found is not None:
                places[row["id"]] = found
            elif by_stem.get(stem) is not None:  # None if several are called so
                if stem in taken:  # whose it is, nobody knows
                    places.pop(taken[stem], None)
                else:
                    taken[stem], places[row["id"]] = row["id"], cast(Any, by_stem[stem])
    if not places:
        raise WrongUse(
            "image_invalid",
            f"None of the images of {table.uri} has its truth in {storage.uri}.",
            "Give a label table with true labels of some of these images, or PNG masks with their names.",
        )
    return Truth(folder, places, lookup, ontology.num_classes, ontology.ignore_index)


def _stem(uri: str) -> str:
    return PurePosixPath(unquote(uri)).stem
