from __future__ import annotations

import hashlib
import shutil
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
from pipeline.ontology.reading import parse_classes
from pipeline.retraining.config import When
from pipeline.retraining.intake import (
    HELD_FILE,
    HELD_TABLE,
    NEW_FILE,
    TABLE,
    Known,
    begins,
    choose,
    evaluation_ids,
    ids_of,
    joined,
    known_in,
    look_through,
    picked,
    read_images,
    refuse_signed,
    share_of,
    table_digests,
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


def digests(table: pa.Table) -> list[bytes]:
    """As if every image had its own content."""
    return [hashlib.sha256(uri.encode()).digest() for uri in table["uri"].to_pylist()]


DIFFERENT = Known(digests, lambda: ())


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


@settings(max_examples=80, deadline=None)
@given(
    contents=st.lists(st.none() | st.integers(0, 30), max_size=60),
    budget=st.none() | st.integers(1, 70),
    hold_out=st.none() | st.floats(0.01, 0.9),
    held_before=st.integers(0, 3),
    measured=st.sets(st.integers(0, 30)),
    trained=st.sets(st.integers(0, 30)),
)
def test_every_new_image_goes_to_one_place_and_copies_never_to_two_sides(
    contents: list[int | None],
    budget: int | None,
    hold_out: float | None,
    held_before: int,
    measured: set[int],
    trained: set[int],
) -> None:
    new = manifest(*range(len(contents)))
    digest = [hashlib.sha256(bytes([number])).digest() for number in range(31)]
    of_uri = {
        uri: None if one is None else digest[one]
        for uri, one in zip(new["uri"].to_pylist(), contents, strict=True)
    }
    known = Known(
        lambda table: [of_uri[uri] for uri in table["uri"].to_pylist()],
        lambda: {digest[number] for number in measured},
        lambda asked: {digest[number] for number in trained} & set(asked),
    )
    found = choose(new, budget=budget, hold_out=hold_out, held_before=held_before, known=known)
    parts = [found.new, found.held, found.excluded]
    taken = np.concatenate([ids_of(part) for part in parts])
    assert len(set(taken.tolist())) == len(taken) == len(contents) - found.waiting
    assert len(taken) == (len(contents) if budget is None else min(len(contents), budget))
    assert sorted(taken) == sorted(ids_of(new)[: len(taken)])
    learnt, held, out = ([of_uri[uri] for uri in part["uri"].to_pylist()] for part in parts)
    contents_held = [one for one in held if one is not None]
    assert len(set(contents_held)) == len(contents_held)
    assert not {*learnt} & ({*contents_held} | {digest[number] for number in measured})
    assert not {*contents_held} & {digest[number] for number in trained | measured}
    assert {*out} <= {*contents_held} | {digest[number] for number in measured}
    if hold_out is None:
        assert not held
    elif not held_before and {*learnt} - {digest[number] for number in trained}:
        assert held


def test_a_share_is_held_out_evenly_and_copies_that_arrive_later_fall_on_the_same_side() -> None:
    many = manifest(*range(20_000))
    found = choose(many, budget=None, hold_out=0.1, held_before=1, known=DIFFERENT)
    assert abs(found.held.num_rows - 2000) < 4 * np.sqrt(2000 * 0.9)
    assert "held out to measure on" in found.lines[0]
    content = dict(
        zip(manifest(*range(3000))["uri"].to_pylist(), digests(many.slice(500, 3000)), strict=True)
    )
    copies = Known(lambda table: [content[uri] for uri in table["uri"].to_pylist()], lambda: ())
    later = choose(manifest(*range(3000)), budget=None, hold_out=0.1, held_before=1, known=copies)
    assert {content[uri] for uri in later.held["uri"].to_pylist()} == {*digests(found.held)} & {
        *content.values()
    }
    unread = Known(lambda table: [None] * table.num_rows, lambda: ())
    by_id = choose(many, budget=None, hold_out=0.1, held_before=1, known=unread)
    assert ids_of(by_id.held).tolist() == ids_of(many)[share_of(ids_of(many)) < 0.1].tolist()


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
    assert caught.value.code == "file_damaged" and NEW_FILE in caught.value.message


def test_signed_addresses_are_refused() -> None:
    signed = manifest(1).append_column(ADDRESS, pa.array(["https://host/1.jpg?sig=x"]))
    with pytest.raises(MaskMillError) as caught:
        refuse_signed(signed)
    assert caught.value.code == "wrong_use"
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
    known = known_in(open_storage(tmp_path / "out"), dataset)
    found = choose(photos, budget=None, hold_out=None, held_before=0, known=known)
    assert [Path(uri).name for uri in found.excluded["uri"].to_pylist()] == ["copied.png"]
    assert sorted(Path(uri).name for uri in found.new["uri"].to_pylist()) == [
        "also.png",
        "broken.png",
        "new.png",
    ]
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
    assert caught.value.code == "dataset_invalid" and "2 images" in caught.value.message
    some = sorted(table_digests(storage))[:1]
    with pytest.raises(MaskMillError) as caught:
        look_through(storage, rows[:2], none, None, known=some)
    assert caught.value.code == "dataset_invalid" and "images that are measured on" in caught.value.message


def test_copies_are_known_by_the_tables_of_a_retraining(tmp_path: Path) -> None:
    known = known_in(open_storage(tmp_path), None)
    assert not known.measured() and not known.trained({b""})  # before the first tick
    toy_table(tmp_path / HELD_TABLE, count=3)
    toy_table(tmp_path / TABLE, count=4)
    held = table_digests(open_storage(tmp_path / HELD_TABLE))
    learnt = table_digests(open_storage(tmp_path / TABLE))
    assert held and known.measured() == held
    one = next(iter(learnt))
    assert known.trained({one, bytes(32)}) == {one}


def test_a_champion_labels_new_images_first() -> None:
    corpus, new = manifest(*range(50)), ids_of(manifest(*range(40, 50)))
    assert picked(corpus, new, None) is corpus
    for budget in (4, 10, 25):
        ids = ids_of(picked(corpus, new, budget))
        assert len(ids) == budget and np.isin(ids, new).sum() == min(10, budget)
    assert picked(corpus, new, 25).equals(picked(corpus, new, 25))
