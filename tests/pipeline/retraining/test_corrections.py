"""Corrections of several tables, as a tick believes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.files.storage import open_storage
from pipeline.retraining.corrections import freeze
from pipeline.review.desk import encode_page_mask, open_desk
from pipeline.table.corrections import open_corrections
from pipeline.table.labels import decode_mask, iter_rows
from tests.pipeline.review.reviews import make_reviewed, queue_of, row_id, truth_of


def test_the_latest_of_each_image_is_kept_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second table of the same images, as a new champion makes it, is reviewed after the first."""
    folder = make_reviewed(tmp_path / "a", [0.5, 0.4, 0.0, 0.2])
    first, place = open_storage(folder / "table"), open_storage(tmp_path / "frozen")
    second = open_storage(folder / "again")
    assert freeze([first], place) == 0 and not place.exists("dataset.json")
    for name in first.list(recursive=True):
        second.write_bytes(name, first.read_bytes(name))
    queue = queue_of(folder, 4)
    saying = [(open_desk(queue), "2026-01-01T00:00:00Z")]
    other = queue.model_copy(update={"table": second.uri, "corrections": second.uri_of("corrections")})
    saying.append((open_desk(other), "2026-01-02T00:00:00Z"))

    def say(at: int, number: int, decision: str) -> None:
        desk, when = saying[at]
        monkeypatch.setattr("pipeline.review.saving.now", lambda: when)
        mask = encode_page_mask(truth_of(folder, number)) if decision == "painted" else None
        desk.save(row_id(folder, number), decision, mask, reviewer="Ann", follows=None)  # type: ignore[arg-type]

    say(0, 0, "rejected")
    say(0, 1, "painted")
    say(0, 3, "accepted")
    say(1, 0, "painted")  # another opinion, later
    say(1, 2, "accepted")
    # Whichever table is given last.
    for tables in ([first, second], [second, first]):
        assert freeze(tables, place) == 4
        said = open_corrections(second.uri, place.uri)
        assert said is not None and len(said.files) == 4 and not len(said.rejected)
    rows = {row["id"]: row for row in iter_rows(place)}
    np.testing.assert_array_equal(decode_mask(rows[row_id(folder, 0)]["mask"]["bytes"]), truth_of(folder, 0))
    # People go on: what the tick believes stays.
    before = open_corrections(second.uri, place.uri)
    say(1, 3, "rejected")
    after = open_corrections(second.uri, place.uri)
    assert before is not None and after is not None and before.identity == after.identity
