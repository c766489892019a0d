from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from pipeline.metrics.calibration import (
    binned,
    brier_score,
    calibration_counts,
    expected_calibration_error,
    maximum_calibration_error,
    reliability,
)


def sample(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.integers(0, 4, (2, 60, 50)).astype(np.uint8)
    confidence = rng.integers(0, 256, truth.shape).astype(np.uint8)
    predicted = np.where(rng.integers(0, 255, truth.shape) < confidence // 2, truth, predicted)
    return confidence, truth, predicted


def test_counts_against_a_loop() -> None:
    confidence, truth, predicted = sample()
    truth[:9], predicted[5:20] = 255, 255
    expected = np.zeros((256, 2), np.int64)
    for v, t, p in zip(confidence.ravel(), truth.ravel(), predicted.ravel(), strict=True):
        if t != 255 and p != 255:
            expected[v] += 1, t == p
    np.testing.assert_array_equal(calibration_counts(confidence, truth, predicted, 4), expected)


@pytest.mark.parametrize("bins", [1, 7, 8, 16])
def test_against_scikit_learn(bins: int) -> None:
    confidence, truth, predicted = sample()
    right, p = (truth == predicted).ravel(), confidence.ravel() / 255
    counts = calibration_counts(confidence, truth, predicted, 4)
    pixels, accuracy, mean_confidence = reliability(counts, bins).T
    expected_accuracy, expected_confidence = calibration_curve(right, p, n_bins=bins)
    np.testing.assert_allclose(accuracy, expected_accuracy)
    np.testing.assert_allclose(mean_confidence, expected_confidence)
    assert pixels.sum() == right.size
    assert brier_score(counts) == pytest.approx(brier_score_loss(right, p))
    gaps = np.abs(expected_accuracy - expected_confidence)
    assert expected_calibration_error(counts, bins) == pytest.approx(np.average(gaps, weights=pixels))
    assert maximum_calibration_error(counts, bins) == pytest.approx(gaps.max())


@given(st.integers(1, 300))
def test_bins_hold_what_they_say(bins: int) -> None:
    for value in range(256):
        counts = np.zeros((256, 2), np.int64)
        counts[value] = 3, 2
        rows = binned(counts, bins)
        (place,) = np.flatnonzero(rows[:, 0])
        assert place * 255 < value * bins <= (place + 1) * 255 or (value == 0 and place == 0)
        assert rows[place].tolist() == [3, 2, 3 * value]


def test_perfect_and_worst() -> None:
    perfect, worst = np.zeros((2, 256, 2), np.int64)
    perfect[255], perfect[51] = (10, 10), (100, 20)  # 51 / 255 is 0.2
    worst[255] = 10, 0
    assert expected_calibration_error(perfect) == pytest.approx(0)
    assert maximum_calibration_error(perfect) == pytest.approx(0)
    assert expected_calibration_error(worst) == maximum_calibration_error(worst) == brier_score(worst) == 1
    assert expected_calibration_error(perfect + worst) == pytest.approx((20 * 0.5) / 120)


def test_nothing_is_nan() -> None:
    counts = calibration_counts(*np.full((3, 2, 2), 255, np.uint8), 4)
    assert not counts.any()
    for metric in expected_calibration_error, maximum_calibration_error, brier_score:
        assert np.isnan(metric(counts))
    assert np.isnan(reliability(counts)[:, 1:]).all()


@pytest.mark.parametrize("confidence", [np.zeros((2, 2)), np.zeros((2, 3), np.uint8)])
def test_mistakes_are_named(confidence: np.ndarray) -> None:
    with pytest.raises(ValueError, match="confidence"):
        calibration_counts(confidence, *np.zeros((2, 2, 2), np.uint8), 4)
