"""What people say of labels takes their place, wherever labels are believed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from models.errors import WrongUse
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.tables import evaluate_table
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.names import Naming
from pipeline.formats.samples import LeftOut, Source, samples_of
from pipeline.ontology.ontology import Ontology
from pipeline.review.desk import encode_page_mask, open_desk
from pipeline.table.committed import write_part
from pipeline.table.corrections import OFF, Corrections, open_corrections
from pipeline.table.labels import LABEL_SCHEMA, decode_mask, iter_rows, table_files
from pipeline.table.record import write_table_record
from tests.pipeline.review.reviews import IGNORED, RECORD, TOYWORLD, make_reviewed, queue_of, row_id, truth_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images: painted from the truth, with a hole; accepted; rejected; not looked at."""
    folder = make_reviewed(tmp_path, [0.5, 0.0, 0.6, 0.4])
    desk = open_desk(queue_of(folder, 4))
    painted = truth_of(folder, 0).copy()
    painted[:4] = IGNORED
    desk.save(row_id(folder, 0), "painted", encode_page_mask(painted), reviewer="Ann", follows=None)
    desk.save(row_id(folder, 1), "accepted", None, reviewer="Ann", follows=None)
    desk.save(row_id(folder, 2), "rejected", None, reviewer="Ann", follows=None)
    return folder


def found(folder: Path, given: str | None = None) -> Corrections:
    corrections = open_corrections(str(folder / "table"), given)
    assert corrections is not None
    return corrections


def rewrite(table: Storage, rows: list[dict[str, Any]]) -> None:
    """Put other rows in the place of those of a table."""
    for name in table.list("labels"):
        table.delete(name)
    write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))


def test_they_are_found_beside_the_table_or_where_they_are_given(folder: Path) -> None:
    corrections = found(folder)
    assert "3 corrections" in corrections.described() and "1 of them rejected" in corrections.described()
    assert corrections.rejected.tolist() == [row_id(folder, 2)] and len(corrections.outdated) == 0
    place = folder / "table" / "corrections"
    assert open_corrections(str(folder / "table"), OFF) is None
    assert found(folder, str(place)).identity == corrections.identity
    place.rename(folder / "elsewhere")
    assert open_corrections(str(folder / "table")) is None
    assert len(found(folder, str(folder / "elsewhere")).files) == 3
    with pytest.raises(WrongUse, match="no label table"):
        open_corrections(str(folder / "table"), str(folder / "nowhere"))
    with pytest.raises(WrongUse, match="labels of a model"):
        open_corrections(str(folder / "table"), str(folder / "table"))


def test_a_row_is_that_of_its_correction(folder: Path) -> None:
    corrections = pickle.loads(pickle.dumps(found(folder)))
    rows = {row["id"]: corrections.corrected(row) for row in iter_rows(str(folder / "table"))}
    first = decode_mask(rows[row_id(folder, 0)]["mask"]["bytes"])
    np.testing.assert_array_equal(first[4:], truth_of(folder, 0)[4:])
    assert (first[:4] == IGNORED).all() and rows[row_id(folder, 0)]["quality"] == 1
    assert [rows[row_id(folder, number)]["status"] for number in range(4)] == ["ok", "ok", "rejected", "ok"]


def test_one_of_another_image_does_not_count(folder: Path) -> None:
    # The image has changed, and was labelled again: what was said of the old one is not true of it.
    Image.fromarray(np.zeros((48, 48, 3), np.uint8)).save(folder / "images" / "scene_000_0.png")
    table = open_storage(folder / "table")
    rows = {row["id"]: row for row in iter_rows(table)}
    rows[row_id(folder, 0)]["sha256"] = b"n" * 32
    rewrite(table, [*rows.values()])
    corrections = found(folder)
    assert corrections.outdated.tolist() == [row_id(folder, 0)] and len(corrections.files) == 2
    assert "1 more are of images that have changed" in corrections.described()


def test_one_of_an_image_that_the_table_does_not_have_does_not_count(folder: Path) -> None:
    table = open_storage(folder / "table")
    rewrite(table, [row for row in iter_rows(table) if row["id"] != row_id(folder, 0)])
    corrections = found(folder)
    assert corrections.elsewhere.tolist() == [row_id(folder, 0)] and len(corrections.files) == 2
    assert "1 more are of images that the table does not have" in corrections.described()


def test_classes_are_matched_by_name(folder: Path) -> None:
    turned = Ontology.from_dict({"name": "turned", "classes": [*reversed(TOYWORLD.names[2:]), "spoon"]})
    write_table_record(open_storage(folder / "table"), RECORD.model_copy(update={"ontology": turned}))
    row = next(row for row in iter_rows(str(folder / "table")) if row["id"] == row_id(folder, 0))
    labels = decode_mask(found(folder).corrected(row)["mask"]["bytes"])
    truth = truth_of(folder, 0)[4:]
    for number, name in enumerate(TOYWORLD.names):
        expected = turned.names.index(name) if name in turned.names else turned.ignore_index
        assert (labels[4:][truth == number] == expected).all()
    other = Ontology.from_dict({"name": "other", "classes": ["spoon"]})
    write_table_record(open_storage(folder / "table"), RECORD.model_copy(update={"ontology": other}))
    with pytest.raises(WrongUse, match="--corrections off"):
        open_corrections(str(folder / "table"))


def test_an_evaluation_measures_what_people_said(folder: Path) -> None:
    truth = open_pairs(images=str(folder / "images"), masks=str(folder / "truth"), ontology=TOYWORLD)

    def measured(corrections: Corrections | None) -> dict[str, float | None]:
        result = evaluate_table(
            str(folder / "table"), truth, class_names=TOYWORLD.names, ignore_index=IGNORED, boundary=False,
            corrections=corrections,
        )  # fmt: skip
        return {image.name: image.miou for image in result.images} | {"failed": result.failed["rejected"]}

    before, after = measured(None), measured(found(folder))
    assert before["failed"] == 0 and after["failed"] == 1 and "scene_002_0" not in after
    assert before["scene_003_0"] == after["scene_003_0"] and after["scene_000_0"] > before["scene_000_0"]  # type: ignore[operator]


def test_an_export_has_what_people_said_and_only_what_is_asked_for(folder: Path) -> None:
    storage, files = table_files(str(folder / "table"))
    left_out: list[LeftOut] = []

    def exported(**wanted: object) -> dict[int, np.ndarray]:
        source = Source(storage, corrections=found(folder), **wanted)  # type: ignore[arg-type]
        return {
            sample.id: sample.labels
            for file in files
            for sample in samples_of(source, file, 0, Naming(()), left_out.append)
        }

    samples = exported()
    assert set(samples) == {row_id(folder, number) for number in (0, 1, 3)}
    assert [(row.id, row.reason) for row in left_out] == [(row_id(folder, 2), "rejected")]
    np.testing.assert_array_equal(samples[row_id(folder, 0)][4:], truth_of(folder, 0)[4:])
    assert set(exported(only=frozenset([row_id(folder, 1)]))) == {row_id(folder, 1)}
