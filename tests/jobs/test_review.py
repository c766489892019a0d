"""``maskmill review``: a queue beside the table, and what is told of it."""

from __future__ import annotations

import io
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from jobs.review import Review
from models.errors import WrongUse
from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import open_storage
from pipeline.review.desk import open_desk
from pipeline.review.queue import read_queue
from pipeline.serving.limits import Limits
from pipeline.serving.review.app import create_review_app
from pipeline.table.committed import write_part
from pipeline.table.corrections import open_corrections
from pipeline.table.labels import LABEL_SCHEMA, iter_rows
from pipeline.table.record import write_table_record
from tests.pipeline.review.reviews import RECORD, make_reviewed, row_id
from tests.pipeline.serving.harness import serving
from tests.pipeline.serving.review.test_review_api import FIRST, painting


def run(table: Path | str, **options: object) -> str:
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


@pytest.mark.slow
def test_a_review_in_an_object_store(tmp_path: Path, s3: dict[str, str]) -> None:
    """Images, table, truth, queue and corrections in S3: made, served, saved over HTTP, and believed."""
    folder, store = make_reviewed(tmp_path, [0.5, 0.4, 0.0, 0.0]), open_storage("s3://reviewed")
    boto3.client("s3").create_bucket(Bucket="reviewed")
    for name in ("images", "truth"):
        for path in (folder / name).iterdir():
            store.write_bytes(f"{name}/{path.name}", path.read_bytes())
    rows = [
        row | {"uri": (uri := store.uri_of(f"images/{Path(row['uri']).name}")), "id": stable_id(uri)}
        for row in iter_rows(folder / "table")
    ]
    table = store.child("table")
    write_part(table, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    write_table_record(table, RECORD)

    told = run(table.uri, honeypots="s3://reviewed/truth", worst=2, random=0)
    assert "s3://reviewed/table/review.json: 3 images" in told
    queue = read_queue(table.uri)
    assert len(queue.entries) == 3
    rejected, *others = [entry.id for entry in queue.entries]
    limits = Limits(per_minute=0)
    with serving(create_review_app(open_desk(queue), limits), limits) as server:
        for entry in queue.entries:
            path = f"/api/review/{entry.id}"
            assert server.get(f"{path}/image").status == 200
            said = {"decision": "rejected", "reviewer": "Ann"}
            if entry.id != rejected:
                said = painting(np.asarray(Image.open(folder / "truth" / Path(entry.uri).name)))
            assert server.put(path, said, **FIRST).status == 200
    corrections = open_corrections(table.uri)
    assert corrections is not None and corrections.place == "s3://reviewed/table/corrections"
    assert (corrections.ids.tolist(), corrections.rejected.tolist()) == (
        sorted([rejected, *others]), [rejected],
    )  # fmt: skip
    assert "Ann: " in run(table.uri, agreement=True)
    told = run(table.uri, worst=2, random=0, diverse=False, overwrite=True)
    assert "left out     3" in told and len(read_queue(table.uri).entries) == 1
