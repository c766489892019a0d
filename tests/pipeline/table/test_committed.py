from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.files.storage import Storage, open_storage
from pipeline.table.committed import (
    LABELS_DIR,
    RELABELLED_DIR,
    apply_relabelled,
    discard_leftovers,
    part_files,
    part_name,
    set_aside,
    settle,
    settle_index,
    write_part,
)
from pipeline.table.labels import LABEL_SCHEMA, failed_row, iter_rows, ok_row


def _minimal(ids: list[int]) -> pa.Table:
    rows = [failed_row(id=row_id, uri="u", status="empty", error="x" * 20) for row_id in ids]
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def _table(path: Path, ids: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(_minimal(ids), path)


def _done(storage: Storage) -> list[int]:
    return sorted(row_id for ids in settle(storage).values() for row_id in ids.tolist())


def _rows(root: Path) -> list[int]:
    return sorted(
        i for part in (root / "labels").glob("*.parquet") for i in pq.read_table(part)["id"].to_pylist()
    )


def test_a_part_is_named_after_its_ids_in_any_order(tmp_path: Path) -> None:
    ids = np.array([-5, 2**62, 7])
    assert part_name(ids) == part_name(ids[::-1]) != part_name(ids[:2])
    storage = open_storage(tmp_path)
    rows = _minimal(ids.tolist())
    write_part(storage, rows)
    write_part(storage, rows.take([2, 0, 1]))  # a task that Ray runs again
    assert part_files(storage) == [f"labels/{part_name(ids)}"]
    assert _done(storage) == sorted(ids.tolist())


def test_only_whole_parts_are_read_and_torn_ones_are_removed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    _table(tmp_path / "labels" / "part-1.parquet", [1])
    torn = tmp_path / "labels" / ".part-2.parquet.abc123.tmp"
    torn.write_bytes(b"PAR1 torn")
    assert _done(storage) == [1]
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
    assert _done(storage) == done == _rows(tmp_path)
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
    assert _done(storage) == [1, 2, 3, 4, 5] == _rows(tmp_path)
    before = part_files(storage)
    assert _done(storage) == [1, 2, 3, 4, 5] and part_files(storage) == before


@pytest.mark.parametrize("damage", [b"", b"no parquet", "torn", "zeroed", "ids lost", "other columns"])
def test_a_damaged_part_is_set_aside_and_its_images_are_new_again(
    tmp_path: Path, damage: bytes | str
) -> None:
    _table(tmp_path / "labels" / "a_000000-0.parquet", [1, 2])
    part = tmp_path / "labels" / "b_000000-0.parquet"
    _table(part, list(range(10, 400)))
    whole = part.read_bytes()
    if damage == "other columns":
        pq.write_table(pa.table({"id": [1]}), part)
    else:
        part.write_bytes(
            damage
            if isinstance(damage, bytes)
            else {
                "torn": whole[: len(whole) // 2],
                "zeroed": whole[:-64] + bytes(64),
                "ids lost": whole[:4] + bytes(len(whole) // 2) + whole[4 + len(whole) // 2 :],
            }[damage]
        )
    left = part.read_bytes()
    said: list[str] = []
    found = settle(open_storage(tmp_path), notice=said.append)
    assert {name: ids.tolist() for name, ids in found.items()} == {"labels/a_000000-0.parquet": [1, 2]}
    assert (tmp_path / "set_aside" / part.name).read_bytes() == left and not part.exists()
    assert len(said) == 1 and "b_000000-0.parquet" in said[0] and "labelled again" in said[0]


def test_a_part_that_cannot_be_reached_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _table(tmp_path / "labels" / "a_000000-0.parquet", [1, 2])

    def fail(*_arguments: object, **_settings: object) -> None:
        raise OSError("AWS Error NETWORK_CONNECTION during GetObject operation")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    monkeypatch.setattr(pq, "read_table", fail)
    monkeypatch.setattr(Storage, "read_bytes", fail)
    with pytest.raises(OSError, match="NETWORK"):
        settle(open_storage(tmp_path))
    assert (tmp_path / "labels" / "a_000000-0.parquet").exists()


@pytest.mark.parametrize("name", ["copy.parquet", "a copy.parquet", "part-0.parquet", "zz.parquet"])
def test_a_copy_is_not_adopted(tmp_path: Path, name: str) -> None:
    storage = open_storage(tmp_path)
    rows = _minimal([1, 2])
    mine = write_part(storage, rows)
    copy = tmp_path / "labels" / name
    copy.write_bytes((tmp_path / mine).read_bytes())
    assert list(settle(storage)) == [mine] == part_files(storage)
    assert (tmp_path / "set_aside" / name).exists()


def test_a_part_overwritten_with_another_one_loses_its_images_but_keeps_the_other(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    one, two = (write_part(storage, _minimal(ids)) for ids in ([1, 2], [3, 4]))
    (tmp_path / two).write_bytes((tmp_path / one).read_bytes())
    assert {part: ids.tolist() for part, ids in settle(storage).items()} == {one: [1, 2]}


def test_rows_of_a_file_with_a_name_of_its_own_stay(tmp_path: Path) -> None:
    """As after somebody has joined many small files to a large one."""
    _table(tmp_path / "labels" / "all.parquet", [3, 1, 2])
    storage = open_storage(tmp_path)
    assert {part: ids.tolist() for part, ids in settle(storage).items()} == {"labels/all.parquet": [3, 1, 2]}


def test_what_is_set_aside_never_overwrites(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    for content in (b"one", b"two", b"three"):
        storage.write_bytes("labels/part-1.parquet", content)
        set_aside(storage, "labels/part-1.parquet")
    kept = sorted(path.read_bytes() for path in (tmp_path / "set_aside").iterdir())
    assert kept == [b"one", b"three", b"two"]


# --- replacing rows ---


def _ok(row_id: int, value: int, sha: int = 7) -> dict[str, object]:
    mask = np.full((2, 3), value, np.uint8)
    return ok_row(
        id=row_id, uri=f"/{row_id}", sha256=bytes([sha]) * 32, height=2, width=3, labels=mask,
        confidence=mask + 100, ignore_index=255, version=f"v{value}",
    )  # fmt: skip


def _failed(row_id: int, status: str = "unavailable", sha: int | None = None) -> dict[str, object]:
    return failed_row(
        id=row_id, uri=f"/{row_id}", status=status, error="why", sha256=None if sha is None else bytes(32)
    )


def _write(storage: Storage, rows: list[dict[str, object]], folder: str = LABELS_DIR) -> str:
    return write_part(storage, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), folder)


def _status(storage: Storage) -> dict[int, str]:
    """Status and version by id, as a reader sees them; every id once."""
    rows = list(iter_rows(storage))
    found = {row["id"]: f"{row['status']} {row['version']}" for row in rows}
    assert len(found) == len(rows)
    return found


OLD = [_failed(1), _ok(2, 1), _failed(3, "truncated", 1), _ok(4, 1)]
NEW = [_ok(1, 5), _ok(4, 5), _failed(3, "empty", 1)]
AFTER = {1: "ok v5", 2: "ok v1", 3: "empty None", 4: "ok v5"}


def test_new_rows_take_the_places_of_old_ones(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    parts = [_write(storage, OLD[:3]), _write(storage, OLD[3:])]
    before = [pq.read_table(tmp_path / part)["id"].to_pylist() for part in parts]
    _write(storage, NEW, RELABELLED_DIR)
    done = apply_relabelled(storage, settle_index(storage))
    assert _status(storage) == AFTER
    assert part_files(storage) == sorted(parts) and not part_files(storage, RELABELLED_DIR)
    assert [pq.read_table(tmp_path / part)["id"].to_pylist() for part in parts] == before
    assert sorted(done.ids.tolist()) == [1, 3, 4] and not done.kept
    assert done.removed.to_dict()["status"] == {"ok": 1, "truncated": 1, "unavailable": 1}
    assert done.added.to_dict()["status"] == {"ok": 2, "empty": 1}
    assert not len(apply_relabelled(storage, settle_index(storage)).ids)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("step", range(6))
def test_a_kill_between_any_two_steps_shows_each_image_once_and_the_next_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    storage = open_storage(tmp_path)
    for rows in (OLD[:1], OLD[1:3], OLD[3:]):
        _write(storage, rows)
    _write(storage, NEW[:1], RELABELLED_DIR)
    _write(storage, NEW[1:], RELABELLED_DIR)
    steps = 0

    def killed(change: str) -> None:
        real = getattr(Storage, change)

        def counted(self: Storage, *arguments: object) -> object:
            nonlocal steps
            assert set(_status(storage)) == {1, 2, 3, 4}  # what a reader sees right now
            if steps == step:
                raise _Killed
            steps += 1
            return real(self, *arguments)

        monkeypatch.setattr(Storage, change, counted)

    for change in ("new_file", "delete"):
        killed(change)
    if step < 5:  # three parts are written, two files deleted
        with pytest.raises(_Killed):
            apply_relabelled(storage, settle_index(storage))
        steps = -100
    apply_relabelled(storage, settle_index(storage))
    monkeypatch.undo()
    assert _status(storage) == AFTER and not part_files(storage, RELABELLED_DIR)


def test_a_label_is_not_given_up_for_an_image_that_could_not_be_read(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    _write(storage, [_ok(1, 1), _failed(2), _ok(3, 1)])
    _write(storage, [_failed(1), _failed(2, "not_found"), _failed(3, "truncated", 1)], RELABELLED_DIR)
    done = apply_relabelled(storage, settle_index(storage))
    assert _status(storage) == {1: "ok v1", 2: "not_found None", 3: "truncated None"}
    assert done.kept == {"unavailable": 1}


def test_rows_of_a_part_that_somebody_took_away_are_not_lost(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    part = _write(storage, OLD)
    _write(storage, NEW, RELABELLED_DIR)
    storage.delete(part)
    apply_relabelled(storage, settle_index(storage))
    assert sorted(_status(storage)) == [1, 3, 4]


def test_parts_of_older_versions_are_replaced_too(tmp_path: Path) -> None:
    """They lack the newest column, have another name, and perhaps columns that somebody added."""
    storage = open_storage(tmp_path)
    rows = pa.Table.from_pylist(OLD, schema=LABEL_SCHEMA).drop_columns(["version"])
    (tmp_path / "labels").mkdir()
    pq.write_table(rows.append_column("mine", pa.array("abcd")), tmp_path / "labels" / "r_000000-0.parquet")
    _write(storage, NEW, RELABELLED_DIR)
    apply_relabelled(storage, settle_index(storage))
    assert _status(storage) == AFTER | {2: "ok None"}
    table = pq.read_table(tmp_path / "labels" / "r_000000-0.parquet")
    assert dict(zip(table["id"].to_pylist(), table["mine"].to_pylist(), strict=True))[2] == "b"
