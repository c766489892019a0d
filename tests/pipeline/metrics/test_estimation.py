"""Estimates from a sample: against ordinary least squares, and how often their promises hold."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t

from pipeline.metrics.estimation import regression_estimate, safe_score, sample_estimate


def test_the_sample_alone_has_the_interval_of_student() -> None:
    right = np.array([0.2, 0.5, 0.6, 0.9, 0.4])
    found = sample_estimate(right, 10**9, confidence=0.9)
    low, high = t.interval(0.9, 4, right.mean(), right.std(ddof=1) / np.sqrt(5))
    assert (found.mean, found.low, found.high) == pytest.approx((right.mean(), low, high))
    whole = sample_estimate(right, 5)
    assert whole.low == whole.mean == whole.high, "where all images are the sample, nothing is unsure"


def test_regression_is_that_of_least_squares() -> None:
    rng = np.random.default_rng(0)
    score = rng.random(40)
    right = np.clip(0.2 + 0.6 * score + rng.normal(0, 0.05, 40), 0, 1)
    found = regression_estimate(score, right, 0.7, 10**9)
    design = np.stack([np.ones(40), score], 1)
    weights, residual = np.linalg.lstsq(design, right, rcond=None)[:2]
    at = np.array([1, 0.7])
    error = np.sqrt(residual[0] / 38 * at @ np.linalg.inv(design.T @ design) @ at)
    assert found.mean == pytest.approx(at @ weights)
    assert found.high - found.mean == pytest.approx(t.ppf(0.975, 38) * error)
    alone = sample_estimate(right, 10**9)
    assert found.high - found.low < 0.6 * (alone.high - alone.low)
    # A score that is the same everywhere says nothing.
    assert regression_estimate(np.ones(40), right, 1.0, 99) == sample_estimate(right, 99)


def test_intervals_hold_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    score = rng.beta(4, 2, 3000)
    right = np.clip(score**2 + rng.normal(0, 0.15, 3000), 0, 1)  # bent, and cut off: not what is assumed
    held = []
    for _ in range(400):
        drawn = rng.choice(3000, 60, replace=False)
        found = regression_estimate(score[drawn], right[drawn], float(score.mean()), 3000)
        held.append(found.low <= right.mean() <= found.high)
    assert 0.92 <= np.mean(held) <= 0.98


@given(
    st.lists(st.tuples(st.sampled_from([0.1, 0.4, 0.5, 0.8, 1.0]), st.booleans()), min_size=1, max_size=60),
    st.sampled_from([0.05, 0.1, 0.3]),
)
def test_the_bound_is_the_smallest_that_the_rule_allows(pairs: list[tuple[float, bool]], risk: float) -> None:
    score, good = np.array([one for one, _ in pairs]), np.array([one for _, one in pairs])
    count = len(score)

    def allowed(bound: float) -> bool:
        kept_bad = float(np.mean((score >= bound) & ~good))
        return count / (count + 1) * kept_bad + 1 / (count + 1) <= risk + 1e-9

    found = safe_score(score, good, risk)
    if found is None:
        assert not allowed(2.0)
    else:
        assert allowed(found) and (found == 0 or not allowed(np.nextafter(found, 0)))


def test_the_chance_of_a_bad_image_that_is_kept_is_bounded() -> None:
    rng = np.random.default_rng(2)
    kept = []
    for _ in range(2000):
        score = rng.random(51)
        good = rng.random(51) < score
        bound = safe_score(score[:50], good[:50], 0.1)
        assert bound is not None
        kept.append(score[50] >= bound and not good[50])
    assert 0.05 < np.mean(kept) <= 0.115  # its standard error is 0.007
