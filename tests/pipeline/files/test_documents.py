"""Files of users: what is read, and the errors that name file and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from models.errors import MaskMillError
from pipeline.files.documents import decoded, parsed_json, parsed_yaml, read_document
from pipeline.files.storage import open_storage


def test_text_in_utf8_with_or_without_a_mark() -> None:
    assert (
        decoded("é\n".encode(), "x", code="c") == decoded("é\n".encode("utf-8-sig"), "x", code="c") == "é\n"
    )
    with pytest.raises(MaskMillError, match=r"x:3: not UTF-8") as caught:
        decoded("a\nb\né".encode("latin-1"), "x", code="c")
    assert caught.value.code == "c" and caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "x:1: not valid JSON"),
        (b'{"a": 1,\n}', "x:2: not valid JSON"),
        (b"\xff", "x:1: not UTF-8"),
        (b"[" * 100_000, "x: nested too deeply"),
        (b'{"a":' * 100_000, "x: nested too deeply"),
        (b"1" * 10_000, "x: cannot be read: Exceeds the limit"),
    ],
)
def test_what_is_no_json(data: bytes, says: str) -> None:
    with pytest.raises(MaskMillError, match=says):
        parsed_json(data, "x", code="c")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"a: 1\nb: 2: 3", "x:2: not valid YAML"),
        (b"\xff", "x:1: not UTF-8"),
        (b"[" * 5_000, "x: nested too deeply"),
        (b"- " * 5_000, "x: nested too deeply"),
        (b"a: &b [1]\nc: [*b, *b]", "x:2: YAML aliases"),
        (b"!!python/object/apply:os.getcwd []", "x:1: not valid YAML"),
        (b"a: 2020-99-01", "x: cannot be read"),
        (b"a: \x07", "x: not valid YAML"),
    ],
)
def test_what_is_no_yaml(data: bytes, says: str) -> None:
    with pytest.raises(MaskMillError, match=says):
        parsed_yaml(data, "x", code="c")


def test_values_are_those_of_the_libraries() -> None:
    assert parsed_json(b'\xef\xbb\xbf{"a": [1, null]}', "x", code="c") == {"a": [1, None]}
    assert parsed_yaml(b"a: [1, ~]\nb: {c: no}", "x", code="c") == {"a": [1, None], "b": {"c": False}}
    assert parsed_yaml(b"", "x", code="c") is None


def test_files_folders_and_pipes(tmp_path: Path) -> None:
    place = open_storage(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_bytes(b"x")
    assert read_document(place, "file", code="c") == b"x"
    with pytest.raises(FileNotFoundError):
        read_document(place, "absent", code="c")
    for name, says in (
        ("folder", "is a folder, not a file"),
        ("pipe", "is a pipe or a device"),
        ("loop", "cannot be read: "),
        ("file/below", "cannot be read: Not a directory"),
        ("x" * 300, "cannot be read: File name too long"),
    ):
        with pytest.raises(MaskMillError, match=says) as caught:
            read_document(place, name, code="c")
        assert caught.value.code == "c" and name in caught.value.message
