"""``dataset.json``: the record of a label table's contents and how it was made."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from models.errors import WrongUse
from pipeline.files.records import find_record
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import RecordedOntology
from pipeline.table.labels import DATASET_FILE
from pipeline.table.statistics import QualityScore

SCHEMA_VERSION = 1


class TableRecord(BaseModel):
    """What ``dataset.json`` says. Fields with a default are absent in tables of older versions, or at first.

    Attributes:
        schema_version: of the file.
        created: UTC, ISO 8601.
        updated: the same, of the last run that added rows.
        source: "pseudo" for labels of a model, "truth" for imported ones, "human" for corrections by people.
        ontology: the classes.
        recipe: of the labelling, all fields and ``hash``; see ``pipeline.labelling.recipes.table_recipe``.
        weights: ``model``, ``pretrained`` and ``fingerprint``; of a student also ``text``, its CLIP. Of truth
            they are "truth", what was imported, and "".
        precision: number format that the labels were computed in; "" if it is the recipe's.
        versions: of Python and the packages.
        quality: which score the column of this name holds.
        counts: see ``pipeline.table.labels.summarise``; empty until the first run ends.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: int = SCHEMA_VERSION
    created: str = ""
    updated: str = ""
    source: Literal["pseudo", "truth", "human"] = "pseudo"
    ontology: RecordedOntology
    recipe: dict[str, Any]
    weights: dict[str, Any]
    precision: str = ""
    versions: dict[str, Any] = {}
    quality: QualityScore = "classes"
    counts: dict[str, Any] = {}

    @field_validator("weights")
    @classmethod
    def _named(cls, weights: dict[str, Any]) -> dict[str, Any]:
        absent = [name for name in ("model", "pretrained", "fingerprint") if name not in weights]
        if absent:
            raise ValueError(f"there is no {' and no '.join(absent)}")
        return weights


def find_table_record(storage: Storage) -> TableRecord | None:
    """The record of the label table in a folder; None if there is no ``dataset.json``.

    Raises:
        MaskMillError: ``newer_version``; ``table_damaged`` if it is no record of a label table.
    """
    return find_record(
        TableRecord,
        storage,
        DATASET_FILE,
        SCHEMA_VERSION,
        code="table_damaged",
        remedy="Give the --output of maskmill label, or restore the file from a copy.",
        absent={"quality": "softmin"},
    )


def read_table_record(table: str) -> TableRecord:
    """Read the ``dataset.json`` of a label table.

    Raises:
        MaskMillError: ``input_missing`` without one; as ``find_table_record``.
    """
    storage = open_storage(table)
    record = find_table_record(storage)
    if record is None:
        raise WrongUse(
            "input_missing",
            f"There is no {DATASET_FILE} in {storage.uri}, so what its ids mean is unknown.",
            "Give the --output of maskmill label.",
        )
    return record


def content_digest(table: str) -> str:
    """SHA-256 (hex) of what is in a label table, by its record; "" if there is none."""
    written = open_storage(table).read_json(DATASET_FILE, None)
    return "" if written is None else hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()


def write_table_record(storage: Storage, record: TableRecord) -> None:
    """Write the ``dataset.json`` of a label table."""
    storage.write_json(DATASET_FILE, record.model_dump(mode="json"))
