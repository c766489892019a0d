"""A run over partitions of a corpus, without workers: what it chooses, commits, and finds after a kill."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import build_corpus, build_manifest, read_corpus, stable_id, write_manifest
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.reading import parse_classes
from pipeline.table.committed import (
    LABELS_DIR,
    RELABELLED_DIR,
    SET_ASIDE_DIR,
    Replaced,
    part_files,
    part_name,
    write_part,
)
from pipeline.table.increment import Table, choose, commit, open_table, record_counts, unfinished
from pipeline.table.labels import LABEL_SCHEMA, Counts, failed_row, iter_rows
from pipeline.table.record import TableRecord, read_table_record, write_table_record
from pipeline.table.verify import Checked, verify

WEIGHTS = {"model": "m", "pretrained": "p", "fingerprint": "f"}
RECORD = TableRecord(ontology=parse_classes("cat, dog"), recipe={}, weights=WEIGHTS)
FILES = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Killed(Exception):
    pass


def _uri(number: int) -> str:
    return f"/p/{number}.jpg"


def _corpus(folder: Path, count: int, most: int) -> Corpus:
    (folder / "list.txt").write_text("\n".join(map(_uri, range(count))))
    return build_corpus(folder / "list.txt", most=most)


def _rows(ids: list[int], status: str) -> pa.Table:
    rows = [failed_row(id=row_id, uri="u", status=status, error="it was") for row_id in ids]
    return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)


def _run(
    storage: Storage,
    corpus: Corpus,
    *,
    round_size: int = 1,
    part: int = 3,
    status: str = "empty",
    step: Callable[[str], None] = lambda _what: None,
    retry_failed: tuple[str, ...] | None = None,
) -> list[int]:
    """What ``maskmill label`` does beside labelling; returns the size of each round."""
    if not storage.exists("dataset.json"):
        write_table_record(storage, RECORD)
    table = open_table(storage, read_table_record(storage.uri), lambda: step("fence"), lambda _text: None)
    choice = choose(corpus, storage, table, retry_failed=retry_failed)
    sizes = []
    for work in choice.rounds(round_size):
        sizes.append(work.todo.num_rows)
        ids = work.todo["id"].to_pylist()
        for start in range(0, len(ids), part):
            for folder, old in ((LABELS_DIR, False), (RELABELLED_DIR, True)):
                some = [i for i in ids[start : start + part] if (i in work.replacing) == old]
                if some:
                    step("write")
                    write_part(storage, _rows(some, status), folder)
        assert not unfinished(work.todo, storage, table).num_rows
        step("commit")
        fresh, replaced = commit(storage, work.todo, table, lambda: step("fence"), lambda _text: None)
        step("count")
        record_counts(storage, table, fresh, replaced)
    if not sizes and table.counts is None:
        record_counts(storage, table, Counts(), Replaced())
    assert sum(sizes) == choice.count
    return sizes


def _statuses(storage: Storage) -> dict[int, str]:
    found = [(row["id"], row["status"]) for row in iter_rows(storage, ["id", "status"])]
    assert len(found) == len(dict(found)), "an image has several rows"
    return dict(found)


def _check(storage: Storage, corpus: Corpus) -> dict[int, str]:
    """All images have one row, and the counts are right."""
    found = _statuses(storage)
    assert set(found) == set(corpus.table()["id"].to_pylist())
    counts = read_table_record(storage.uri).counts
    assert counts["images"] == len(found) and counts["status"] == dict(Counter(found.values()))
    parts = (
        Checked(name, pq.read_table(Path(storage.path(name)))["id"].to_numpy())
        for name in part_files(storage)
    )
    assert verify(parts, corpus=corpus, recorded=counts).counts == {}
    return found


def _killer(at: int) -> Callable[[str], None]:
    left = itertools.count(at, -1)

    def step(_what: str) -> None:
        if next(left) == 0:
            raise Killed

    return step


@pytest.mark.slow
@FILES
@given(
    count=st.integers(1, 40),
    most=st.integers(1, 45),
    round_size=st.integers(1, 45),
    part=st.integers(1, 9),
    kills=st.lists(st.integers(0, 25), max_size=3),
    data=st.data(),
)
def test_every_image_has_one_row_whatever_the_partitions_and_the_kills(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    most: int,
    round_size: int,
    part: int,
    kills: list[int],
    data: st.DataObject,
) -> None:
    folder = tmp_path_factory.mktemp("run")
    storage = open_storage(folder / "table")
    for at in kills:
        # Another run may cut the corpus elsewhere.
        corpus = _corpus(folder, count, data.draw(st.integers(1, 45)))
        try:
            _run(storage, corpus, round_size=data.draw(st.integers(1, 45)), part=part, step=_killer(at))
        except Killed:
            assert len(_statuses(storage)) <= count
    corpus = _corpus(folder, count, most)
    sizes = _run(storage, corpus, round_size=round_size, part=part)
    assert all(size >= round_size for size in sizes[:-1])
    _check(storage, corpus)
    assert _run(storage, corpus) == []
    _check(storage, corpus)


def test_a_round_is_whole_partitions(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "table")
    corpus = _corpus(tmp_path, 100, 10)
    sizes = [rows.num_rows for rows in corpus]
    assert _run(storage, corpus) == [size for size in sizes if size]
    assert len(sizes) == 16


@pytest.mark.parametrize("kill_in", [0, 1, 2])
def test_a_kill_between_two_rounds_loses_nothing_that_is_committed(tmp_path: Path, kill_in: int) -> None:
    storage = open_storage(tmp_path / "table")
    corpus = _corpus(tmp_path, 60, 15)
    rounds = itertools.count()

    def step(what: str) -> None:
        if what == ("commit", "count", "write")[kill_in] and next(rounds) == (8 if kill_in == 2 else 1):
            raise Killed

    with pytest.raises(Killed):
        _run(storage, corpus, step=step)
    there = _statuses(storage)
    first = {row_id for rows in itertools.islice(corpus, 1) for row_id in rows["id"].to_pylist()}
    assert first <= set(there) < set(corpus.table()["id"].to_pylist())
    sizes = _run(storage, corpus)
    assert sum(sizes) == 60 - len(there)
    _check(storage, corpus)


@pytest.mark.slow
def test_a_manifest_grows_between_runs_and_while_one_goes_on(tmp_path: Path) -> None:
    storage, path = open_storage(tmp_path / "table"), tmp_path / "m.parquet"
    write_manifest(_corpus(tmp_path, 30, 10), path)
    assert sum(_run(storage, build_corpus(path))) == 30
    write_manifest(_corpus(tmp_path, 70, 10), path)
    corpus = build_corpus(path)
    assert len(corpus.partitions) > 1

    def grow(what: str) -> None:
        if what == "count":
            write_manifest(_corpus(tmp_path, 200, 10), path)

    assert sum(_run(storage, corpus, step=grow)) == 40
    _check(storage, corpus)
    assert sum(_run(storage, build_corpus(path))) == 130
    _check(storage, build_corpus(path))


def test_tables_and_manifests_of_older_versions_go_on(tmp_path: Path) -> None:
    # A manifest in one piece, parts of 32 rows, and one that a kill left half-written beside its mark.
    whole = build_manifest(_list(tmp_path, 100))
    pq.write_table(whole, tmp_path / "old.parquet")
    storage = open_storage(tmp_path / "table")
    write_table_record(storage, RECORD.model_copy(update={"counts": {"status": {"empty": 32}}}))
    ids = whole["id"].to_pylist()
    write_part(storage, _rows(ids[:32], "empty"))
    write_part(storage, _rows(ids[32:64], "empty"))  # not counted yet
    for name, some in (("r_000000-0", ids[64:70]), ("r_000001-0", ids[70:75])):
        pq.write_table(_rows(some, "empty"), tmp_path / "table" / "labels" / f"{name}.parquet")
    (tmp_path / "table" / "checkpoint").mkdir()
    (tmp_path / "table" / "checkpoint" / "r_000001.pending.parquet").write_bytes(b"")
    corpus = read_corpus(tmp_path / "old.parquet", most=10)
    assert len(corpus.partitions) == 16
    assert sum(_run(storage, corpus, round_size=20)) == 30
    _check(storage, corpus)


def _list(folder: Path, count: int) -> Path:
    (folder / "list.txt").write_text("\n".join(map(_uri, range(count))))
    return folder / "list.txt"


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [None, 5, 23, 30, 36, 47])
def test_rows_are_replaced_once_in_rounds(tmp_path: Path, kill_at: int | None) -> None:
    storage = open_storage(tmp_path / "table")
    corpus = _corpus(tmp_path, 60, 10)
    _run(storage, _corpus(tmp_path, 40, 10), status="unavailable", part=7)
    if kill_at is not None:
        try:
            _run(storage, corpus, status="empty", retry_failed=("unavailable",), step=_killer(kill_at))
        except Killed:
            assert len(_statuses(storage)) == 40
    # Those that have failed, and after that what is new.
    _run(storage, corpus, status="empty", retry_failed=("unavailable",))
    assert Counter(_statuses(storage).values()) == {"empty": 40}
    assert sum(_run(storage, corpus, status="truncated")) == 20
    assert Counter(_check(storage, corpus).values()) == {"empty": 40, "truncated": 20}


def test_late_rows_of_a_round_that_is_committed_are_taken_out(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "table")
    corpus = _corpus(tmp_path, 60, 30)
    first, second = ([*rows["id"].to_pylist()] for rows in corpus)
    commits = itertools.count()

    def lost_node(what: str) -> None:
        if what == "commit" and next(commits) == 1:
            # What was written already in other files, alone and beside a row that is new.
            write_part(storage, _rows(first[:2], "late"))
            write_part(storage, _rows([*first[2:4], second[-1]], "empty"))

    _run(storage, corpus, step=lost_node)
    found = _check(storage, corpus)
    assert Counter(found.values()) == {"empty": 60}
    assert f"labels/{part_name(np.array(first[:2]))}" not in part_files(storage)
    assert storage.list(SET_ASIDE_DIR)


def test_an_image_that_got_no_row_is_told(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "table")
    write_table_record(storage, RECORD)
    corpus = _corpus(tmp_path, 20, 5)
    table = Table()
    work = next(choose(corpus, storage, table).rounds(10))
    write_part(storage, _rows(work.todo["id"].to_pylist()[1:], "empty"))
    with pytest.raises(MaskMillError, match="1 images have no row"):
        commit(storage, work.todo, table, lambda: None, lambda _text: None)


def test_ids_of_the_list_are_those_of_the_manifest(tmp_path: Path) -> None:
    assert set(_corpus(tmp_path, 9, 2).table()["id"].to_pylist()) == {stable_id(_uri(n)) for n in range(9)}
