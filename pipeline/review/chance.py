"""Which of the images that people have reviewed were drawn by chance, so that they speak for the table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.files.storage import open_storage
from pipeline.review.queue import find_queue
from pipeline.table.corrections import open_corrections
from pipeline.table.record import find_table_record


@dataclass(frozen=True, eq=False)
class ReviewedByChance:
    """What people say of images that were drawn by chance.

    Attributes:
        ids: of images whose labels they accepted or painted, int64, sorted.
        rejected: how many they rejected, so that what is right there is not known.
        chosen: how many others they reviewed: those were chosen for being doubtful.
    """

    ids: npt.NDArray[np.int64]
    rejected: int
    chosen: int


def reviewed_by_chance(table: str, place: str) -> ReviewedByChance | None:
    """Look for corrections of images that were drawn by chance.

    Args:
        table: the label table, with the queue of its review beside it.
        place: what may be a table of corrections by people.

    Returns:
        None if it is no such table.

    Raises:
        MaskMillError: ``wrong_use`` if there is no queue, which says what was drawn by chance;
            ``queue_damaged``; as ``pipeline.table.corrections.open_corrections``.
    """
    storage = open_storage(place)
    record = find_table_record(storage)
    if record is None or record.source != "human":
        return None
    queue = find_queue(table)
    if queue is None or queue.corrections != storage.uri:
        raise WrongUse(
            "wrong_use",
            f"No queue beside {table} says which images of {storage.uri} were drawn by chance.",
            "Doubtful images say little of the others. Draw some: maskmill review TABLE --random 50.",
        )
    drawn = [
        entry.id
        for entry in queue.entries
        if not entry.known and any(reason.kind == "random" for reason in entry.reasons)
    ]
    found = open_corrections(table, place)
    if found is None:
        return ReviewedByChance(np.empty(0, np.int64), 0, 0)
    ids = np.intersect1d(found.ids, np.array(drawn, np.int64))
    rejected = np.intersect1d(ids, found.rejected)
    return ReviewedByChance(np.setdiff1d(ids, rejected), len(rejected), len(found.ids) - len(ids))
