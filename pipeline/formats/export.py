"""Exports of label tables: any format, in parts, on any number of workers, streaming and resumable.

An export is a folder with the files of its format and two things of its own:

    export.json              what it is: table, format, options, classes, counts, what the format lost
    left_out.csv             the images that are not in it, and why; only if there are any
    .maskmill/plan.json      the files of the table, in the order of the export
    .maskmill/parts/*.jsonl  for each finished file: its counts, then an entry for each image

A file of the table is a part. Its entries are put in place after all else that belongs to it, so that they
mark it as finished. A run does the parts that have no mark, or whose file has changed since, and then
``finish`` writes what names all images from the entries. Done again, all of this
gives the same bytes.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from models.errors import Damaged, WrongUse
from pipeline.files.documents import first_problem
from pipeline.files.faults import explain
from pipeline.files.fetch import file_version
from pipeline.files.images import use_one_thread
from pipeline.files.records import parse_record, read_record
from pipeline.files.storage import Storage
from pipeline.formats.base import Entry, Format, Loss
from pipeline.formats.names import NamesSeen, Naming
from pipeline.formats.outbox import Outbox, Writes
from pipeline.formats.samples import LeftOut, Source, samples_of
from pipeline.ontology.ontology import Ontology, RecordedOntology
from pipeline.table.labels import iter_batches, refuse_doubled, table_files
from pipeline.table.record import TableRecord

EXPORT_FILE: Final = "export.json"
LEFT_OUT_FILE: Final = "left_out.csv"
OWN_DIR: Final = ".maskmill"
SCHEMA_VERSION: Final = 1

_PLAN = f"{OWN_DIR}/plan.json"
_FINISHED = f"{OWN_DIR}/finished.json"
_PARTS = f"{OWN_DIR}/parts"
_READERS = 16
_REMEDY = "Restore it, or name another --output."


# --- what is exported ---


class ExportRecord(BaseModel):
    """What ``export.json`` says.

    Attributes:
        schema_version: of the file.
        format: its name.
        options: of the format.
        table: ``uri`` of the table, and ``created``, ``recipe`` and ``weights`` (hashes), which tell it from
            others.
        source: "pseudo" for labels of a model, "truth" for those of people.
        view: of the table, as its file has it; None if the labels are as they were.
        with_images: whether images were copied.
        val_share: share of the images in the split "val".
        ontology: the classes of the export.
        complete: whether the last run came to its end; what follows is of that time.
        files: what a reader opens first.
        images: how many there are, by split.
        left_out: rows without an image in the export, by reason.
        lost: what the format could not carry.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    format: str
    options: dict[str, Any] = {}
    table: dict[str, str]
    source: str = "pseudo"
    view: dict[str, Any] | None = None
    with_images: bool = False
    val_share: float = 0.0
    ontology: RecordedOntology
    complete: bool = False
    files: tuple[str, ...] = ()
    images: dict[str, int] = {}
    left_out: dict[str, int] = {}
    lost: dict[str, int] = {}

    def differences(self, other: ExportRecord) -> list[str]:
        """Why images of the two do not belong together, in words."""
        found = [
            f"{words} {_short(getattr(other, name))}, not {_short(getattr(self, name))}"
            for name, words in (
                ("format", "it has the format"),
                ("options", "its options are"),
                ("view", "its view of the labels is"),
                ("with_images", "images are copied:"),
                ("val_share", "its share of val is"),
            )
            if getattr(self, name) != getattr(other, name)
        ]
        if any(self.table.get(key) != other.table.get(key) for key in ("created", "recipe", "weights")):
            found.append(f"it is of another table, {other.table.get('uri')}")
        elif self.ontology.hash != other.ontology.hash:
            found.append("its classes differ")
        return found


def _short(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict) else "none" if value is None else str(value)


@dataclass(frozen=True)
class Export:
    """An export that is asked for.

    Attributes:
        source: the table, and what is wanted of it.
        ontology: the classes of the samples.
        format: what writes it.
        output: where to.
        record: its ``export.json``, before anything was done.
    """

    source: Source
    ontology: Ontology
    format: Format
    output: Storage
    record: ExportRecord


