from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from models.errors import MaskMillError
from pipeline.files.records import find_record, read_record
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


class Note(BaseModel):
    text: str
    kind: str


def test_a_record_is_found_as_its_model(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert find_record(Note, storage, "note.json", 1, remedy="Write it.") is None
    storage.write_json("note.json", {"text": "a", "kind": "b"})
    assert find_record(Note, storage, "note.json", 1, remedy="Write it.") == Note(text="a", kind="b")
    storage.write_json("note.json", {"text": "a"})
    found = find_record(Note, storage, "note.json", 1, remedy="Write it.", absent={"text": "", "kind": "old"})
    assert found == Note(text="a", kind="old")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff", b"null", b'{"text": 1, "kind": "b"}'])
def test_a_damaged_record_is_told_by_its_code_and_remedy(tmp_path: Path, text: bytes) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("note.json", text)
    for code in ("file_damaged", "table_damaged"):
        with pytest.raises(MaskMillError, match=r"note\.json") as caught:
            find_record(Note, storage, "note.json", 1, remedy="Write it.", code=code)
        assert (caught.value.code, caught.value.remedy) == (code, "Write it.")
