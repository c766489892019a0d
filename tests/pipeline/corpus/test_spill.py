"""Rows that are spilled to disk are those that were added, whatever piece of them is read."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.spill import ALL, Span, Spill, keys, spans

IDS = st.integers(-(2**63), 2**63 - 1)
SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string())])


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_spans_are_even_and_hold_every_id_once(count: int, most: int) -> None:
    if count > most * 4096:
        count %= most * 4096
    found = spans(count, most)
    assert found[0].first == 0 and found[-1].end == 2**64
    assert all(one.end == other.first for one, other in itertools.pairwise(found))
    assert len({one.end - one.first for one in found}) == 1
    # The fewest that will do.
    assert count <= most * len(found) and (len(found) == 1 or count > most * len(found) // 2)


@settings(deadline=None, max_examples=30)
@given(
    pieces=st.lists(st.lists(IDS | st.integers(0, 3), max_size=6), max_size=8),
    rows_at_once=st.integers(1, 9),
    parts=st.integers(1, 40),
)
def test_each_span_has_its_rows_in_the_order_they_came(
    pieces: list[list[int]], rows_at_once: int, parts: int
) -> None:
    spill = Spill(SCHEMA, rows_at_once)
    added: list[tuple[int, str]] = []
    for number, ids in enumerate(pieces):
        rows = [(row_id, f"{number}.{place}") for place, row_id in enumerate(ids)]
        added += rows
        spill.add(pa.table([pa.array(column) for column in zip(*rows, strict=True)] or [[], []], SCHEMA))
        if number == len(pieces) // 2:
            spill.read()  # reading does not end it
    expected = sorted(added, key=lambda row: row[0] % 2**64)
    assert spill.rows == len(added)
    for span in (*spans(parts, 1), ALL):
        rows = [tuple(row.values()) for row in spill.read(span).to_pylist()]
        assert rows == [row for row in expected if span.first <= row[0] % 2**64 < span.end]


@pytest.mark.parametrize("row_id", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_the_ends_of_a_span(row_id: int) -> None:
    spill = Spill(SCHEMA, 1)
    spill.add(pa.table([[row_id], ["a"]], SCHEMA))
    key = int(keys(np.array([row_id]))[0])
    assert spill.read(Span(key, key + 1)).num_rows == 1
    assert not spill.read(Span(0, key)).num_rows
    if key + 1 < 2**64:
        assert not spill.read(Span(key + 1, 2**64)).num_rows