def new_export(source: Source, table: TableRecord, made: Format, output: Storage) -> Export:
    """An export of a table.

    Args:
        source: the table, and what is wanted of it.
        table: its record.
        made: the format.
        output: where to.

    Raises:
        MaskMillError: ``wrong_use`` for more classes than the format has room for.
    """
    ontology = source.view.ontology if source.view is not None else table.ontology
    if ontology.num_classes > made.max_classes:
        raise WrongUse(
            "wrong_use",
            f"The format {made.name} holds {made.max_classes:,} classes, and the table has "
            f"{ontology.num_classes:,}.",
            "Take another format, or merge and drop classes.",
        )
    record = ExportRecord(
        format=made.name,
        options=TypeAdapter(type(made)).dump_python(made, mode="json"),
        table={
            "uri": source.table.uri,
            "created": table.created,
            "recipe": str(table.recipe.get("hash", "")),
            "weights": str(table.weights.get("fingerprint", "")),
        },
        source=table.source,
        view=source.view.view.to_dict() if source.view is not None else None,
        with_images=source.with_images,
        val_share=source.val_share,
        ontology=ontology,
    )
    return Export(source, ontology, made, output, record)


def find_export(output: Storage) -> ExportRecord | None:
    """The record of the export in a folder; None without an ``export.json``.

    Raises:
        MaskMillError: ``newer_version``, ``json_invalid``; ``export_damaged`` if it is no record.
    """
    found = read_record(output, EXPORT_FILE, SCHEMA_VERSION)
    if found is None:
        return None
    return parse_record(
        ExportRecord, found, output.uri_of(EXPORT_FILE), code="export_damaged", remedy=_REMEDY
    )


def check_output(export: Export, *, overwrite: bool) -> None:
    """Refuse an output that holds anything else than this export.

    Raises:
        MaskMillError: ``output_not_ours`` for files that are no export; ``output_differs`` for another
            export, unless it may be overwritten; as ``find_export``.
    """
    there = find_export(export.output)
    if there is None:
        if _holds_files(export.output):
            raise WrongUse(
                "output_not_ours",
                f"{export.output.uri} has files that are no export of maskmill.",
                "Name another --output.",
            )
        return
    differences = export.record.differences(there)
    if differences and not overwrite:
        raise WrongUse(
            "output_differs",
            f"{export.output.uri} holds another export: {'; '.join(differences)}.",
            "Name another --output, or replace the old export with --overwrite.",
        )


def _holds_files(output: Storage) -> bool:
    return any(not name.startswith(".") for name in output.glob("*"))


# --- what a run keeps beside the export ---


def _inside(name: str) -> str:
    """A relative name within the export: files are deleted by such names."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        raise ValueError("a name that is not inside the export")
    return name


Inside = Annotated[str, AfterValidator(_inside)]


class Mark(BaseModel):
    """First line of a finished part's entries.

    Attributes:
        file: of the table.
        version: what tells it from a later file of its name.
        images: by split.
        left_out: rows without an image.
        lost: by the format.
        files: what was written, relative to the export.
    """

    model_config = ConfigDict(frozen=True)

    file: str
    version: str
    images: dict[str, NonNegativeInt]
    left_out: tuple[LeftOut, ...]
    lost: Loss
    files: tuple[Inside, ...]


class PlannedFile(BaseModel):
    """A file of the table in ``plan.json``; see ``Part``."""

    model_config = ConfigDict(frozen=True)

    file: str
    generation: NonNegativeInt


class PlanFile(BaseModel):
    """What ``plan.json`` says: the common folder of the images, and the files of the table in order."""

    model_config = ConfigDict(frozen=True)

    root: tuple[str, ...] | None = None
    parts: tuple[PlannedFile, ...] = ()


_Read = TypeVar("_Read")
_NAMES: Final[TypeAdapter[tuple[str, ...]]] = TypeAdapter(tuple[Inside, ...])


def _read(output: Storage, file: str, kind: TypeAdapter[_Read], default: _Read) -> _Read:
    """What a run kept, or the default if there is nothing.

    Raises:
        MaskMillError: ``export_damaged``.
    """
    try:
        return kind.validate_json(output.read_bytes(file))
    except FileNotFoundError:
        return default
    except ValueError as error:
        raise _damaged(output, file, error) from None


def _damaged(output: Storage, file: str, error: ValueError) -> Damaged:
    why = first_problem(error) if isinstance(error, ValidationError) else str(error)
    return Damaged(
        "export_damaged",
        f"{output.uri_of(file)} is damaged: {why}.",
        "Delete it, and run the same command again; or name another --output.",
    )


# --- the plan ---


@dataclass(frozen=True)
class Part:
    """A file of the table.

    Attributes:
        file: its name, relative to the table.
        rows: how many it has.
        generation: 0 if the export began with it, else the number of the run that found it new.
        version: what tells it from a later file of its name.
        first: number of its first row.
    """

    file: str
    rows: int
    generation: int
    version: str
    first: int


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
        MaskMillError: ``table_missing`` for a table without rows; ``table_damaged``; ``output_differs`` if
            the table has lost files that were exported.
    """
    folder, files = table_files(export.source.table)
    if not files:
        raise WrongUse(
            "table_missing",
            f"{export.source.table.uri} has no rows.",
            "Label images first, or give the --output of maskmill label.",
        )
    before = _read(export.output, _PLAN, TypeAdapter(PlanFile), PlanFile())
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
    seen, ids, parts, first = NamesSeen(before.root), [], {}, 0
    for number, (file, (found, uris, version)) in enumerate(
        zip(order, _looked_at(folder, order), strict=True)
    ):
        generation = known.get(file, newest)
        seen.add(generation, uris)
        ids.append(found)
        parts[f"{number:05d}"] = Part(file, len(found), generation, version, first)
        first += len(found)
        progress(number + 1, len(order))
    refuse_doubled(np.concatenate(ids), folder)
    namings = tuple(seen.namings())
    plan = Plan(parts, namings, folder)
    export.output.write_json(
        _PLAN,
        {
            "root": list(namings[0].root),
            "parts": [{"file": part.file, "generation": part.generation} for part in parts.values()],
        },
    )
    return Plan(parts, namings, folder, frozenset(_finished(export.output, plan)))


