from __future__ import annotations

import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.faults.damage import DAMAGES, parts
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import stable_id
from pipeline.files.storage import open_storage
from pipeline.table.changed import Images
from pipeline.table.committed import part_files, read_part, write_part
from pipeline.table.labels import (
    LABEL_SCHEMA,
    decode_confidence,
    decode_mask,
    failed_row,
    iter_rows,
    ok_row,
    summarise,
)
from pipeline.table.statistics import softmin
from pipeline.table.verify import PROBLEMS, Verification, check_part, verify

CLASSES = 3


def _image(folder: Path, number: int) -> str:
    path = folder / f"{number}.img"
    path.write_bytes(b"image %d" % number)
    return str(path)


def _row(uri: str, seed: int) -> dict[str, Any]:
    sha256 = hashlib.sha256(Path(uri).read_bytes()).digest()
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (20 + seed, 30))
    confidence = rng.integers(0, 256, labels.shape).astype(np.uint8)
    return ok_row(
        id=stable_id(uri), uri=uri, sha256=sha256, height=20 + seed, width=30, labels=labels,
        confidence=confidence, ignore_index=255,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three parts, with rows that failed."""
    folder = tmp_path_factory.mktemp("verify")
    table = open_storage(folder / "table")
    uris = [_image(folder, number) for number in range(10)]
    rows = [_row(uri, number) for number, uri in enumerate(uris)]
    rows[4] = failed_row(id=rows[4]["id"], uri=uris[4], status="truncated", error="cut", sha256=bytes(32))
    rows[8] = failed_row(id=rows[8]["id"], uri=uris[8], status="not_found", error="gone")
    for some in (rows[:3], rows[3:7], rows[7:]):
        write_part(table, pa.Table.from_pylist(some, schema=LABEL_SCHEMA))
    table.write_json("dataset.json", {"counts": summarise(table)})
    return folder / "table"


@pytest.fixture
def table(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "table")


@pytest.fixture(scope="module")
def manifest(whole: Path) -> pa.Table:
    rows = list(iter_rows(whole, ["id", "uri"]))
    return pa.table({"id": [row["id"] for row in rows], "uri": [row["uri"] for row in rows]})


def _verified(table: Path, manifest: pa.Table | None = None, images: Images | None = None) -> Verification:
    storage = open_storage(table)
    check = functools.partial(
        check_part, storage=storage, num_classes=CLASSES, ignore_index=255, images=images
    )
    record = json.loads((table / "dataset.json").read_text())
    corpus = None if manifest is None else Corpus.of(manifest)
    return verify(map(check, part_files(storage)), corpus=corpus, recorded=record.get("counts", {}))


def _contents(table: Path) -> dict[int, dict[str, Any]]:
    return {row["id"]: row for row in iter_rows(table)}


def test_a_whole_table_is_whole(table: Path, manifest: pa.Table) -> None:
    found = _verified(table, manifest, Images(manifest))
    # The file of one row was not there when it was labelled, and that of another has changed since.
    assert found.counts == {"image_changed": 1}
    assert (found.rows, found.parts) == (10, 3)
    assert _verified(table, manifest).to_dict() == {"rows": 10, "parts": 3, "problems": {}}


def test_the_quality_of_an_older_table_is_that_of_its_time(table: Path) -> None:
    storage = open_storage(table)
    (part,) = part_files(storage)[:1]
    rows = read_part(storage, part).to_pylist()
    for row in rows:
        if row["status"] == "ok":
            confidence = decode_confidence(row["confidence"]["bytes"])
            row["quality"] = softmin(confidence, decode_mask(row["mask"]["bytes"]), ignore_index=255)
    write_part(storage, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    check = functools.partial(check_part, part, storage=storage, num_classes=CLASSES, ignore_index=255)
    assert check(score="softmin").problems == []
    assert {problem.kind for problem in check().problems} == {"statistics_differ"}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_and_repaired_so_that_labelling_makes_the_table_whole(
    table: Path, manifest: pa.Table, name: str
) -> None:
    damage, kinds = DAMAGES[name]
    before = _contents(table)
    hurt = parts(table)[1]
    damage(hurt)
    left = {path.read_bytes() for path in parts(table)}
    found = _verified(table, manifest)
    assert kinds <= found.counts.keys() <= PROBLEMS.keys()
    assert all(found.examples[kind] for kind in found.counts)
    json.dumps(found.to_dict())

    done = found.repair(open_storage(table))
    assert bool(done) is bool(found.counts.keys() - {"id_missing"})
    # Whatever was there is in the table or beside it.
    assert left <= {path.read_bytes() for path in table.glob("*/*.parquet")}
    again = _verified(table, manifest)
    assert set(again.counts) <= {"id_missing"}, again.examples
    after = _contents(table)
    assert after == {row_id: row for row_id, row in before.items() if row_id in after}
    assert len(after) == 10 - again.counts.get("id_missing", 0) >= 5
    new = [row for row_id, row in before.items() if row_id not in after]
    if new:  # what the next run labels
        write_part(open_storage(table), pa.Table.from_pylist(new, schema=LABEL_SCHEMA))
    assert not set(_verified(table, manifest).counts) - {"counts_differ"}
    assert _contents(table) == before


def test_all_damage_at_once(whole: Path, manifest: pa.Table, tmp_path: Path) -> None:
    """Of parts of one row each, so that every kind hits another one."""
    table = tmp_path / "table"
    storage = open_storage(table)
    rows = [row for row in _contents(whole).values() if row["status"] == "ok"]
    storage.write_json("dataset.json", {})
    names = [name for name in DAMAGES if name not in ("a row lost", "miscounted")]
    uris = [_image(tmp_path, 100 + number) for number in range(2 * len(names))]
    rows = [_row(uri, number % 7) for number, uri in enumerate(uris)]
    written = [
        write_part(storage, pa.Table.from_pylist(rows[2 * n : 2 * n + 2], schema=LABEL_SCHEMA))
        for n in range(len(names))
    ]
    storage.write_json("dataset.json", {"counts": summarise(storage)})
    for name, part in zip(names, written, strict=True):
        DAMAGES[name][0](table / part)
    every = pa.table({"id": [row["id"] for row in rows], "uri": [row["uri"] for row in rows]})
    found = _verified(table, every)
    assert set(found.counts) >= set().union(*(DAMAGES[name][1] for name in names))
    found.repair(storage)
    assert set(_verified(table, every).counts) == {"id_missing"}


def test_images_that_are_unknown_missing_or_changed_are_counted(table: Path, manifest: pa.Table) -> None:
    other = manifest.slice(2)
    more = pa.table({"id": [77], "uri": ["/new.jpg"]})
    found = _verified(table, pa.concat_tables([other, more]))
    assert found.counts == {"id_missing": 1, "id_unknown": 2}
    assert found.examples["id_missing"][0].uri == "/new.jpg"
    assert not found.repair(open_storage(table)) and len(_contents(table)) == 10


def test_changed_and_lost_images_are_found_by_their_hashes(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "table")
    uris = [_image(tmp_path, number) for number in range(4)]
    rows = [_row(uri, number) for number, uri in enumerate(uris)]
    write_part(storage, pa.Table.from_pylist(rows, schema=LABEL_SCHEMA))
    storage.write_json("dataset.json", {})
    Path(uris[1]).write_bytes(b"other")
    Path(uris[2]).unlink()
    Path(uris[3]).unlink()
    Path(uris[3]).mkdir()
    found = _verified(tmp_path / "table", None, Images(None))
    assert found.counts == {"image_changed": 1, "image_gone": 1, "image_unreadable": 1}
    assert found.examples["image_changed"][0].uri == uris[1]
    assert not found.repair(storage)


def test_tables_of_older_versions_are_whole(table: Path, manifest: pa.Table) -> None:
    for number, part in enumerate(parts(table)):
        old = pq.read_table(part).drop_columns(["version"])
        part.unlink()
        pq.write_table(old, part.with_name(f"r_00000{number}-0.parquet"))
    assert not _verified(table, manifest).counts


def test_a_part_that_goes_while_it_is_checked_is_no_damage(table: Path) -> None:
    checked = check_part(
        "labels/none.parquet", storage=open_storage(table), num_classes=CLASSES, ignore_index=255
    )
    assert not checked.problems and not len(checked.ids)


def test_what_a_kill_left_is_finished(table: Path) -> None:
    storage = open_storage(table)
    (table / "labels" / ".part-1.parquet.x.tmp").write_bytes(b"torn")
    row = next(row for row in _contents(table).values() if row["status"] == "not_found")
    labelled = _row(row["uri"], 8)
    write_part(storage, pa.Table.from_pylist([labelled], schema=LABEL_SCHEMA), "relabelled")
    found = _verified(table)
    assert not found.counts
    done = found.repair(storage)
    assert ["half-written" in done[0], "1 row(s) replaced" in done[1], "counts" in done[2]] == [True] * 3
    assert _contents(table)[row["id"]]["status"] == "ok" and not _verified(table).counts
    assert sorted(path.name for path in table.iterdir()) == ["dataset.json", "labels"] or not list(
        (table / "relabelled").iterdir()
    )


def test_large_maps_are_checked_in_strips(
    table: Path, manifest: pa.Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.table.labels.MOST_DECODED", 0)
    assert not _verified(table, manifest).counts
    part = sorted((table / "labels").glob("*.parquet"))[0]
    rows = pq.read_table(part).to_pylist()
    labelled = [row for row in rows if row["status"] == "ok"]
    labelled[0]["mask"]["bytes"] = labelled[0]["mask"]["bytes"][:-30]
    labelled[-1]["quality"] = 1.0
    pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), part)
    counts = _verified(table, manifest).counts
    assert set(counts) <= {"mask_damaged", "statistics_differ"} and "mask_damaged" in counts
