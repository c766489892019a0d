from __future__ import annotations

import json
import tracemalloc

import pytest

from pipeline.files.storage import open_storage
from pipeline.formats.jsonfile import JsonFiles


def test_lists_grow_side_by_side_in_several_files(tmp_path):
    output = open_storage(tmp_path)
    with JsonFiles(output, {"info": {"name": "猫"}}, ("images", "annotations")) as files:
        for number in range(5):
            file = files["a/train.json" if number % 2 else "a/val.json"]
            place = file.add("images", {"id": number})
            assert file.add("annotations", {"image": number, "text": 'é"\n'}) == place == number // 2 + 1
        files["a/empty.json"]
        assert not any(output.exists(name) for name in files.names)
    assert files.names == output.list(recursive=True) == ["a/empty.json", "a/train.json", "a/val.json"]
    assert json.loads(output.read_bytes("a/val.json")) == {
        "info": {"name": "猫"},
        "images": [{"id": 0}, {"id": 2}, {"id": 4}],
        "annotations": [{"image": number, "text": 'é"\n'} for number in (0, 2, 4)],
    }
    assert json.loads(output.read_bytes("a/empty.json"))["annotations"] == []


def test_after_an_error_the_old_file_is_there_and_nothing_else(tmp_path):
    output = open_storage(tmp_path)
    output.write_bytes("x.json", b"old")
    with pytest.raises(ValueError, match="JSON"), JsonFiles(output, {}, ("images",)) as files:
        files["x.json"].add("images", 1)
        files["y.json"].add("images", float("nan"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"] and output.read_bytes("x.json") == b"old"


def test_entries_are_not_held(tmp_path):
    tracemalloc.start()
    with JsonFiles(open_storage(tmp_path), {}, ("images", "annotations")) as files:
        file = files["x.json"]
        for _ in range(5000):
            file.add("annotations", {"text": "x" * 10_000})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "x.json").stat().st_size > 50e6 and peak < 5e6
