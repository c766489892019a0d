"""``maskmill review``: a queue beside the table, and what is told of it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from jobs.review import Review
from models.errors import WrongUse
from pipeline.review.desk import open_desk
from pipeline.review.queue import read_queue
from tests.pipeline.review.reviews import make_reviewed, row_id


def run(table: Path, **options: object) -> str:
    console = Console(file=io.StringIO(), width=200)
    assert Review(table=str(table), **options).run(console) == 0  # type: ignore[arg-type]
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_queue_with_honeypots_its_agreement_and_the_next_queue(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0, 0.6, 0.0, 0.5, 0.0, 0.0, 0.0, 0.4])
    table = folder / "table"
    asked = {
        "worst": 2,
        "random": 1,
        "diverse": False,
        "honeypots": str(folder / "truth"),
        "honeypot_share": 0.4,
    }
    told = run(table, **asked)
    queue = read_queue(str(table))
    assert "honeypots    2" in told and "serve --review" in told
    assert sum(entry.known for entry in queue.entries) == 2 and 4 <= len(queue.entries) <= 5
    assert "nobody has reviewed any yet" in run(table, agreement=True)
    with pytest.raises(WrongUse, match="is a queue of"):
        run(table, **asked)

    # A person looks at all of them; the next queue has others.
    desk = open_desk(queue)
    for entry in queue.entries:
        desk.save(entry.id, "accepted", None, reviewer="Ann", follows=None)
    assert "Ann: " in run(table, agreement=True)
    told = run(table, worst=8, random=0, diverse=False, overwrite=True)
    seen, after = ({entry.id for entry in one.entries} for one in (queue, read_queue(str(table))))
    everything = {row_id(folder, number) for number in range(8)}
    assert after == everything - seen and f"left out     {len(seen)}" in told
    run(table, worst=8, random=0, diverse=False, overwrite=True, again=True)
    assert {entry.id for entry in read_queue(str(table)).entries} == everything


def test_what_people_say_goes_where_it_is_asked_to(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.5, 0.0])
    run(folder / "table", worst=1, random=0, diverse=False, output=str(tmp_path / "q.json"),
        corrections=str(tmp_path / "said"))  # fmt: skip
    desk = open_desk(read_queue(str(tmp_path / "q.json")))
    desk.save(desk.entries[0].id, "rejected", None, reviewer="", follows=None)
    assert (tmp_path / "said" / "dataset.json").exists() and not (folder / "table" / "corrections").exists()
