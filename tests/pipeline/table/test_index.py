"""The index of parts says what a dictionary of them would, however little of it is in memory."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.spill import ALL, PARTITION, ROWS_AT_ONCE, spans
from pipeline.table.index import Ids, PartIndex

IDS = st.integers(-20, 20) | st.integers(-(2**63), 2**63 - 1)
PARTS = st.lists(st.lists(IDS, max_size=6), max_size=8)


def _index(parts: list[list[int]], rows_at_once: int) -> PartIndex:
    index = PartIndex(rows_at_once)
    for number, ids in enumerate(parts):
        index.add(f"p{number}", np.array(ids, np.int64))
    return index


def _listed(ids: Ids) -> list[int]:
    found: list[int] = ids.tolist()
    return found


@settings(deadline=None, max_examples=30)
@given(
    parts=PARTS,
    gone=st.sets(st.integers(0, 7)),
    wanted=st.lists(IDS, unique=True),
    rows_at_once=st.integers(1, 10),
)
def test_it_knows_what_was_added_and_not_removed(
    parts: list[list[int]], gone: set[int], wanted: list[int], rows_at_once: int
) -> None:
    index = _index(parts, rows_at_once)
    there = {f"p{number}": ids for number, ids in enumerate(parts)}
    for number in sorted(gone & set(range(len(parts)))):
        index.remove(f"p{number}", len(there.pop(f"p{number}")))
    if "p0" not in there:  # what is left of a part may have its name
        there["p0"] = [5, 6]
        index.add("p0", np.array([6, 5]))
    everything = [row_id for ids in there.values() for row_id in ids]
    counts = Counter(everything)
    assert index.rows == len(everything) and sorted(index.parts) == sorted(there) and bool(index)
    assert all(part in index for part in there) and "p9" not in index
    assert sorted(_listed(index.ids(ALL))) == sorted(everything)
    found = index.has(np.array(wanted, np.int64), ALL)
    assert found.tolist() == [row_id in counts for row_id in wanted]
    assert {part: sorted(_listed(ids)) for part, ids in index.of(there).items()} == {
        part: sorted(ids) for part, ids in there.items()
    }
    where = index.where(np.array(wanted, np.int64))
    assert {part: sorted(_listed(ids)) for part, ids in where.items()} == {
        part: hit for part, ids in there.items() if (hit := sorted(i for i in ids if i in wanted))
    }
    assert index.repeated() == sorted(part for part, ids in there.items() if any(counts[i] > 1 for i in ids))


@settings(deadline=None, max_examples=20)
@given(parts=PARTS, wanted=st.lists(IDS, unique=True), pieces=st.sampled_from([1, 2, 8]))
def test_pieces_of_it_are_those_of_the_whole(parts: list[list[int]], wanted: list[int], pieces: int) -> None:
    index = _index(parts, 3)
    ids = np.array(wanted, np.int64)
    keys = ids.view(np.uint64).tolist()
    found = np.zeros(len(ids), np.bool_)
    for span in spans(pieces, 1):
        inside = np.array([span.first <= key < span.end for key in keys], np.bool_)
        found[inside] = index.has(ids[inside], span)
    assert found.tolist() == index.has(ids, ALL).tolist()


def test_a_large_one_is_read_in_several_pieces() -> None:
    index = PartIndex()
    count = 3 * max(PARTITION, ROWS_AT_ONCE) // 2
    ids = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, count)
    index.add("p", ids)
    assert len(index.spans) == 2 and not index.repeated()
    assert index.has(ids[::1000], ALL).all() and not index.has(ids[:5] ^ 1, ALL).any()
    index.add("q", ids[:2])
    assert index.repeated() == ["p", "q"]
    assert sorted(_listed(index.of(["q"])["q"])) == sorted(_listed(ids[:2]))
