"""By what a process tells whether it sees a disk. Nodes without it: tests/jobs/test_label_disks.py."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from models.errors import MaskMillError
from pipeline.cluster.disks import ANYWHERE, LANDMARKS, Landmarks, Place, files_of_table
from pipeline.files.storage import open_storage
from pipeline.table.committed import part_files
from pipeline.table.lease import Lease
from tests.pipeline.formats.tables import add_rows


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    made = [tmp_path / f"{number:03d}.png" for number in range(100)]
    for path in made:
        path.write_bytes(b"image")
    return [str(path) for path in made]


def test_landmarks_are_spread_over_the_local_files(files: list[str]) -> None:
    found = Landmarks.of(["s3://bucket/a.png", *files])
    assert len(found.files) == LANDMARKS
    places = [files.index(path) for path, _ in found.files]
    assert places == sorted(set(places)) and places[0] < 10 and places[-1] > 85


def test_there_are_none_without_local_files(files: list[str]) -> None:
    assert not Landmarks.of(["s3://bucket/a.png", "https://host/b.png", f"{files[0]}.missing"])
    assert Landmarks.of(files[:1])


@pytest.mark.parametrize("damage", ["gone", "other content", "older"])
def test_a_file_that_is_another_one_is_not_seen(files: list[str], damage: str) -> None:
    found = pickle.loads(pickle.dumps(Landmarks.of(files)))
    assert found.seen()
    path = found.files[-1][0]
    if damage == "gone":
        os.unlink(path)
    elif damage == "other content":
        Path(path).write_bytes(b"another image")
    else:
        os.utime(path, (1, 1))
    assert not found.seen()
    with pytest.raises(MaskMillError) as caught:
        found.require()
    assert caught.value.code == "disk_not_shared"
    # Where content is checked elsewhere, a copy will do.
    assert Landmarks.copies([path]).seen() == (damage != "gone")


def test_an_output_is_seen_by_the_lease_of_its_run(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "table")
    with Lease.acquire(storage, on_lost=lambda _reason: None) as lease:
        assert Landmarks.of((), output=storage, run_id=lease.run_id).seen()
        assert not Landmarks.of((), output=storage, run_id="another-run").seen()
    assert not Landmarks.of((), output=storage, run_id=lease.run_id).seen()
    assert not Landmarks.of((), output=open_storage("memory://table"), run_id=lease.run_id)


def test_tasks_look_again_only_where_they_may_run_on_any_node(files: list[str]) -> None:
    landmarks = Landmarks.of(files)
    os.unlink(landmarks.files[0][0])
    with pytest.raises(MaskMillError, match="does not see"):
        Place(landmarks=landmarks).guarded(len)("part")
    assert Place(node="here", landmarks=landmarks).guarded(len)("part") == 4
    assert ANYWHERE.guarded(len) is len


def test_work_on_the_driver_s_node_asks_for_no_cpus() -> None:
    assert ANYWHERE.task_options(0.5) == {"num_cpus": 0.5}
    options = Place(node="abc").task_options(0.5)
    assert options["num_cpus"] == 0 and list(options["label_selector"].values()) == ["abc"]


def test_a_table_shows_some_parts_and_their_images(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    uris = [str(tmp_path / f"{number}.png") for number in range(12)]
    add_rows(storage, uris, size=16)
    parts = part_files(storage)
    assert files_of_table(storage, parts, images=False) == [storage.uri_of(part) for part in parts]
    found = files_of_table(storage, parts, images=True)
    assert len(found) == 2 * len(parts) and set(found) - set(uris) == set(map(storage.uri_of, parts))
    Path(storage.path(parts[0])).write_bytes(b"torn")
    assert len(files_of_table(storage, parts, images=True)) == 2 * len(parts) - 1
