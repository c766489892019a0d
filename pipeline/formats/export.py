"""Exports of label tables: any format, in parts, on any number of workers, streaming and resumable.

An export is a folder with the files of its format and two things of its own:

    export.json              what it is: table, format, options, classes, counts, what the format lost
    left_out.csv             the images that are not in it, and why; only if there are any
    .maskmill/plan.json      the files of the table, in the order of the export, and their parts
    .maskmill/parts/*.jsonl  for each finished part: its counts, then an entry for each image

A part is some files of the table. Its entries are put in place after all else that belongs to it, so that
they mark it as finished. A run does the parts that have no mark, or one of whose files has changed since, and
then ``finish`` writes what names all images from the entries. Done again, all of this gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from pipeline.files.storage import Storage
from pipeline.formats.base import Entry
from pipeline.formats.marks import (
    NAMES,
    OWN_DIR,
    ahead,
    delete_mark,
    files_of,
    marked_parts,
    read_kept,
    read_mark,
)
from pipeline.formats.outbox import Outbox, Writes
from pipeline.formats.parts import PartCounts
from pipeline.formats.plan import PLAN_FILE, Plan
from pipeline.formats.record import EXPORT_FILE, Export, ExportRecord, write_record

LEFT_OUT_FILE: Final = "left_out.csv"

_FINISHED = f"{OWN_DIR}/finished.json"


def discard_leftovers(output: Storage) -> None:
    """Delete the files that a killed run left half-written. Call only while holding the lease."""
    if output.is_local:  # objects appear whole
        for path in Path(output.path()).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


def finish(export: Export, plan: Plan, *, fence: Callable[[], None] = lambda: None) -> ExportRecord:
    """Write what names all images, and the record. All parts must be finished; call while holding the lease.

    Raises:
        MaskMillError: ``file_damaged``; what the storage says.
    """
    counts = PartCounts()
    output = export.output
    unsynced = False
    before = {*read_kept(output, _FINISHED, NAMES, ())}

    def entries() -> Iterator[Entry]:
        nonlocal unsynced
        for head, lines in ahead(lambda name: read_mark(output, name), list(plan.parts)):
            counts.images.update(head.images)
            counts.left_out.update(row.reason for row in head.left_out)
            counts.lost.add(head.lost)
            unsynced = unsynced or any(one is not None for one in head.sums)
            yield from map(json.loads, lines)

    fence()
    with Writes(output, sync=True) as writes:
        outbox = Outbox.of(output, writes)
        rest = entries()
        files = export.format.finish(rest, export.ontology, outbox)
        for _ in rest:  # a format may need no entries
            pass
        if counts.left_out:
            with outbox.new_file(LEFT_OUT_FILE) as file:
                _write_left_out(file, output, plan)
    fence()
    for name in before - set(writes.names):
        output.delete(name)
    output.write_json(_FINISHED, sorted(set(writes.names)))
    record = export.record.model_copy(
        update={
            "complete": True,
            "files": tuple(files),
            "images": dict(sorted(counts.images.items())),
            "left_out": dict(sorted(counts.left_out.items())),
            "lost": asdict(counts.lost),
        }
    )
    if unsynced and output.is_local:
        os.sync()  # once, instead of a moment for each file; until then, a run that resumes checks them
    write_record(output, record)
    return record


def _write_left_out(file: Any, output: Storage, plan: Plan) -> None:
    columns = ("id", "uri", "reason", "text")
    rows = itertools.chain.from_iterable(
        head.left_out for head in ahead(lambda name: read_mark(output, name)[0], list(plan.parts))
    )
    for values in itertools.chain([columns], ([getattr(row, column) for column in columns] for row in rows)):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(values)
        file.write(text.getvalue().encode())


def delete_export(output: Storage, *, fence: Callable[[], None] = lambda: None) -> None:
    """Delete the files of an export, and nothing else. Call only while holding the lease."""
    finished = read_kept(output, _FINISHED, NAMES, ())
    folders: set[str] = set()
    for name in marked_parts(output):
        fence()
        files = files_of(output, name)
        for _ in ahead(output.delete, files):
            pass
        folders.update(file.rpartition("/")[0] for file in files)
        delete_mark(output, name)
    for file in finished:
        output.delete(file)
        folders.add(file.rpartition("/")[0])
    if output.is_local:
        _remove_empty(Path(output.path()), folders)
    for file in (_FINISHED, PLAN_FILE, EXPORT_FILE):
        output.delete(file)


def _remove_empty(root: Path, folders: set[str]) -> None:
    """Remove folders, and those above them, if nothing is left in them."""
    above = {str(path) for folder in folders for path in (Path(folder), *Path(folder).parents)} - {".", ""}
    for folder in sorted(above, key=lambda path: -path.count("/")):
        try:
            (root / folder).rmdir()
        except OSError:  # there is something in it
            continue
