from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from models.errors import MaskMillError
from pipeline.files.records import read_record
from pipeline.files.storage import open_storage


@pytest.mark.parametrize("record", [{"a": 1}, {"schema_version": 1}, {"schema_version": 2, "a": None}])
def test_older_and_present_records_are_read(tmp_path: Path, record: dict[str, Any]) -> None:
    storage = open_storage(tmp_path)
    assert read_record(storage, "record.json", 2) is None
    storage.write_json("record.json", record)
    assert read_record(storage, "record.json", 2) == record


@pytest.mark.parametrize(
    ("record", "code"),
    [({"schema_version": 3}, "newer_version"), ([1], "document_invalid"), ("x", "document_invalid")],
)
def test_what_cannot_be_read_is_refused_in_words(tmp_path: Path, record: object, code: str) -> None:
    storage = open_storage(tmp_path)
    storage.write_json("record.json", record)
    with pytest.raises(MaskMillError, match=r"record\.json") as caught:
        read_record(storage, "record.json", 2)
    assert caught.value.code == code
