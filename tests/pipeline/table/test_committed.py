from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.table.committed import discard_leftovers, done_ids, part_files, part_name, write_part


def _table(path: Path, ids: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": pa.array(ids, pa.int64()), "extra": ["x"] * len(ids)}), path)


def _rows(root: Path) -> list[int]:
    return sorted(
        i for part in (root / "labels").glob("*.parquet") for i in pq.read_table(part)["id"].to_pylist()
    )


def test_a_part_is_named_after_its_ids_in_any_order(tmp_path: Path) -> None:
    ids = np.array([-5, 2**62, 7])
    assert part_name(ids) == part_name(ids[::-1]) != part_name(ids[:2])
    storage = open_storage(tmp_path)
    rows = pa.table({"id": pa.array(ids), "uri": ["a", "b", "c"]})
    write_part(storage, rows)
    write_part(storage, rows.take([2, 0, 1]))  # a task that Ray runs again
    assert part_files(storage) == [f"labels/{part_name(ids)}"]
    assert done_ids(storage).tolist() == sorted(ids.tolist())


def test_only_whole_parts_are_read_and_torn_ones_are_removed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    _table(tmp_path / "labels" / "part-1.parquet", [1])
    torn = tmp_path / "labels" / ".part-2.parquet.abc123.tmp"
    torn.write_bytes(b"PAR1 torn")
    assert done_ids(storage).tolist() == [1]
    assert discard_leftovers(storage) == 1 and not torn.exists()
    assert discard_leftovers(storage) == 0
    assert _rows(tmp_path) == [1]


@pytest.mark.parametrize(
    ("checkpoints", "parts", "discarded", "done"),
    [
        ({}, {}, 0, []),  # nothing yet
        ({"r_000000": [3, 1]}, {"r_000000-0": [3, 1]}, 0, [1, 3]),  # clean
        ({"r_000000.pending": [1]}, {}, 1, []),  # died before the rows
        ({"r_000000.pending": [1]}, {"r_000000-0": [1]}, 1, []),  # died before the commit
        (  # died in the retry of a task that had already committed: the rows may be torn
            {"r_000000": [1], "r_000000.pending": [1], "r_000001": [2]},
            {"r_000000-0": [1], "r_000001-0": [2]},
            1,
            [2],
        ),
        ({"r_000000": [1], "r_000001": [2]}, {"r_000001-0": [2]}, 0, [2]),  # somebody deleted rows
        ({}, {"r_000000-0": [1], "r_000000-1": [2]}, 0, [1, 2]),  # somebody deleted the checkpoint
        (  # a stem that begins like a pending one is another part
            {"r_000001.pending": [1], "r_0000010": [2]},
            {"r_0000010-0": [2]},
            1,
            [2],
        ),
    ],
)
def test_tables_of_older_versions_are_resumed(
    tmp_path: Path,
    checkpoints: dict[str, list[int]],
    parts: dict[str, list[int]],
    discarded: int,
    done: list[int],
) -> None:
    for name, ids in checkpoints.items():
        _table(tmp_path / "checkpoint" / f"{name}.parquet", ids)
    for name, ids in parts.items():
        _table(tmp_path / "labels" / f"{name}.parquet", ids)
    storage = open_storage(tmp_path)
    assert discard_leftovers(storage) == discarded
    assert done_ids(storage).tolist() == done == _rows(tmp_path)
    assert discard_leftovers(storage) == 0  # a second look finds nothing


def test_torn_parts_of_older_versions_are_discarded_unread(tmp_path: Path) -> None:
    for folder, name in (("checkpoint", "r_000000.pending.parquet"), ("labels", "r_000000-0.parquet")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"PAR1 torn")
    assert discard_leftovers(open_storage(tmp_path)) == 1
    assert not list(tmp_path.glob("*/*.parquet"))


@pytest.mark.parametrize(
    "parts",
    [
        {"a": [1, 2, 3], "b": [3, 4], "c": [5]},
        {"a": [1, 2], "b": [2, 1], "c": [3, 4, 5]},
        {"a": [1, 2, 3, 4, 5], "b": [2, 3], "c": [3, 2]},
        {"a": [1, 1, 2], "b": [3, 4, 5, 4]},
    ],
)
def test_an_id_keeps_one_row_and_nothing_is_lost(tmp_path: Path, parts: dict[str, list[int]]) -> None:
    for name, ids in parts.items():
        _table(tmp_path / "labels" / f"{name}.parquet", ids)
    storage = open_storage(tmp_path)
    assert done_ids(storage).tolist() == [1, 2, 3, 4, 5] == _rows(tmp_path)
    before = part_files(storage)
    assert done_ids(storage).tolist() == [1, 2, 3, 4, 5] and part_files(storage) == before


def test_an_unreadable_part_is_told_and_not_deleted(tmp_path: Path) -> None:
    part = tmp_path / "labels" / "r_000000-0.parquet"
    part.parent.mkdir()
    part.write_bytes(b"no parquet")
    with pytest.raises(MaskMillError, match="r_000000-0") as caught:
        done_ids(open_storage(tmp_path))
    assert caught.value.code == "table_damaged"
    assert part.exists()
