"""The queue: the doubtful first, for reasons that are true, and no scene twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from models.errors import WrongUse
from pipeline.files.storage import open_storage
from pipeline.review.choosing import Wish, choose
from pipeline.review.spread import interleaved, spread
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, encode_mask, iter_batches, iter_rows
from pipeline.table.record import write_table_record
from pipeline.table.statistics import segments
from tests.pipeline.review.reviews import RECORD, TOYWORLD, make_reviewed, row_id

SHARES = [0.0, 0.5, 0.0, 0.3, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_reviewed(tmp_path_factory.mktemp("review"), SHARES, copies=3)


def test_doubtful_scenes_come_once(folder: Path) -> None:
    chosen = choose(str(folder / "table"), Wish(worst=3, chance=0))
    ids = [entry.id for entry in chosen.entries]
    scenes = [{row_id(folder, number, copy) for copy in range(3)} for number in (1, 3, 6)]
    # Each of the three wrong scenes is there three times; the queue has each of them once.
    assert [len(scene & set(ids)) for scene in scenes] == [1, 1, 1]
    assert ids[0] in scenes[0] and "quality" in {one.kind for one in chosen.entries[0].reasons}
    assert (chosen.embedding, chosen.notes) == ("toyclip", [])
    # More images than are doubtful: the others are different, which is no reason to leave out a doubtful one.
    more = {entry.id for entry in choose(str(folder / "table"), Wish(worst=5, chance=0)).entries}
    assert len(more) == 5 and [len(scene & more) for scene in scenes] == [1, 1, 1]
    # Without embeddings the worst scene comes three times.
    alike = choose(str(folder / "table"), Wish(worst=3, chance=0, diverse=False))
    assert {entry.id for entry in alike.entries} == scenes[0]


def test_chance_is_a_fixed_sample_that_leaves_out_what_is_seen(folder: Path) -> None:
    seen = np.sort([row_id(folder, number, copy) for number in range(6) for copy in range(3)])
    wish = Wish(worst=0, chance=9, leave_out=seen)
    first, again = (choose(str(folder / "table"), wish).entries for _ in range(2))
    other = choose(str(folder / "table"), Wish(worst=0, chance=9, leave_out=seen, seed=1)).entries
    assert first == again and first != other
    ids = {entry.id for entry in first}
    assert len(ids) == 9 and not ids & set(seen.tolist())
    assert {one.kind for entry in first for one in entry.reasons} == {"random"}


def test_a_second_table_shows_where_two_disagree(folder: Path, tmp_path: Path) -> None:
    other, rows = open_storage(tmp_path / "other"), []
    for row in iter_rows(str(folder / "table")):
        labels = np.zeros((48, 48), np.uint8)
        if row["id"] != row_id(folder, 4, 1):  # of this image alone, the two differ: it is all grass here
            rows.append(row)
            continue
        sure = np.full((48, 48), 255, np.uint8)
        told = segments(labels, sure, ignore_index=255)
        rows.append(row | {"mask": {"bytes": encode_mask(labels), "path": None}, "segments": told})
    write_part(other, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    write_table_record(other, RECORD)
    table = str(folder / "table")
    chosen = choose(table, Wish(worst=2, chance=0, against=other.uri, diverse=False))
    found = {entry.id: [one for one in entry.reasons if one.kind == "disagree"] for entry in chosen.entries}
    (reason,) = found[row_id(folder, 4, 1)]
    assert reason.text.startswith(other.uri) and reason.text.endswith("%")
    assert sum(map(len, found.values())) == 1
    with pytest.raises(WrongUse, match="no class in common"):
        strange = RECORD.ontology.model_copy(
            update={"classes": (TOYWORLD.classes[0].model_copy(update={"name": "x"}),)}
        )
        write_table_record(other, RECORD.model_copy(update={"ontology": strange}))
        choose(table, Wish(worst=2, chance=0, against=other.uri))


def test_floods_and_emptiness_are_reasons(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0] * 6)
    table = open_storage(folder / "table")
    for name in table.list("labels"):
        rows = []
        for row in [one for batch in iter_batches(table, names=[name]) for one in batch.to_pylist()]:
            flood, empty = row["id"] == row_id(folder, 0), row["id"] == row_id(folder, 1)
            if flood or empty:
                labels = np.full((48, 48), 2 if flood else 255, np.uint8)
                sure = np.full((48, 48), 255, np.uint8)
                row["segments"] = segments(labels, sure, ignore_index=255)
            rows.append(row)
        write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    chosen = choose(str(folder / "table"), Wish(worst=6, chance=0, diverse=False))
    told = {entry.id: {one.kind: one.text for one in entry.reasons} for entry in chosen.entries}
    assert told[row_id(folder, 0)]["floods"] == f"{TOYWORLD.names[2]} covers 100 %"
    assert told[row_id(folder, 1)]["empty"] == "nothing labelled"


def test_images_that_are_gone_are_left_out_and_told(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.5, 0.4, 0.3, 0.0])
    (folder / "images" / "scene_000_0.png").unlink()
    (folder / "images" / "scene_001_0.png").write_bytes((folder / "images" / "scene_002_0.png").read_bytes())
    chosen = choose(str(folder / "table"), Wish(worst=4, chance=0))
    assert {entry.id for entry in chosen.entries} == {row_id(folder, 2), row_id(folder, 3)}
    assert "2 candidates cannot be shown" in " ".join(chosen.notes)


def test_images_too_large_to_be_painted_are_left_out_and_told(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.5, 0.4, 0.3, 0.0])
    table = open_storage(folder / "table")
    large = {row_id(folder, 0), row_id(folder, 3)}
    for name in table.list("labels"):
        rows = [one for batch in iter_batches(table, names=[name]) for one in batch.to_pylist()]
        # Nothing of it is read.
        rows = [row | {"height": 20_000, "width": 20_000} if row["id"] in large else row for row in rows]
        write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    known = np.array([row_id(folder, 3)])
    chosen = choose(str(folder / "table"), Wish(worst=4, chance=2, known=known, honeypots=1, diverse=False))
    assert {entry.id for entry in chosen.entries} == {row_id(folder, 1), row_id(folder, 2)}
    (note,) = chosen.notes
    assert note.startswith("2 images have more than 100,000,000 pixels") and "maskmill show" in note


def test_spread_takes_the_far_and_the_heavy() -> None:
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0.6, 0.8], [-1, 0]], float)
    assert spread(vectors, np.array([0.9, 1, 0.5, 0.5, 0.5]), 3).tolist() == [1, 4, 2]
    assert sorted(spread(vectors, np.ones(5), 9).tolist()) == [0, 1, 2, 3, 4]
    # A copy of what is chosen comes last, however heavy.
    assert spread(vectors, np.array([10, 11, 1, 1, 1.0]), 5).tolist()[-1] == 0


def test_interleaved_lists_are_even() -> None:
    order = interleaved(4, 2).tolist()
    assert sorted(order) == list(range(6)) and [at for at in order if at < 4] == [0, 1, 2, 3]
    assert {order.index(4) < 3, order.index(5) >= 3} == {True}
