"""Corrections are saved whole, once an image, and never over each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.errors import Damaged, WrongUse
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.review.saving import Saved, SavedByAnother, Saves
from pipeline.table.labels import iter_rows
from pipeline.table.record import read_table_record
from tests.pipeline.review.reviews import IGNORED, TOYWORLD

ROW = {"id": -5, "uri": "/a/b.png", "sha256": b"x" * 32, "height": 4, "width": 6, "version": "v"}
ONES, TWOS = np.full((4, 6), 1, np.uint8), np.full((4, 6), 2, np.uint8)


@pytest.fixture
def saves(tmp_path: Path) -> Saves:
    made = Saves(open_storage(tmp_path / "corrections"))
    made.begin(TOYWORLD, "/a/table")
    return made


def save(saves: Saves, decision: str, labels: np.ndarray | None, who: str, follows: str | None) -> Saved:
    return saves.save(
        ROW,
        decision,
        labels,
        reviewer=who,
        follows=follows,
        ignore_index=IGNORED,  # type: ignore[arg-type]
    )


def test_what_is_saved_is_a_label_table_of_people(saves: Saves, tmp_path: Path) -> None:
    painted = ONES.copy()
    painted[0] = IGNORED
    saved = save(saves, "painted", painted, "Ann", None)
    assert saves.read(ROW["id"]) == saved and saves.read(1) is None
    np.testing.assert_array_equal(saves.labels(saved), painted)
    (row,) = iter_rows(str(tmp_path / "corrections"))
    assert (row["id"], row["status"], row["sha256"], row["version"]) == (-5, "ok", b"x" * 32, "v")
    assert [(one["class_id"], one["area"], one["mean_confidence"]) for one in row["segments"]] == [
        (1, 18, 1.0)
    ]
    assert read_table_record(str(tmp_path / "corrections")).source == "human"
    rejected = save(saves, "rejected", None, "Ann", saved.tag)
    assert rejected.mask is None
    (row,) = iter_rows(str(tmp_path / "corrections"))
    assert row["status"] == "rejected" and "Ann" in row["error"]


def test_the_same_again_changes_nothing(saves: Saves, tmp_path: Path) -> None:
    first = save(saves, "painted", ONES, "Ann", None)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    # The answer was lost: the page sends it again as it was, or knows a tag of before.
    assert save(saves, "painted", ONES, "Ann", None) == first
    assert save(saves, "painted", ONES, "Bob", "another") == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == files


def test_the_second_of_two_is_told_and_may_replace(saves: Saves, tmp_path: Path) -> None:
    first = save(saves, "painted", ONES, "Ann", None)
    with pytest.raises(SavedByAnother, match="Ann has saved this image") as told:
        save(saves, "painted", TWOS, "Bob", None)
    assert told.value.there == first and saves.read(ROW["id"]) == first
    second = save(saves, "painted", TWOS, "Bob", told.value.there.tag)
    assert saves.read(ROW["id"]) == second
    with pytest.raises(SavedByAnother):
        save(saves, "rejected", None, "Ann", first.tag)
    # What Ann painted is kept.
    (kept,) = (tmp_path / "corrections" / "set_aside").iterdir()
    assert pq.read_table(kept)["reviewer"].to_pylist() == ["Ann"]


def test_of_many_at_once_one_wins(saves: Saves) -> None:
    def one(number: int) -> str:
        try:
            return save(saves, "painted", np.full((4, 6), number, np.uint8), str(number), None).reviewer
        except SavedByAnother:
            return ""

    with ThreadPoolExecutor(8) as pool:
        won = list(filter(None, pool.map(one, range(8))))
    there = saves.read(ROW["id"])
    assert there is not None and won == [there.reviewer]


def test_on_an_object_store_too(bucket: str) -> None:
    saves = Saves(open_storage(bucket))
    saves.begin(TOYWORLD, "/a/table")
    first = save(saves, "painted", ONES, "Ann", None)
    assert save(saves, "painted", ONES, "Ann", None) == first
    with pytest.raises(SavedByAnother, match="Ann"):
        save(saves, "rejected", None, "Bob", None)
    second = save(saves, "rejected", None, "Bob", first.tag)
    assert saves.read_all([ROW["id"], 1]) == {ROW["id"]: second}
    assert len(saves.storage.list("set_aside")) == 1


def test_another_table_is_not_written_to(saves: Saves) -> None:
    with pytest.raises(WrongUse, match="other classes"):
        saves.begin(Ontology.from_dict({"name": "x", "classes": ["cat"]}), "/a/other")
    saves.begin(TOYWORLD, "/a/table")


def test_a_damaged_file_is_named(saves: Saves, tmp_path: Path) -> None:
    save(saves, "accepted", ONES, "", None)
    (file,) = (tmp_path / "corrections" / "labels").iterdir()
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(Damaged, match=file.name):
        saves.read(ROW["id"])
