"""``dataset.json``: the record of a label table's contents and how it was made."""

from __future__ import annotations

from typing import Any

from models.errors import WrongUse
from pipeline.files.records import read_record
from pipeline.files.storage import open_storage
from pipeline.table.labels import DATASET_FILE

SCHEMA_VERSION = 1


def read_table_record(table: str) -> dict[str, Any]:
    """Read the ``dataset.json`` of a label table.

    Raises:
        MaskMillError: ``table_missing`` without one; ``newer_version``; ``json_invalid``.
    """
    storage = open_storage(table)
    record = read_record(storage, DATASET_FILE, SCHEMA_VERSION)
    if record is None:
        raise WrongUse(
            "table_missing",
            f"There is no {DATASET_FILE} in {storage.uri}, so what its ids mean is unknown.",
            "Give the --output of maskmill label.",
        )
    return record
