from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.table.committed import Recovery, done_ids, recover


def _table(path: Path, ids: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": pa.array(ids, pa.int64()), "extra": ["x"] * len(ids)}), path)


def _lay_out(root: Path, *, checkpoints: dict[str, list[int]], parts: dict[str, list[int]]) -> None:
    for name, ids in checkpoints.items():
        _table(root / "checkpoint" / f"{name}.parquet", ids)
    for name, ids in parts.items():
        _table(root / "labels" / f"{name}.parquet", ids)


@pytest.mark.parametrize(
    ("checkpoints", "parts", "expected", "done"),
    [
        ({}, {}, Recovery(), []),  # nothing yet
        ({"r_000000": [3, 1]}, {"r_000000-0": [3, 1]}, Recovery(), [1, 3]),  # clean
        ({"r_000000.pending": [1]}, {}, Recovery(1), []),  # died before the rows
        ({"r_000000.pending": [1]}, {"r_000000-0": [1]}, Recovery(1), []),  # died before the commit
        (  # died in the retry of a task that had already committed: the rows may be torn
            {"r_000000": [1], "r_000000.pending": [1], "r_000001": [2]},
            {"r_000000-0": [1], "r_000001-0": [2]},
            Recovery(1),
            [2],
        ),
        (
            {"r_000000": [1], "r_000001": [2]},
            {"r_000001-0": [2]},
            Recovery(0, 1),
            [2],
        ),  # somebody deleted rows
        (
            {},
            {"r_000000-0": [1], "r_000000-1": [2]},
            Recovery(0, 0, 1),
            [1, 2],
        ),  # somebody deleted the checkpoint
        (  # a stem that begins like a pending one is another part
            {"r_000001.pending": [1], "r_0000010": [2]},
            {"r_0000010-0": [2]},
            Recovery(1),
            [2],
        ),
    ],
)
def test_table_and_checkpoint_agree_again(
    tmp_path: Path,
    checkpoints: dict[str, list[int]],
    parts: dict[str, list[int]],
    expected: Recovery,
    done: list[int],
) -> None:
    _lay_out(tmp_path, checkpoints=checkpoints, parts=parts)
    storage = open_storage(tmp_path)
    assert recover(storage) == expected
    assert done_ids(storage).tolist() == done
    rows = [
        row
        for path in (tmp_path / "labels").glob("*.parquet")
        for row in pq.read_table(path)["id"].to_pylist()
    ]
    assert sorted(rows) == done
    assert recover(storage) == Recovery()  # a second look finds nothing


def test_torn_pending_files_are_discarded_unread(tmp_path: Path) -> None:
    for folder, name in (("checkpoint", "r_000000.pending.parquet"), ("labels", "r_000000-0.parquet")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(b"PAR1 torn")
    assert recover(open_storage(tmp_path)) == Recovery(1)
    assert not list(tmp_path.glob("*/*.parquet"))


def test_an_unreadable_part_without_checkpoint_is_not_deleted(tmp_path: Path) -> None:
    part = tmp_path / "labels" / "r_000000-0.parquet"
    part.parent.mkdir()
    part.write_bytes(b"no parquet")
    with pytest.raises(MaskMillError, match="r_000000-0") as caught:
        recover(open_storage(tmp_path))
    assert caught.value.code == "table_damaged"
    assert part.exists()
