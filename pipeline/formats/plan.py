"""What is to do: the parts of an export, each of which a worker writes and marks as finished."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, TypeAdapter

from models.errors import WrongUse
from pipeline.files.fetch import file_version
from pipeline.files.storage import Storage
from pipeline.formats.marks import OWN_DIR, Mark, ahead, is_whole, marked_parts, read_kept, read_mark
from pipeline.formats.names import NamesSeen, Naming
from pipeline.formats.record import Export, find_export
from pipeline.table.labels import iter_batches, refuse_doubled, table_files

PLAN_FILE: Final = f"{OWN_DIR}/plan.json"
ROWS_A_PART: Final = 256
"""Rows of a part at least, if the table has many: a part costs a task of Ray, a mark, and milliseconds for
making sure of it on the disk. What a kill makes again is a part a worker."""
PARTS_AT_LEAST: Final = 64
"""Parts of a table with fewer rows, for workers to share."""


class PlannedFile(BaseModel):
    """A file of the table in ``plan.json``; see ``Part``.

    Attributes:
        file: its name, relative to the table.
        generation: see ``Part``.
        part: the name of its part; None in exports of older versions: its number in the plan.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    generation: NonNegativeInt
    part: str | None = None


class PlanFile(BaseModel):
    """What ``plan.json`` says: the common folder of the images, and the files of the table in order."""

    model_config = ConfigDict(frozen=True)

    root: tuple[str, ...] | None = None
    parts: tuple[PlannedFile, ...] = ()


@dataclass(frozen=True)
class TableFile:
    """A file of the table.

    Attributes:
        name: relative to the table.
        rows: how many it has.
        version: what tells it from a later file of its name.
    """

    name: str
    rows: int
    version: str


@dataclass(frozen=True)
class Part:
    """Files of the table that follow each other, and are exported together.

    Attributes:
        files: at least one.
        generation: 0 if the export began with them, else the number of the run that found them new.
        first: number of the first row.
    """

    files: tuple[TableFile, ...]
    generation: int
    first: int

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    @property
    def version(self) -> str:
        """What tells the files from later ones of their names."""
        if len(self.files) == 1:
            return self.files[0].version
        names = "\0".join(f"{file.name}\0{file.version}" for file in self.files)
        return blake2b(names.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Plan:
    """What an export consists of.

    Attributes:
        parts: by name, in the order of the export.
        namings: of the images, by generation.
        table: the folder that has the files.
        done: names of the parts that are finished.
    """

    parts: dict[str, Part]
    namings: tuple[Naming, ...]
    table: Storage
    done: frozenset[str] = frozenset()

    @property
    def todo(self) -> list[str]:
        """Names of the parts to do."""
        return [name for name in self.parts if name not in self.done]

    @property
    def rows(self) -> int:
        """Rows of all parts."""
        return sum(part.rows for part in self.parts.values())


def make_plan(export: Export, *, progress: Callable[[int, int], None] = lambda _done, _total: None) -> Plan:
    """Look through the table once, and find what is to do. Call only while holding the lease.

    Args:
        export: what is asked for.
        progress: called with the number of files looked at, and of all.

    Raises:
        MaskMillError: ``input_missing`` for a table without rows; ``table_damaged``; ``output_differs`` if
            the table has lost files that were exported.
    """
    folder, files = table_files(export.source.table)
    if not files:
        raise WrongUse(
            "input_missing",
            f"{export.source.table.uri} has no rows.",
            "Label images first, or give the --output of maskmill label.",
        )
    before = read_kept(export.output, PLAN_FILE, TypeAdapter(PlanFile), PlanFile())
    known = {entry.file: entry.generation for entry in before.parts}
    gone = [file for file in known if file not in files]
    if gone:
        raise WrongUse(
            "output_differs",
            f"{len(gone):,} files of the table that {export.output.uri} was made from are gone: {gone[0]}, …",
            "Export it anew with --overwrite.",
        )
    newest = 1 + max(known.values(), default=-1)
    order = [*known, *(file for file in files if file not in known)]
    seen, ids, found = NamesSeen(before.root), [], []
    for file, (file_ids, uris, version) in zip(order, _looked_at(folder, order), strict=True):
        seen.add(known.get(file, newest), uris)
        ids.append(file_ids)
        found.append(TableFile(file, len(file_ids), version))
        progress(len(found), len(order))
    refuse_doubled(np.concatenate(ids), folder)
    names = [entry.part or _name(number) for number, entry in enumerate(before.parts)]
    names += _new_parts(len(known), [file.rows for file in found[len(known) :]])
    parts: dict[str, Part] = {}
    first = 0
    for name, of_table in zip(names, found, strict=True):
        part = parts.get(name) or Part((), known.get(of_table.name, newest), first)
        parts[name] = replace(part, files=(*part.files, of_table))
        first += of_table.rows
    namings = tuple(seen.namings())
    plan = Plan(parts, namings, folder)
    export.output.write_json(
        PLAN_FILE,
        {
            "root": list(namings[0].root),
            "parts": [
                {"file": file.name, "generation": part.generation, "part": name}
                for name, part in parts.items()
                for file in part.files
            ],
        },
    )
    return replace(plan, done=frozenset(_finished(export.output, plan)))


def _name(number: int) -> str:
    return f"{number:05d}"


def _new_parts(start: int, rows: Sequence[int]) -> Iterator[str]:
    """The part of each new file: it is called by the number of its first file.

    Args:
        start: number of the first new file.
        rows: of the files.
    """
    enough = min(ROWS_A_PART, sum(rows) // PARTS_AT_LEAST)
    name, held = "", enough
    for number, count in enumerate(rows, start):
        if held >= enough:
            name, held = _name(number), 0
        yield name
        held += count


def _looked_at(folder: Storage, files: Sequence[str]) -> Iterator[tuple[Any, list[str], str]]:
    """Ids, addresses and version of each file."""

    def look(file: str) -> tuple[Any, list[str], str]:
        version = file_version(folder.uri_of(file)) or ""
        batches = list(iter_batches(folder, ["id", "uri"], batch_size=65_536, names=[file]))
        ids = [batch.column("id").to_numpy() for batch in batches]
        uris = [uri for batch in batches for uri in batch.column("uri").to_pylist()]
        return np.concatenate([np.empty(0, np.int64), *ids]), uris, version

    return ahead(look, files)


def _finished(output: Storage, plan: Plan) -> Iterator[str]:
    """Names of the parts whose mark is there and of the present files, and all of whose images were found.

    After a run that did not come to its end, their small files are read: the machine may have lost them.
    """
    record = find_export(output)
    sure = not output.is_local or (record is not None and record.complete)

    def look(name: str) -> tuple[Mark, bool]:
        mark, _ = read_mark(output, name)
        return mark, sure or is_whole(output, mark)

    names = [name for name in marked_parts(output) if name in plan.parts]
    for name, (head, whole) in zip(names, ahead(look, names), strict=True):
        part = plan.parts[name]
        same = (head.file, head.version) == (part.files[0].name, part.version)
        if same and whole and not any(row.again for row in head.left_out):
            yield name
