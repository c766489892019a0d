"""What a run adds to a label table: what is there, what is to do, and what was done. Imports no Ray."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from models.errors import FailedWork, WrongUse
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.spill import Span
from pipeline.files.images import ERROR_CODES
from pipeline.files.records import now
from pipeline.files.storage import Storage
from pipeline.table.card import write_card
from pipeline.table.changed import find_changed
from pipeline.table.committed import (
    RELABELLED_DIR,
    Replaced,
    apply_relabelled,
    count_parts,
    discard_leftovers,
    keep_rows,
    part_files,
    read_ids,
    settle,
    settle_index,
)
from pipeline.table.index import Ids, PartIndex
from pipeline.table.labels import OK, Counts, iter_batches, summarise
from pipeline.table.record import TableRecord, find_table_record, write_table_record

LABELLING_CODES = ("label_failed", "crashed_worker")
"""Codes of images that were read, beside ``ERROR_CODES`` of those that were not."""


@dataclass
class Table:
    """What the table holds when a run begins.

    Attributes:
        index: which part has which id.
        counts: of its rows; None if the recorded ones are of another state of the table.
    """

    index: PartIndex = field(default_factory=PartIndex)
    counts: Counts | None = field(default_factory=Counts)


def open_table(
    storage: Storage, recorded: TableRecord, fence: Callable[[], None], say: Callable[[str], None]
) -> Table:
    """Finish what a killed run began, set aside what is damaged, and read what is there."""
    discarded = discard_leftovers(storage)
    if discarded:
        say(f"Resuming an interrupted run: {discarded} half-written part(s) discarded.")
    index = settle_index(storage, notice=say)
    replaced = apply_relabelled(storage, index, fence=fence)
    if len(replaced.ids):
        say(f"Resuming an interrupted run: {len(replaced.ids):,} rows replaced that it had labelled again.")
        index = settle_index(storage)
    counts = Counts(recorded.counts)
    known = not len(replaced.ids) and counts.images == index.rows
    return Table(index, counts if known else None)


@dataclass(frozen=True)
class Work:
    """Images that a run labels, all or those of a round.

    Attributes:
        todo: their manifest.
        replacing: ids of those that have a row.
    """

    todo: pa.Table
    replacing: Ids


class Choice:
    """The images of a corpus that a run labels.

    Attributes:
        count: their number.
        again: number of those that have a row.
        nothing: what to say if there is nothing to do.
        lost: labelled images that could not be looked at, in words; empty if there are none.
    """

    def __init__(
        self, corpus: Corpus, index: PartIndex, again: Ids, *, new: bool, nothing: str, lost: str = ""
    ) -> None:
        self.nothing, self.lost = nothing, lost
        self._corpus, self._index, self._again, self._new = corpus, index, again, new
        self.count = self.again = 0
        for span, rows in zip(corpus.partitions, corpus, strict=True):
            wanted, replacing = self._wanted(span, rows)
            self.count += int(np.count_nonzero(wanted))
            self.again += len(replacing)

    def _wanted(self, span: Span, rows: pa.Table) -> tuple[npt.NDArray[np.bool_], Ids]:
        ids = rows["id"].to_numpy()
        replacing: Ids = np.intersect1d(self._again, ids)
        wanted = np.isin(ids, replacing)
        if self._new:
            wanted |= ~self._index.has(ids, span)
        return wanted, replacing

    def rounds(self, size: int) -> Iterator[Work]:
        """Yield the chosen images in order, in pieces of at least ``size`` except for the last."""
        waiting = 0
        todo: list[pa.Table] = []
        replacing: list[Ids] = []
        for span, rows in zip(self._corpus.partitions, self._corpus, strict=True):
            wanted, old = self._wanted(span, rows)
            chosen = rows.filter(pa.array(wanted))
            if not chosen.num_rows:
                continue
            todo.append(chosen)
            replacing.append(old)
            waiting += chosen.num_rows
            if waiting >= size:
                yield Work(pa.concat_tables(todo, promote_options="default"), np.concatenate(replacing))
                todo, replacing, waiting = [], [], 0
        if todo:
            yield Work(pa.concat_tables(todo, promote_options="default"), np.concatenate(replacing))


def choose(
    corpus: Corpus,
    storage: Storage,
    table: Table,
    *,
    retry_failed: tuple[str, ...] | None = None,
    changed: bool = False,
    progress: Callable[[int], None] = lambda _done: None,
) -> Choice:
    """Choose the images to label: those without a row, and those that are asked for again.

    Args:
        corpus: all images.
        storage: the output.
        table: what it holds.
        retry_failed: take only images that failed, with one of these codes, or all if there is none.
        changed: take also images that have changed since they were labelled.
        progress: called with the number of images compared so far.

    Raises:
        MaskMillError: ``input_missing``, ``wrong_use`` for ``retry_failed`` without a table or with a code
            that nothing has.
    """
    again: list[Ids] = [np.empty(0, np.int64)]
    nothing = f"Nothing new: all {corpus.num_rows:,} images are labelled in {storage.uri}."
    if retry_failed is not None:
        again.append(failed_ids(retry_failed, storage, table))
        nothing = nothing_failed(retry_failed, storage)
    lost = ""
    if changed and table.index:
        found, states = find_changed(storage, corpus, progress=progress)
        again.append(found)
        nothing += f" Of {states.total():,} labelled images none has changed."
        away = [f"{states[state]:,} are {state}" for state in ("gone", "unreadable") if states[state]]
        if away:
            lost = f"Of {states.total():,} labelled images {' and '.join(away)}: their rows stay."
    return Choice(
        corpus,
        table.index,
        np.unique(np.concatenate(again)),
        new=retry_failed is None,
        nothing=nothing,
        lost=lost,
    )


def failed_ids(
    codes: tuple[str, ...], storage: Storage, table: Table, *, possible: Sequence[str] = LABELLING_CODES
) -> Ids:
    """Ids of the rows that failed with one of the codes, or at all if there is none.

    Args:
        codes: statuses of rows.
        storage: the output.
        table: what it holds.
        possible: codes that a row may have beside ``ERROR_CODES``.

    Raises:
        MaskMillError: ``input_missing``; ``wrong_use`` for a code that is not possible and no row has.
    """
    if not table.index:
        raise no_table(storage)
    seen: Counter[str] = Counter()
    found = [np.empty(0, np.int64)]
    for batch in iter_batches(storage, ["id", "status"], batch_size=65_536):
        status = batch.column("status").to_pylist()
        seen.update(status)
        chosen = [code in codes if codes else code != OK for code in status]
        found.append(batch.column("id").to_numpy()[chosen])
    known = {*seen, *ERROR_CODES, *possible}
    unknown = [code for code in codes if code not in known]
    if unknown:
        there = ", ".join(f"{code} ({number:,})" for code, number in seen.most_common() if code != OK)
        raise WrongUse(
            "wrong_use",
            f"No image failed with {', '.join(unknown)}.",
            f"Codes in the table: {there or 'none, all images are labelled'}.",
        )
    return np.concatenate(found)


def no_table(storage: Storage) -> WrongUse:
    """The error of ``--retry-failed`` where nothing has failed yet."""
    return WrongUse(
        "input_missing",
        f"There is no label table in {storage.uri}, so no image has failed.",
        "Leave --retry-failed out, or name the --output of an earlier run.",
    )


def nothing_failed(codes: tuple[str, ...], storage: Storage) -> str:
    """What to say if no row failed with one of the codes, or at all."""
    with_codes = f" with {', '.join(codes)}" if codes else ""
    return f"Nothing to retry: no image failed{with_codes} in {storage.uri}."


def unfinished(manifest: pa.Table, storage: Storage, table: Table) -> pa.Table:
    """The images that this run has not labelled yet."""
    new = [part for part in part_files(storage) if part not in table.index]
    done = read_ids(storage, [*new, *part_files(storage, RELABELLED_DIR)])
    return manifest.filter(pa.array(~np.isin(manifest["id"].to_numpy(), done)))


def commit(
    storage: Storage,
    todo: pa.Table,
    table: Table,
    fence: Callable[[], None],
    say: Callable[[str], None],
) -> tuple[Counts, Replaced]:
    """Replace old rows, and count on disk what a round added: workers report some rows twice if one dies.

    Raises:
        MaskMillError: ``labelling_failed`` if an image has no row: a retried task may fail on different
            images than the first try.
    """
    index, wanted = table.index, todo["id"].to_numpy()
    new = settle(storage, [part for part in part_files(storage) if part not in index], notice=say)
    # A lost node may have written late: rows that others wrote again, and a previous round has committed.
    strangers = {part: ids[~np.isin(ids, wanted)] for part, ids in new.items()}
    known = index.where(np.concatenate([np.empty(0, np.int64), *strangers.values()]))
    again = np.concatenate([np.empty(0, np.int64), *known.values()])
    for part in [part for part, ids in strangers.items() if np.isin(ids, again).any()]:
        ids = new.pop(part)
        kept = ids[~np.isin(ids, again)]
        say(f"{part} repeated {len(ids) - len(kept):,} rows of other files: taken out.")
        replaced_by = keep_rows(storage, part, kept)
        if replaced_by is not None:
            new[replaced_by] = kept
    replaced = apply_relabelled(storage, index, fence=fence)
    done = np.concatenate([replaced.ids, *new.values()])
    missing = np.count_nonzero(~np.isin(wanted, done))
    if missing:
        raise FailedWork(
            "labelling_failed",
            f"{missing:,} images have no row, because Ray ran some work twice with different results.",
            "Run the same command again: it labels them.",
        )
    for part, ids in new.items():
        index.add(part, ids)
    return count_parts(storage, list(new)), replaced


def record_counts(storage: Storage, table: Table, fresh: Counts, replaced: Replaced) -> TableRecord:
    """Add the counts of a round to those of the table, which is read only if they are unknown.

    Also writes the table's card.
    """
    record = find_table_record(storage)
    assert record is not None
    if table.counts is None:
        table.counts = Counts(summarise(storage))
    else:
        table.counts.add(replaced.removed, -1)
        table.counts.add(replaced.added)
        table.counts.add(fresh)
    record = record.model_copy(update={"counts": table.counts.to_dict(), "updated": now()})
    write_table_record(storage, record)
    write_card(storage, record.ontology)
    return record
