"""What an export is, as its ``export.json`` says, and whether an output holds it or anything else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, TypeAdapter

from models.errors import WrongUse
from pipeline.files.records import find_record
from pipeline.files.storage import Storage
from pipeline.formats.base import Format
from pipeline.formats.samples import Source
from pipeline.ontology.ontology import Ontology, RecordedOntology
from pipeline.table.record import TableRecord

EXPORT_FILE: Final = "export.json"
SCHEMA_VERSION: Final = 1

_REMEDY = "Restore it, or name another --output."


class ExportRecord(BaseModel):
    """What ``export.json`` says.

    Attributes:
        schema_version: of the file.
        format: its name.
        options: of the format.
        table: ``uri`` of the table, and ``created``, ``recipe`` and ``weights`` (hashes), which tell it from
            others.
        source: "pseudo" for labels of a model, "truth" or "human" for those of people.
        view: of the table, as its file has it; None if the labels are as they were.
        with_images: whether images were copied.
        val_share: share of the images in the split "val".
        split: the split of the table by which it was divided, instead; "" if by none.
        corrections: identity of the corrections that count instead of labels; "" without any.
        only: digest of the ids of the images that were asked for; "" for all.
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
    split: str = ""
    corrections: str = ""
    only: str = ""
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
                ("split", "its split is"),
                ("corrections", "its corrections, or known labels, are"),
                ("only", "its images are those of a queue:"),
            )
            if getattr(self, name) != getattr(other, name)
        ]
        if any(self.table.get(key) != other.table.get(key) for key in ("created", "recipe", "weights")):
            found.append(f"it is of another table, {other.table.get('uri')}")
        elif self.ontology.hash != other.ontology.hash:
            found.append("its classes differ")
        return found


def _short(value: object) -> str:
    return json.dumps(value) if isinstance(value, dict) else "none" if value in (None, "") else str(value)


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
        split="" if source.split is None else source.split.record.identity,
        corrections="" if source.corrections is None else source.corrections.identity,
        only="" if source.only is None else hashlib.sha256(repr(sorted(source.only)).encode()).hexdigest(),
        ontology=ontology,
    )
    return Export(source, ontology, made, output, record)


def find_export(output: Storage) -> ExportRecord | None:
    """The record of the export in a folder; None without an ``export.json``.

    Raises:
        MaskMillError: ``newer_version``; ``file_damaged`` if it is no record.
    """
    return find_record(ExportRecord, output, EXPORT_FILE, SCHEMA_VERSION, remedy=_REMEDY)


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


def write_record(output: Storage, record: ExportRecord) -> None:
    """Write the ``export.json`` of an export."""
    output.write_json(EXPORT_FILE, record.model_dump(mode="json"))
