"""Corrections that come back from other programs: Label Studio, CVAT, or any format that is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, cast
from urllib.parse import unquote

import numpy as np

from models.errors import MaskMillError, WrongUse
from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import Storage
from pipeline.formats.base import Imported, ReadSample, Sample
from pipeline.review.saving import Decision, Saves
from pipeline.table.corrections import class_lookup
from pipeline.table.labels import OK, decode_mask, iter_batches, table_files
from pipeline.table.record import TableRecord
from pipeline.table.rows import find_rows, read_row
from pipeline.table.statistics import Labels

_ROWS = 65_536
_COLUMNS = ("id", "uri", "sha256", "status", "height", "width", "mask", "version")
UNKNOWN: Final = "of an image that the table does not have"
AMBIGUOUS: Final = "of a file name that several images of the table have"


@dataclass
class Returned:
    """What came back.

    Attributes:
        decisions: how many images were accepted as they were labelled, and how many painted.
        replaced: corrections that were there and are replaced; paintings among them are set aside.
        same: corrections that were there already, and say the same.
        left_out: what was not taken, by reason.
        absent: classes of the other program that the table does not have; their pixels are ignored.
    """

    decisions: Counter[str] = field(default_factory=Counter)
    replaced: int = 0
    same: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    absent: tuple[str, ...] = ()


def take_back(
    imported: Imported,
    table: Storage,
    record: TableRecord,
    saves: Saves,
    *,
    reviewer: str,
    progress: Callable[[int], None] = lambda _done: None,
) -> Returned:
    """Save what came back as corrections of a table; doing it again changes nothing.

    Images are matched by their address, else by file name.

    Args:
        imported: what was read.
        table: the corrected table.
        record: its record.
        saves: where to.
        reviewer: who has corrected.
        progress: called with the number of images done.

    Raises:
        MaskMillError: ``classes_differ`` if no class is one of the table's; what reading raises.
    """
    lookup = class_lookup(
        imported.ontology, record.ontology, "what comes back", table.uri, "Give a dataset with its classes."
    )
    known = {name.casefold() for name in record.ontology.names}
    done = Returned(absent=tuple(name for name in imported.ontology.names if name.casefold() not in known))
    by_stem: dict[str, int | None] = {}
    ids: set[int] = set()
    for batch in iter_batches(table, ["id", "uri", "status"], batch_size=_ROWS):
        for row in batch.to_pylist():
            if row["status"] == OK:
                ids.add(row["id"])
                stem = _stem(row["uri"])
                by_stem[stem] = None if stem in by_stem else row["id"]
    folder = table_files(table)[0]
    places = find_rows(table, ids)
    for number, sample in enumerate(imported.samples, 1):
        progress(number)
        row_id: int | None = stable_id(sample.uri)
        if row_id not in ids:
            stem = _stem(sample.uri)
            row_id = by_stem.get(stem)
            if row_id is None:
                done.left_out[AMBIGUOUS if stem in by_stem else UNKNOWN] += 1
                continue
        assert row_id is not None
        _take(sample, read_row(folder, places[row_id], _COLUMNS), lookup, record, saves, reviewer, done)
    return done


def _take(
    sample: Sample | ReadSample,
    row: dict[str, Any],
    lookup: np.ndarray | None,
    record: TableRecord,
    saves: Saves,
    reviewer: str,
    done: Returned,
) -> None:
    try:
        labels = sample.labels if lookup is None else lookup[sample.labels]
    except MaskMillError as error:
        if error.code not in ("dataset_invalid", "mask_invalid"):
            raise
        done.left_out["whose mask cannot be read"] += 1
        return
    if labels.shape != (row["height"], row["width"]):
        done.left_out["of another size than its image"] += 1
        return
    corrected = cast(Labels, labels.astype(record.ontology.mask_dtype))
    same = np.array_equal(corrected, decode_mask(row["mask"]["bytes"]))
    decision: Decision = "accepted" if same else "painted"
    there = saves.read(row["id"])
    saved = saves.save(
        row,
        decision,
        corrected,
        reviewer=reviewer,
        follows=None if there is None else there.tag,
        ignore_index=record.ontology.ignore_index,
    )
    done.decisions[decision] += 1
    if there is not None:
        done.same += saved.tag == there.tag
        done.replaced += saved.tag != there.tag


def _stem(uri: str) -> str:
    return unquote(uri).rstrip("/").rpartition("/")[2].rpartition("#")[2].rpartition(".")[0]


def refuse_pseudo(record: TableRecord, table: Storage) -> None:
    """Refuse to correct a table that is no model's.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    if record.source != "pseudo":
        raise WrongUse(
            "wrong_use",
            f"{table.uri} holds labels that are believed already.",
            "Name the table of a model's labels: --corrects.",
        )
