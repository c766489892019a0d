"""What a run adds to a label table: what is there, what is to do, and what was done. Imports no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from models.errors import FailedWork, WrongUse
from pipeline.files.images import ERROR_CODES
from pipeline.files.records import now
from pipeline.files.storage import Storage
from pipeline.table.card import write_card
from pipeline.table.changed import find_changed
from pipeline.table.committed import (
    RELABELLED_DIR,
    Ids,
    Replaced,
    apply_relabelled,
    discard_leftovers,
    part_files,
    read_ids,
    settle,
)
from pipeline.table.labels import OK, Counts, iter_batches, summarise
from pipeline.table.record import TableRecord, find_table_record, write_table_record

LABELLING_CODES = ("label_failed", "crashed_worker")
"""Codes of images that were read, beside ``ERROR_CODES`` of those that were not."""


@dataclass(frozen=True)
class Table:
    """What the table holds when a run begins.

    Attributes:
        parts: ids by part.
        counts: of its rows; None if the recorded ones are of another state of the table.
    """

    parts: dict[str, Ids] = field(default_factory=dict)
    counts: Counts | None = field(default_factory=Counts)

    @property
    def ids(self) -> Ids:
        """Ids of all rows."""
        return np.concatenate([np.empty(0, np.int64), *self.parts.values()])


def open_table(
    storage: Storage, recorded: TableRecord, fence: Callable[[], None], say: Callable[[str], None]
) -> Table:
    """Finish what a killed run began, set aside what is damaged, and read what is there."""
    discarded = discard_leftovers(storage)
    if discarded:
        say(f"Resuming an interrupted run: {discarded} half-written part(s) discarded.")
    parts = settle(storage, notice=say)
    replaced = apply_relabelled(storage, parts, fence=fence)
    if len(replaced.ids):
        say(f"Resuming an interrupted run: {len(replaced.ids):,} rows replaced that it had labelled again.")
        parts = settle(storage)
    counts = Counts(recorded.counts)
    known = not len(replaced.ids) and counts.images == sum(map(len, parts.values()))
    return Table(parts, counts if known else None)


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Attributes:
        todo: manifest of the images to label.
        replacing: ids of those that have a row.
        nothing: what to say if there is nothing to do.
        lost: labelled images that could not be looked at, in words; empty if there are none.
    """

    todo: pa.Table
    replacing: Ids
    nothing: str
    lost: str = ""


def choose(
    manifest: pa.Table,
    storage: Storage,
    table: Table,
    *,
    retry_failed: tuple[str, ...] | None = None,
    changed: bool = False,
    progress: Callable[[int], None] = lambda _done: None,
) -> Work:
    """Choose the images to label: those without a row, and those that are asked for again.

    Args:
        manifest: all images.
        storage: the output.
        table: what it holds.
        retry_failed: take only images that failed, with one of these codes, or all if there is none.
        changed: take also images that have changed since they were labelled.
        progress: called with the number of images compared so far.

    Raises:
        MaskMillError: ``table_missing``, ``wrong_use`` for ``retry_failed`` without a table or with a code
            that nothing has.
    """
    again: list[Ids] = [np.empty(0, np.int64)]
    nothing = f"Nothing new: all {manifest.num_rows:,} images are labelled in {storage.uri}."
    if retry_failed is not None:
        again.append(_failed_ids(retry_failed, storage, table))
        nothing = f"Nothing to retry: no image failed{_with_codes(retry_failed)} in {storage.uri}."
    lost = ""
    if changed and table.parts:
        found, states = find_changed(storage, manifest, progress=progress)
        again.append(found)
        nothing += f" Of {states.total():,} labelled images none has changed."
        away = [f"{states[state]:,} are {state}" for state in ("gone", "unreadable") if states[state]]
        if away:
            lost = f"Of {states.total():,} labelled images {' and '.join(away)}: their rows stay."
    ids = manifest["id"].to_numpy()
    replacing = np.intersect1d(np.concatenate(again), ids)
    wanted = np.isin(ids, replacing)
    if retry_failed is None:
        wanted |= ~np.isin(ids, table.ids)
    return Work(manifest.filter(pa.array(wanted)), replacing, nothing, lost)


def _failed_ids(codes: tuple[str, ...], storage: Storage, table: Table) -> Ids:
    """Ids of the rows that failed with one of the codes, or at all."""
    if not table.parts:
        raise WrongUse(
            "table_missing",
            f"There is no label table in {storage.uri}, so no image has failed.",
            "Leave --retry-failed out, or name the --output of an earlier run.",
        )
    seen: Counter[str] = Counter()
    found = [np.empty(0, np.int64)]
    for batch in iter_batches(storage, ["id", "status"], batch_size=65_536):
        status = batch.column("status").to_pylist()
        seen.update(status)
        chosen = [code in codes if codes else code != OK for code in status]
        found.append(batch.column("id").to_numpy()[chosen])
    known = {*seen, *ERROR_CODES, *LABELLING_CODES}
    unknown = [code for code in codes if code not in known]
    if unknown:
        there = ", ".join(f"{code} ({number:,})" for code, number in seen.most_common() if code != OK)
        raise WrongUse(
            "wrong_use",
            f"No image failed with {', '.join(unknown)}.",
            f"Codes in the table: {there or 'none, all images are labelled'}.",
        )
    return np.concatenate(found)


def _with_codes(codes: tuple[str, ...]) -> str:
    return f" with {', '.join(codes)}" if codes else ""


def unfinished(manifest: pa.Table, storage: Storage, table: Table) -> pa.Table:
    """The images that this run has not labelled yet."""
    new = [part for part in part_files(storage) if part not in table.parts]
    done = read_ids(storage, [*new, *part_files(storage, RELABELLED_DIR)])
    return manifest.filter(pa.array(~np.isin(manifest["id"].to_numpy(), done)))


def commit(
    storage: Storage,
    todo: pa.Table,
    table: Table,
    fence: Callable[[], None],
    say: Callable[[str], None],
) -> tuple[Counts, Replaced]:
    """Replace old rows, and count on disk what this run added: workers report some rows twice if one dies.

    Raises:
        MaskMillError: ``labelling_failed`` if an image has no row: a retried task may fail on different
            images than the first try.
    """
    new = settle(storage, [part for part in part_files(storage) if part not in table.parts], notice=say)
    replaced = apply_relabelled(storage, table.parts, fence=fence)
    done = np.concatenate([replaced.ids, *new.values()])
    missing = np.count_nonzero(~np.isin(todo["id"].to_numpy(), done))
    if missing:
        raise FailedWork(
            "labelling_failed",
            f"{missing:,} images have no row, because Ray ran some work twice with different results.",
            "Run the same command again: it labels them.",
        )
    return Counts(summarise(storage, list(new))), replaced


def record_counts(storage: Storage, table: Table, fresh: Counts, replaced: Replaced) -> TableRecord:
    """Add the counts of this run to those of the table, which is read only if they are unknown.

    Also writes the table's card.
    """
    record = find_table_record(storage)
    assert record is not None
    counts = table.counts
    if counts is not None:
        counts.add(replaced.removed, -1)
        counts.add(replaced.added)
        counts.add(fresh)
    known = summarise(storage) if counts is None else counts.to_dict()
    record = record.model_copy(update={"counts": known, "updated": now()})
    write_table_record(storage, record)
    write_card(storage, record.ontology)
    return record
