"""The lists of rows that a person should look at."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from pipeline.files.storage import open_storage
from pipeline.review.choosing import Wish, choose
from pipeline.table.committed import write_part
from pipeline.table.labels import LABEL_SCHEMA, iter_rows
from pipeline.table.record import write_table_record
from tests.pipeline.review.reviews import RECORD, make_reviewed, row_id


def test_a_second_reading_that_differs_is_a_reason(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0] * 6)
    agreement = {row_id(folder, number): value for number, value in enumerate([0.9, 0.4, 1.0, 0.8, 0.7])}
    rows = [row | {"agreement": agreement.get(row["id"])} for row in iter_rows(str(folder / "table"))]
    table = open_storage(tmp_path / "read twice")
    write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    write_table_record(table, RECORD)
    chosen = choose(table.uri, Wish(worst=2, chance=0, diverse=False))
    assert row_id(folder, 1) in {entry.id for entry in chosen.entries}

    everything = choose(table.uri, Wish(worst=6, chance=0, diverse=False))
    told = {
        entry.id: [one.text for one in entry.reasons if one.kind == "disagree"]
        for entry in everything.entries
    }
    expected = ["agrees to 0.90", "agrees to 0.40", "", "agrees to 0.80", "agrees to 0.70", ""]
    for number, text in enumerate(expected):
        assert told[row_id(folder, number)] == ([f"a second reading {text}"] if text else [])


def test_a_table_of_an_older_version_has_no_second_reading(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0, 0.5])
    rows = pa.Table.from_pylist([*iter_rows(str(folder / "table"))], schema=LABEL_SCHEMA)
    table = open_storage(tmp_path / "older")
    write_part(table, rows.drop_columns(["agreement", "segment_agreement"]))
    write_table_record(table, RECORD)
    chosen = choose(table.uri, Wish(worst=2, chance=0, diverse=False))
    assert len(chosen.entries) == 2
    assert "disagree" not in {one.kind for entry in chosen.entries for one in entry.reasons}