def _looked_at(folder: Storage, files: Sequence[str]) -> Iterator[tuple[Any, list[str], str]]:
    """Ids, addresses and version of each file."""

    def look(file: str) -> tuple[Any, list[str], str]:
        version = file_version(folder.uri_of(file)) or ""
        batches = list(iter_batches(folder, ["id", "uri"], batch_size=65_536, names=[file]))
        ids = [batch.column("id").to_numpy() for batch in batches]
        uris = [uri for batch in batches for uri in batch.column("uri").to_pylist()]
        return np.concatenate([np.empty(0, np.int64), *ids]), uris, version

    return _ahead(look, files)


def _finished(output: Storage, plan: Plan) -> Iterator[str]:
    """Names of the parts whose mark is there and of the present file, and all of whose images were found."""
    marked = [name.rpartition("/")[2].removesuffix(".jsonl") for name in output.list(_PARTS)]
    names = [name for name in marked if name in plan.parts]
    for name, head in zip(names, _ahead(lambda name: _mark(output, name)[0], names), strict=True):
        part = plan.parts[name]
        same = (head.file, head.version) == (part.file, part.version)
        if same and not any(row.again for row in head.left_out):
            yield name


def _ahead(work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """Results in order, a few of them at once."""
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(items), _READERS):
            yield from pool.map(work, items[start : start + _READERS])


def discard_leftovers(output: Storage) -> None:
    """Delete the files that a killed run left half-written. Call only while holding the lease."""
    if output.is_local:  # objects appear whole
        for path in Path(output.path()).rglob(".*.tmp"):
            path.unlink(missing_ok=True)


# --- a part ---


@dataclass
class PartCounts:
    """What is in a part; adds up.

    Attributes:
        images: by split.
        left_out: by reason.
        lost: by the format.
    """

    images: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    lost: Loss = field(default_factory=Loss)

    @property
    def rows(self) -> int:
        """Rows of the table."""
        return self.images.total() + self.left_out.total()

    def add(self, other: PartCounts) -> None:
        """Add those of another part."""
        self.images.update(other.images)
        self.left_out.update(other.left_out)
        self.lost.add(other.lost)


