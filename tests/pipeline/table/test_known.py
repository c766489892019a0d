"""Known labels take the place of those of a table, and leave to it what they do not know."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from models.errors import WrongUse
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import Ontology
from pipeline.table.committed import write_part
from pipeline.table.corrections import open_known
from pipeline.table.labels import LABEL_SCHEMA, decode_confidence, decode_mask, iter_rows, ok_row
from pipeline.table.record import write_table_record
from pipeline.table.statistics import quality, segments
from pipeline.table.views import View
from tests.pipeline.review.reviews import IGNORED, RECORD, TOYWORLD, make_reviewed, row_id, truth_of

OWN = Ontology.from_dict({"name": "own", "classes": ["spoon", *reversed(TOYWORLD.names)]})
"""Classes of the known labels: those of the table in another order, and one that it does not have."""
SPOON = 0


def in_own(labels: np.ndarray) -> np.ndarray:
    """Ids of the toy world as ids of ``OWN``."""
    return (len(TOYWORLD.names) - labels).astype(np.uint8)


def write_known(folder: Path, maps: dict[int, np.ndarray]) -> str:
    """A table of true labels in ``folder/known``: label maps by id of the image."""
    known = open_storage(folder / "known")
    rows = [
        ok_row(
            id=number, uri="moved.png", sha256=None, height=labels.shape[0], width=labels.shape[1],
            labels=labels, confidence=np.where(labels == IGNORED, 0, 255).astype(np.uint8),
            ignore_index=IGNORED,
        )
        for number, labels in maps.items()
    ]  # fmt: skip
    write_part(known, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    write_table_record(known, RECORD.model_copy(update={"ontology": OWN, "source": "truth"}))
    return known.uri


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, the first with known labels: half of it, and a spoon."""
    folder = make_reviewed(tmp_path, [0.5, 0.0, 0.6])
    labels = in_own(truth_of(folder, 0))
    labels[:24] = IGNORED
    labels[40:, :8] = SPOON
    write_known(folder, {row_id(folder, 0): labels, 5: labels})
    return folder


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for row in iter_rows(str(folder / "table"))}


def test_what_is_not_known_stays_as_the_table_has_it(folder: Path) -> None:
    known = pickle.loads(pickle.dumps(open_known(str(folder / "table"), str(folder / "known"))))
    assert "1 more are of images that the table does not have" in known.described()
    before = rows_of(folder)
    after = {row_id: known.corrected(row) for row_id, row in before.items()}
    changed = [
        number for number in range(3) if after[row_id(folder, number)] != before[row_id(folder, number)]
    ]
    assert changed == [0]
    row, old = after[row_id(folder, 0)], before[row_id(folder, 0)]
    labels, confidence = decode_mask(row["mask"]["bytes"]), decode_confidence(row["confidence"]["bytes"])
    np.testing.assert_array_equal(labels[:24], decode_mask(old["mask"]["bytes"])[:24])
    np.testing.assert_array_equal(confidence[:24], decode_confidence(old["confidence"]["bytes"])[:24])
    np.testing.assert_array_equal(labels[24:40], truth_of(folder, 0)[24:40])
    np.testing.assert_array_equal(labels[40:, 8:], truth_of(folder, 0)[40:, 8:])
    # The table has no spoons, and what is one is nothing else.
    assert (labels[40:, :8] == IGNORED).all() and (confidence[40:, :8] == 0).all()
    assert (confidence[24:40] == 255).all() and row["uri"] == old["uri"]
    assert row["quality"] == quality(confidence, labels, ignore_index=IGNORED)
    assert row["segments"] == segments(labels, confidence, ignore_index=IGNORED)


def test_a_row_that_failed_is_what_is_known_of_it(folder: Path) -> None:
    known = open_known(str(folder / "table"), str(folder / "known"))
    old = rows_of(folder)[row_id(folder, 0)]
    failed = old | {"status": "truncated", "mask": None, "confidence": None}
    row = known.corrected(failed)
    assert row["status"] == "ok" and (decode_mask(row["mask"]["bytes"])[:24] == IGNORED).all()


def test_classes_that_a_view_drops_are_not_known(folder: Path) -> None:
    truth = truth_of(folder, 0)
    name = TOYWORLD.names[int(np.bincount(truth[24:40].ravel()).argmax())]
    view = View(drop=(name,)).of(OWN)
    known = open_known(str(folder / "table"), str(folder / "known"), view)
    row = rows_of(folder)[row_id(folder, 0)]
    labels, guesses = decode_mask(known.corrected(row)["mask"]["bytes"]), decode_mask(row["mask"]["bytes"])
    dropped = truth == TOYWORLD.names.index(name)
    expected = np.where(dropped, guesses, truth)[24:40]
    assert (expected != truth[24:40]).any()
    np.testing.assert_array_equal(labels[24:40], expected)
    assert known.identity != open_known(str(folder / "table"), str(folder / "known")).identity


def test_what_does_not_fit_is_refused(folder: Path) -> None:
    table = str(folder / "table")
    with pytest.raises(WrongUse, match="no dataset"):
        open_known(table, str(folder / "nowhere"))
    small = {row_id(folder, 1): np.ones((20, 48), np.uint8)}
    known = open_known(table, write_known(folder / "small", small))
    with pytest.raises(WrongUse, match="48 x 20 pixels"):
        known.corrected(rows_of(folder)[row_id(folder, 1)])
    with pytest.raises(WrongUse, match="none of the images"):
        open_known(table, write_known(folder / "other", {7: np.ones((48, 48), np.uint8)}))
