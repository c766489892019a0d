"""Measures of a ranking, against scipy, scikit-learn and their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from pipeline.metrics.ranking import aurc, auroc, rank_correlation, rank_mean

# Few values: many ties.
numbers = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 0.9, 1.0]), st.sampled_from([0.0, 0.3, 0.6, 1.0])),
    min_size=1,
    max_size=20,
).map(lambda pairs: tuple(np.array(pairs).T))


@given(numbers)
def test_as_scipy_and_scikit_learn_have_them(pair: tuple[np.ndarray, np.ndarray]) -> None:
    score, right = pair
    if len(set(score)) > 1 and len(set(right)) > 1:
        assert rank_correlation(score, right) == pytest.approx(spearmanr(score, right).statistic)
    else:
        assert np.isnan(rank_correlation(score, right))
    good = right >= 0.5
    if good.any() and not good.all():
        assert auroc(score, good) == pytest.approx(roc_auc_score(good, score))
    else:
        assert np.isnan(auroc(score, good))


@given(numbers.filter(lambda pair: len(pair[0]) <= 5))
def test_risk_over_coverage_is_its_mean_over_all_orders_of_ties(pair: tuple[np.ndarray, np.ndarray]) -> None:
    score, right = pair
    orders = np.array([[*order] for order in itertools.permutations(range(len(score)))])
    falling = orders[(np.diff(score[orders]) <= 0).all(1)]
    means = np.cumsum(1 - right[falling], 1) / np.arange(1, len(score) + 1)
    assert aurc(score, right) == pytest.approx(means.mean())


@given(numbers)
def test_the_best_and_the_worst_ranking(pair: tuple[np.ndarray, np.ndarray]) -> None:
    score, right = pair
    found = aurc(score, right)
    assert aurc(right, right) <= found + 1e-9 <= aurc(-right, right) + 2e-9
    assert aurc(score[::-1], right[::-1]) == pytest.approx(found)


def test_undefined() -> None:
    assert np.isnan(aurc(np.array([]), np.array([])))
    assert np.isnan(auroc(np.array([0.5]), np.array([True])))


def test_mean_of_ranks_does_not_depend_on_the_scale_of_a_score() -> None:
    one, two = np.array([0.1, 0.9, 0.5]), np.array([3.0, 1.0, 2.0])
    np.testing.assert_allclose(rank_mean(one, two), [2 / 3] * 3)
    np.testing.assert_allclose(rank_mean(one**3, two * 100), rank_mean(one, two))
