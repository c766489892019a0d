"""A corpus is the same whether it is read as a whole or partition by partition."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import boto3
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.corpus import corpus as corpus_module
from pipeline.corpus.corpus import Corpus
from pipeline.corpus.manifest import (
    PARTITIONS_KEY,
    build_corpus,
    build_manifest,
    read_corpus,
    read_manifest,
    write_manifest,
)
from pipeline.corpus.selection import distinct, some_of
from pipeline.corpus.spill import keys

SLOW_DISK = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LINES = st.lists(
    st.tuples(st.integers(0, 40), st.none() | st.integers(0, 3), st.none() | st.integers(1, 9)), min_size=1
)
"""Rows of a list: number of an image, start of its bytes, width. Some are there twice."""


def _list(path: Path, lines: Sequence[tuple[int, int | None, int | None]]) -> Path:
    rows = [
        {"uri": f"/p/{number}.jpg", "offset": start, "length": None if start is None else 5, "width": width}
        for number, start, width in lines
    ]
    schema = pa.schema(
        [("uri", pa.string()), ("offset", pa.int64()), ("length", pa.int64()), ("width", pa.int32())]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return path


def _lines(path: Path, numbers: Sequence[int]) -> Path:
    path.write_text("\n".join(f"/p/{number}.jpg" for number in numbers))
    return path


def _rows(manifest: pa.Table) -> list[dict[str, object]]:
    """Rows by id, without what is not known: a table in memory has no column for what no image has."""
    rows = [{k: v for k, v in row.items() if v is not None} for row in manifest.to_pylist()]
    return sorted(rows, key=lambda row: int(str(row["id"])))


def _ids(manifest: pa.Table) -> list[int]:
    found: list[int] = manifest["id"].to_pylist()
    return found


@SLOW_DISK
@given(lines=LINES, most=st.integers(1, 50))
def test_partitions_have_the_images_of_the_whole(
    tmp_path: Path, lines: list[tuple[int, int | None, int | None]], most: int
) -> None:
    source = _list(tmp_path / "list.parquet", lines)
    whole = build_manifest(source)
    corpus = build_corpus(source, most=most)
    assert corpus.num_rows == whole.num_rows and _rows(corpus.table()) == _rows(whole)
    for span, rows in zip(corpus.partitions, corpus, strict=True):
        found = keys(rows["id"].to_numpy()).tolist()
        assert all(span.first <= key < span.end for key in found)
    ordered = np.sort(whole["id"].to_numpy()).astype("<i8")
    assert corpus.digest() == Corpus.of(whole).digest() == hashlib.sha256(ordered.tobytes()).hexdigest()
    # In a file, too.
    write_manifest(corpus, tmp_path / "m.parquet")
    again = read_corpus(tmp_path / "m.parquet")
    assert again.partitions == corpus.partitions and again.num_rows == corpus.num_rows
    assert _rows(again.table()) == _rows(whole) == _rows(read_manifest(tmp_path / "m.parquet"))
    for one, other in zip(again, corpus, strict=True):
        assert sorted(_ids(one)) == sorted(_ids(other))


@SLOW_DISK
@given(
    first=st.lists(st.integers(0, 40), min_size=1),
    second=st.lists(st.integers(0, 40), min_size=1),
    most=st.tuples(st.integers(1, 30), st.integers(1, 30)),
)
def test_a_manifest_that_grows_has_what_it_had_and_what_is_new(
    tmp_path: Path, first: list[int], second: list[int], most: tuple[int, int]
) -> None:
    output = tmp_path / "m.parquet"
    write_manifest(build_corpus(_lines(tmp_path / "a.txt", first), most=most[0]), output)
    before = read_corpus(output, most=most[0])
    grown = before.extended(build_corpus(_lines(tmp_path / "b.txt", second), most=most[1]))
    write_manifest(grown, output)
    expected = build_manifest(_lines(tmp_path / "all.txt", [*first, *second]))
    assert grown.num_rows == expected.num_rows == read_corpus(output).num_rows
    assert _rows(read_manifest(output)) == _rows(expected)
    # What it was made from is still what it was, although its file is another.
    assert set(_ids(before.table())) == set(_ids(build_manifest(tmp_path / "a.txt")))


@SLOW_DISK
@given(
    numbers=st.lists(st.integers(0, 200), min_size=1, unique=True),
    sample=st.integers(1, 60),
    seed=st.integers(0, 3),
    most=st.integers(1, 60),
)
def test_a_sample_does_not_depend_on_partitions(
    tmp_path: Path, numbers: list[int], sample: int, seed: int, most: int
) -> None:
    source = _lines(tmp_path / "a.txt", numbers)
    whole = Corpus.of(build_manifest(source))
    expected = set(_ids(some_of(whole, sample, seed).table()))
    assert len(expected) == min(sample, len(numbers))
    assert set(_ids(some_of(whole, max(1, sample // 2), seed).table())) <= expected
    chosen = some_of(build_corpus(source, most=most), sample, seed)
    assert chosen.num_rows == len(expected) and set(_ids(chosen.table())) == expected


@SLOW_DISK
@given(numbers=st.lists(st.integers(0, 9), min_size=1), limit=st.integers(1, 12), most=st.integers(1, 5))
def test_a_limit_takes_the_first_of_the_source(
    tmp_path: Path, numbers: list[int], limit: int, most: int
) -> None:
    source = _lines(tmp_path / "a.txt", numbers)
    expected = _ids(build_manifest(source))[:limit]
    corpus = build_corpus(source, limit=limit, most=most)
    assert corpus.num_rows == len(expected) and sorted(_ids(corpus.table())) == sorted(expected)
    write_manifest(build_corpus(source, most=most), tmp_path / "m.parquet")
    few = build_corpus(tmp_path / "m.parquet", limit=limit)
    assert few.num_rows == len(expected) and set(_ids(few.table())) <= set(_ids(build_manifest(source)))


@pytest.mark.parametrize("most", [1, 4, 100])
def test_equal_images_in_any_partitions_are_kept_once(tmp_path: Path, most: int) -> None:
    contents = {f"{number:02d}.jpg": bytes([number % 7]) for number in range(30)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = distinct(build_corpus(tmp_path, most=most))
    left = [uri.rpartition("/")[2] for uri in found.corpus.table()["uri"].to_pylist()]
    assert sorted(contents[name] for name in left) == [bytes([number]) for number in range(7)]
    pairs = [(one.rpartition("/")[2], other.rpartition("/")[2]) for one, other in found.copies()]
    assert len(pairs) == found.count == 23 and found.corpus.num_rows == 7
    assert sorted([*left, *(one for one, _ in pairs)]) == sorted(contents)
    assert all(contents[one] == contents[other] and other in left for one, other in pairs)


def test_what_is_left_of_many_partitions_is_one_if_it_is_small(tmp_path: Path) -> None:
    corpus = build_corpus(_lines(tmp_path / "a.txt", range(100)), most=10)
    assert len(corpus.partitions) == 16 and len(some_of(corpus, 5).partitions) == 1


def test_what_is_left_of_many_partitions_may_be_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus_module, "PARTITION", 10)
    source = _lines(tmp_path / "a.txt", range(100))
    chosen = some_of(build_corpus(source, most=10), 50)
    assert len(chosen.partitions) == 16 and chosen.num_rows == 50 == chosen.table().num_rows
    assert len(set(_ids(chosen.table()))) == 50
    # An empty partition does no harm.
    write_manifest(some_of(build_corpus(source, most=10), 11), tmp_path / "m.parquet")
    assert read_corpus(tmp_path / "m.parquet").num_rows == 11


# --- files ---


def _partitioned(path: Path, count: int = 40) -> Path:
    write_manifest(build_corpus(_lines(path.parent / "a.txt", range(count)), most=10), path)
    assert pq.read_metadata(path).num_row_groups == 4
    return path


def _rewrite(path: Path, groups: list[pa.Table], partitions: int = 4) -> None:
    schema = groups[0].schema.with_metadata({PARTITIONS_KEY: str(partitions).encode()})
    with pq.ParquetWriter(path, schema) as writer:
        for rows in groups:
            writer.write_table(rows.replace_schema_metadata(schema.metadata), row_group_size=1000)


def test_a_manifest_without_partitions_is_cut_into_some(tmp_path: Path) -> None:
    # As versions before partitions wrote it.
    whole = build_manifest(_lines(tmp_path / "a.txt", range(40)))
    pq.write_table(whole, tmp_path / "old.parquet")
    assert read_corpus(tmp_path / "old.parquet").table().equals(whole)
    parts = read_corpus(tmp_path / "old.parquet", most=10)
    assert len(parts.partitions) == 4 and _rows(parts.table()) == _rows(whole)


@pytest.mark.parametrize("most", [10, 100])
def test_a_file_that_lost_its_order_is_read_or_refused(tmp_path: Path, most: int) -> None:
    path = _partitioned(tmp_path / "m.parquet")
    whole = pq.read_table(path)
    shuffled = whole.take(np.random.default_rng(0).permutation(40))
    # By other programs: one row group, and the metadata may have stayed.
    pq.write_table(shuffled, path)
    assert _rows(read_corpus(path, most=most).table()) == _rows(whole)
    _rewrite(path, [shuffled.slice(start, 10) for start in range(0, 40, 10)])
    with pytest.raises(MaskMillError, match="has ids of others") as caught:
        read_corpus(path, most=most).table()
    assert caught.value.code == "dataset_invalid"


@pytest.mark.parametrize("partitions", [0, 1, 3, 5, -4])
def test_a_number_of_partitions_that_cannot_be_is_not_believed(tmp_path: Path, partitions: int) -> None:
    path = _partitioned(tmp_path / "m.parquet")
    whole = pq.read_table(path)
    groups = [whole.slice(start, 10) for start in range(0, 40, 10)]
    _rewrite(path, groups, partitions)
    assert _rows(read_corpus(path, most=10).table()) == _rows(whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda rows: rows.set_column(1, "uri", pa.array(["/p/x.jpg"] * len(rows))), "is not the id of"),
        (lambda rows: pa.concat_tables([rows, rows.slice(0, 1)]), "appears twice"),
        (lambda rows: rows.set_column(1, "uri", pa.array([None] * len(rows), pa.string())), "empty values"),
    ],
)
def test_rows_of_a_partition_are_checked(tmp_path: Path, change: object, says: str) -> None:
    assert callable(change)
    path = _partitioned(tmp_path / "m.parquet")
    with pq.ParquetFile(path) as file:
        groups = [file.read_row_group(number) for number in range(4)]
    groups[2] = change(groups[2])
    _rewrite(path, groups)
    with pytest.raises(MaskMillError, match=says) as caught:
        read_corpus(path).table()
    assert caught.value.code == "dataset_invalid"


def test_without_ids_it_is_a_list(tmp_path: Path) -> None:
    path = _partitioned(tmp_path / "m.parquet")
    with pq.ParquetFile(path) as file:
        _rewrite(path, [file.read_row_group(number).drop_columns(["id"]) for number in range(4)])
    assert build_manifest(path).num_rows == 40
    with pytest.raises(MaskMillError, match="no column 'id'"):
        read_manifest(path)


def test_a_torn_partition_is_told_in_words(tmp_path: Path) -> None:
    path = _partitioned(tmp_path / "m.parquet")
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(3).column(1).data_page_offset
    data[start : start + 40] = bytes(40)
    path.write_bytes(data)
    corpus = read_corpus(path)
    with pytest.raises(MaskMillError) as caught:
        corpus.table()
    assert caught.value.code == "dataset_invalid"


def test_a_manifest_that_is_replaced_meanwhile_is_read_to_its_end(tmp_path: Path) -> None:
    path = _partitioned(tmp_path / "m.parquet")
    corpus = build_corpus(path)
    first = corpus.read(corpus.partitions[0])
    before = _ids(pq.read_table(path))
    write_manifest(build_corpus(_lines(tmp_path / "b.txt", range(1000)), most=10), path)
    assert corpus.read(corpus.partitions[0]).equals(first)
    assert sorted(_ids(corpus.table())) == sorted(before)
    path.unlink()
    assert corpus.table().num_rows == 40


def test_an_object_that_is_replaced_meanwhile_is_read_to_its_end(bucket: str, tmp_path: Path) -> None:
    corpus = build_corpus(_lines(tmp_path / "a.txt", range(40)), most=10)
    write_manifest(corpus, f"{bucket}/m.parquet")
    found = build_corpus(f"{bucket}/m.parquet")
    assert len(found.partitions) == 4
    boto3.client("s3").delete_object(Bucket=bucket.split("/")[2], Key="table/m.parquet")
    assert _rows(found.table()) == _rows(corpus.table())
