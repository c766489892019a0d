from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.errors import MaskMillError
from pipeline.corpus.manifest import ADDRESS, build_manifest, stable_id
from pipeline.datasets.pairs import open_pairs
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import parse_classes
from pipeline.retraining.config import When
from pipeline.retraining.intake import (
    HELD_FILE,
    NEW_FILE,
    begins,
    choose,
    evaluation_ids,
    find_copies,
    ids_of,
    joined,
    look_through,
    picked,
    read_images,
    refuse_signed,
    share_of,
    taken_in,
    without,
    write_images,
)
from pipeline.retraining.state import Tick
from pipeline.table.labels import read_ids
from tests.pipeline.formats.tables import toy_table

NOW = datetime(2026, 5, 10, 12, 0, tzinfo=timezone.utc)


def manifest(*numbers: int) -> pa.Table:
    uris = [f"/photos/{number}.jpg" for number in numbers]
    return pa.table({"id": pa.array(map(stable_id, uris), pa.int64()), "uri": pa.array(uris, pa.string())})


def no_copies(table: pa.Table) -> Sequence[bool]:
    return [False] * table.num_rows


def ago(days: float) -> str:
    return (NOW - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.mark.parametrize(
    ("new", "last", "when", "starts", "why"),
    [
        (0, None, {}, False, "no new images"),
        (0, ago(99), {"max_age": 1}, False, "no new images"),  # age alone never begins a tick
        (1, None, {}, True, ""),
        (9, ago(1), {"min_new": 10}, False, "9 new images, and a tick waits for 10"),
        (1, ago(1), {"min_new": 10}, False, "1 new image, and"),
        (10, ago(1), {"min_new": 10}, True, ""),
        (9, ago(6.5), {"min_new": 10, "max_age": 7}, False, "7 days have passed since the last one (6.5"),
        (9, ago(7.1), {"min_new": 10, "max_age": 7}, True, ""),
        (9, None, {"min_new": 10, "max_age": 7}, False, "counts from the first tick"),
    ],
)  # fmt: skip
def test_when_a_tick_begins(
    new: int, last: str | None, when: dict[str, float], starts: bool, why: str
) -> None:
    found = begins(new, last, When.model_validate(when), at=NOW)
    assert found[0] is starts and why in found[1] and (not starts or not found[1])


@settings(max_examples=60)
@given(
    count=st.integers(0, 60),
    budget=st.none() | st.integers(1, 70),
    hold_out=st.none() | st.floats(0.01, 0.9),
    held_before=st.integers(0, 3),
    bad=st.sets(st.integers(0, 59)),
)
def test_every_new_image_goes_to_one_place(
    count: int, budget: int | None, hold_out: float | None, held_before: int, bad: set[int]
) -> None:
    new = manifest(*range(count))
    copies = set(ids_of(manifest(*bad)).tolist())
    found = choose(
        new,
        budget=budget,
        hold_out=hold_out,
        held_before=held_before,
        copies=lambda table: [one in copies for one in ids_of(table).tolist()],
    )
    parts = [found.new, found.held, found.excluded]
    taken = np.concatenate([ids_of(part) for part in parts])
    assert len(set(taken.tolist())) == len(taken) == count - found.waiting
    assert len(taken) == (count if budget is None else min(count, budget))
    assert sorted(taken) == sorted(ids_of(new)[: len(taken)])
    if hold_out is None:
        assert not found.held.num_rows
        assert set(ids_of(found.excluded).tolist()) == copies & set(taken.tolist())
    else:
        assert not found.excluded.num_rows
        below = ids_of(new)[: len(taken)][share_of(ids_of(new)[: len(taken)]) < hold_out]
        assert set(below.tolist()) <= set(ids_of(found.held).tolist())
        if len(taken) and not held_before:
            assert found.held.num_rows == max(1, len(below))
        else:
            assert found.held.num_rows == len(below)


def test_a_share_is_held_out_evenly_and_always_the_same() -> None:
    many = manifest(*range(20_000))
    found = choose(many, budget=None, hold_out=0.1, held_before=1, copies=no_copies)
    assert abs(found.held.num_rows - 2000) < 4 * np.sqrt(2000 * 0.9)
    some = choose(many.slice(500, 3000), budget=None, hold_out=0.1, held_before=1, copies=no_copies)
    inside = np.isin(ids_of(found.held), ids_of(many.slice(500, 3000)))
    assert sorted(ids_of(found.held)[inside]) == sorted(ids_of(some.held))
    assert "held out to measure on" in found.lines[0]


def test_ticks_remember_what_they_took_in(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    ticks = [
        Tick(run=f"000{number}", created="", outcome="abandoned" if number == 2 else "promoted")
        for number in (1, 2, 3, 4)
    ]
    write_images(storage, f"runs/0001/{NEW_FILE}", manifest(1, 2))
    write_images(storage, f"runs/0002/{NEW_FILE}", manifest(3))
    sized = manifest(2, 4).append_column("width", pa.array([7, 8], pa.int32()))
    write_images(storage, f"runs/0003/{NEW_FILE}", sized)
    write_images(storage, f"runs/0003/{HELD_FILE}", manifest(9))
    found = taken_in(storage, ticks)  # the fourth was ended before it took anything in
    assert found["uri"].to_pylist() == ["/photos/1.jpg", "/photos/2.jpg", "/photos/4.jpg"]
    assert found["width"].to_pylist() == [None, None, 8]
    assert ids_of(taken_in(storage, ticks, HELD_FILE)).tolist() == ids_of(manifest(9)).tolist()
    assert without(manifest(1, 5), ids_of(found))["uri"].to_pylist() == ["/photos/5.jpg"]
    assert joined([]).num_rows == 0
    # What is written is a manifest that maskmill label takes.
    assert build_manifest(str(tmp_path / "runs/0001" / NEW_FILE)).equals(manifest(1, 2))


@pytest.mark.parametrize("content", ["torn", "other"])
def test_a_damaged_manifest_is_told(tmp_path: Path, content: str) -> None:
    storage = open_storage(tmp_path)
    if content == "torn":
        storage.write_bytes(NEW_FILE, b"PAR1")
    else:
        write_images(storage, NEW_FILE, pa.table({"id": ["a"], "uri": ["b"]}))
    with pytest.raises(MaskMillError) as caught:
        read_images(storage, NEW_FILE)
    assert caught.value.code == "state_damaged" and NEW_FILE in caught.value.message


def test_signed_addresses_are_refused() -> None:
    signed = manifest(1).append_column(ADDRESS, pa.array(["https://host/1.jpg?sig=x"]))
    with pytest.raises(MaskMillError) as caught:
        refuse_signed(signed)
    assert caught.value.code == "signed_address"
    refuse_signed(manifest(1))


def draw(folder: Path, *names: str, start: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        Image.fromarray(np.full((8, 8, 3), 10 * (start + index), np.uint8)).save(folder / name)


def test_copies_of_evaluation_images_are_found_under_any_name(tmp_path: Path) -> None:
    draw(tmp_path / "truth/images", "a.png", "b.png")
    for name in ("a.png", "b.png"):
        (tmp_path / "truth/masks").mkdir(exist_ok=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "truth/masks" / name)
    dataset = open_pairs(
        images=str(tmp_path / "truth/images"),
        masks=str(tmp_path / "truth/masks"),
        ontology=parse_classes("cat", background=None),
    )
    draw(tmp_path / "photos", "new.png", "also.png", start=5)
    shutil.copy(tmp_path / "truth/images/b.png", tmp_path / "photos/copied.png")
    (tmp_path / "photos/broken.png").write_bytes(b"")
    photos = build_manifest(str(tmp_path / "photos"))
    found = dict(
        zip([Path(uri).name for uri in photos["uri"].to_pylist()], find_copies(dataset)(photos), strict=True)
    )
    assert found == {"new.png": False, "also.png": False, "broken.png": False, "copied.png": True}
    assert list(find_copies(None)(photos)) == [False] * 4
    assert list(find_copies(dataset)(photos.slice(0, 0))) == []
    inside = build_manifest(str(tmp_path / "truth/images"))
    assert sorted(evaluation_ids(dataset)) == sorted(ids_of(inside))
    assert evaluation_ids(None).dtype == np.int64


def test_what_is_measured_on_is_not_trained_on(tmp_path: Path) -> None:
    storage = toy_table(tmp_path / "table", count=6)
    rows = read_ids(storage)
    none = np.empty(0, np.int64)
    parts, missing = look_through(storage, np.array([*rows[:2], 5]), none, None)
    assert len(parts) >= 1 and missing == 1
    with pytest.raises(MaskMillError) as caught:
        look_through(storage, rows[:2], rows[3:5], None)
    assert caught.value.code == "evaluation_overlaps" and "2 images" in caught.value.message


def test_a_champion_labels_new_images_first() -> None:
    corpus, new = manifest(*range(50)), ids_of(manifest(*range(40, 50)))
    assert picked(corpus, new, None) is corpus
    for budget in (4, 10, 25):
        ids = ids_of(picked(corpus, new, budget))
        assert len(ids) == budget and np.isin(ids, new).sum() == min(10, budget)
    assert picked(corpus, new, 25).equals(picked(corpus, new, 25))
