from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from jobs.benchmarks.rows import claim, interval, row
from pipeline.evaluation.results import Value


def test_the_interval_is_student_s() -> None:
    values = [0.5, 0.52, 0.47, 0.55]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert found.model_dump() == {
        "mean": pytest.approx(np.mean(values)),
        "low": pytest.approx(low),
        "high": pytest.approx(high),
        "runs": tuple(values),
    }


@pytest.mark.parametrize(
    ("values", "mean", "runs"),
    [([0.4], 0.4, [0.4]), ([], None, []), ([math.nan], None, []), ([math.nan, 0.2], 0.2, [0.2])],
)
def test_one_run_has_no_interval(values: list, mean: float | None, runs: list) -> None:
    assert interval(values) == Value(mean=mean, low=None, high=None, runs=tuple(runs))


@pytest.mark.parametrize(
    ("better", "worse", "margin", "shows", "words"),
    [
        ([0.6, 0.61, 0.62], [0.4, 0.4, 0.41], 0.15, True, "+20.7 points of mIoU"),
        ([0.6, 0.61, 0.62], [0.5, 0.5, 0.51], 0.15, False, "not certainly by 15.0 points"),
        ([0.5, 0.6, 0.4], [0.5, 0.5, 0.5], 0.0, False, "no significant difference"),
        ([0.3, 0.31, 0.3], [0.5, 0.5, 0.5], 0.0, False, "the opposite holds"),
    ],
)
def test_a_claim_shows_if_the_paired_differences_are_surely_above_the_margin(
    better: list, worse: list, margin: float, shows: bool, words: str
) -> None:
    found = claim("x", "y", better, worse, margin=margin)
    assert found.shows is shows and words in found.detail


def test_a_claim_that_too_few_seeds_speak_of_is_left_open() -> None:
    found = claim("x", "y", [0.6, math.nan], [0.5, 0.5])
    assert found.shows is None and "too few" in found.detail


def test_a_row_of_nothing_measured_says_what_it_needs() -> None:
    found = row("r", {}, published={"miou": 0.2}, source="s", missing="needs data")
    assert found.values == {} and found.missing == "needs data" and found.published == {"miou": 0.2}