def write_part(
    name: str, *, export: Export, plan: Plan, fence: Callable[[], None] = lambda: None
) -> PartCounts:
    """Write a part and its mark.

    Args:
        name: of the part.
        export: what is asked for.
        plan: of the export.
        fence: called before the mark is put in place; raises if the lease was lost.

    Raises:
        MaskMillError: ``table_damaged``; what the storage says.
    """
    use_one_thread()
    part, counts = plan.parts[name], PartCounts()
    left_out: list[LeftOut] = []
    splits: list[str] = []
    lines: list[bytes] = []
    source = replace(export.source, table=plan.table)

    def samples() -> Iterator[Any]:
        for sample in samples_of(
            source, part.file, part.first, plan.namings[part.generation], left_out.append
        ):
            splits.append(sample.split)
            yield sample

    try:
        stale = _files_of(export.output, name)
        with Writes() as writes:
            output = Outbox.of(export.output, writes)
            for written in export.format.write_part(name, samples(), export.ontology, output):
                lines.append(_line(written.entry))
                counts.lost.add(written.lost)
        assert len(lines) == len(splits), "a format yields one result a sample"
        counts.images.update(splits)
        counts.left_out.update(row.reason for row in left_out)
        head = Mark(
            file=part.file,
            version=part.version,
            images=dict(counts.images),
            left_out=tuple(left_out),
            lost=counts.lost,
            files=tuple(writes.names),
        )
        fence()
        for file in set(stale) - set(writes.names):
            export.output.delete(file)
        export.output.write_bytes(
            f"{_PARTS}/{name}.jsonl", b"\n".join([head.model_dump_json().encode(), *lines, b""])
        )
    except OSError as error:
        # Told here, while the error still knows its path.
        raise explain(error, export.output.uri) or error from error
    return counts


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _mark(output: Storage, name: str) -> tuple[Mark, list[bytes]]:
    """The mark of a finished part, and a line for each image."""
    file = f"{_PARTS}/{name}.jsonl"
    try:
        head, *lines = output.read_bytes(file).splitlines()
        return Mark.model_validate_json(head), lines
    except ValueError as error:
        raise _damaged(output, file, error) from None


def _files_of(output: Storage, name: str) -> list[str]:
    """Files that an earlier run wrote for a part."""
    try:
        return list(_mark(output, name)[0].files)
    except FileNotFoundError:
        return []


# --- the end ---


def finish(export: Export, plan: Plan, *, fence: Callable[[], None] = lambda: None) -> ExportRecord:
    """Write what names all images, and the record. All parts must be finished; call while holding the lease.

    Raises:
        MaskMillError: ``export_damaged``; what the storage says.
    """
    counts = PartCounts()
    output = export.output
    before = {*_read(output, _FINISHED, _NAMES, ())}

    def entries() -> Iterator[Entry]:
        for head, lines in _ahead(lambda name: _mark(output, name), list(plan.parts)):
            counts.images.update(head.images)
            counts.left_out.update(row.reason for row in head.left_out)
            counts.lost.add(head.lost)
            yield from map(json.loads, lines)

    fence()
    with Writes() as writes:
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
    write_record(output, record)
    return record


def write_record(output: Storage, record: ExportRecord) -> None:
    """Write the ``export.json`` of an export."""
    output.write_json(EXPORT_FILE, record.model_dump(mode="json"))


def _write_left_out(file: Any, output: Storage, plan: Plan) -> None:
    columns = ("id", "uri", "reason", "text")
    rows = itertools.chain.from_iterable(
        head.left_out for head in _ahead(lambda name: _mark(output, name)[0], list(plan.parts))
    )
    for values in itertools.chain([columns], ([getattr(row, column) for column in columns] for row in rows)):
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerow(values)
        file.write(text.getvalue().encode())


def delete_export(output: Storage, *, fence: Callable[[], None] = lambda: None) -> None:
    """Delete the files of an export, and nothing else. Call only while holding the lease."""
    marked = [name.rpartition("/")[2].removesuffix(".jsonl") for name in output.list(_PARTS)]
    finished = _read(output, _FINISHED, _NAMES, ())
    folders: set[str] = set()
    for name in marked:
        fence()
        files = _files_of(output, name)
        for _ in _ahead(output.delete, files):
            pass
        folders.update(file.rpartition("/")[0] for file in files)
        output.delete(f"{_PARTS}/{name}.jsonl")
    for file in finished:
        output.delete(file)
        folders.add(file.rpartition("/")[0])
    if output.is_local:
        _remove_empty(Path(output.path()), folders)
    for file in (_FINISHED, _PLAN, EXPORT_FILE):
        output.delete(file)


def _remove_empty(root: Path, folders: set[str]) -> None:
    """Remove folders, and those above them, if nothing is left in them."""
    above = {str(path) for folder in folders for path in (Path(folder), *Path(folder).parents)} - {".", ""}
    for folder in sorted(above, key=lambda path: -path.count("/")):
        try:
            (root / folder).rmdir()
        except OSError:  # there is something in it
            continue
