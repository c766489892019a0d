from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from pipeline.metrics.divergence import divergence, divergence_by_name, most_moved

HISTOGRAMS = st.integers(1, 8).flatmap(
    lambda size: st.tuples(
        *(st.lists(st.floats(0, 1e12, allow_subnormal=False), min_size=size, max_size=size) for _ in "pq")
    )
)


@given(HISTOGRAMS)
def test_it_is_the_square_of_scipys_distance(pair: tuple[list[float], list[float]]) -> None:
    p, q = pair
    found = divergence(p, q)
    if not (sum(p) and sum(q)):
        assert math.isnan(found)
        return
    assert 0 <= found <= 1 and found == divergence(q, p)
    expected = jensenshannon(p, q, base=2) ** 2
    assert found == pytest.approx(0 if np.isnan(expected) else expected, abs=1e-9)


def test_known_values() -> None:
    assert divergence([1, 3], [2, 6]) == 0
    assert divergence([1, 0], [0, 5]) == 1
    # The value that the default bound of label drift is explained by.
    assert divergence([0.5, 0.5], [0.9, 0.1]) == pytest.approx(0.147, abs=0.001)


def test_classes_are_matched_by_name() -> None:
    before, after = {"a": 0.5, "b": 0.5}, {"b": 0.5, "c": 0.3, "a": 0.2}
    assert divergence_by_name(before, after) == divergence([0.5, 0.5, 0.0], [0.2, 0.5, 0.3])
    assert most_moved(before, after) == ["a", "c", "b"]
