from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix as sklearn_confusion
from sklearn.metrics import jaccard_score

from pipeline.metrics import confusion_matrix, iou_per_class, mean_iou


def test_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 7, (2, 50, 40)).astype(np.uint8)
    counts = confusion_matrix(truth, predicted, 7)
    np.testing.assert_array_equal(counts[:, :7], sklearn_confusion(truth.ravel(), predicted.ravel()))
    expected = jaccard_score(truth.ravel(), predicted.ravel(), average=None)
    np.testing.assert_allclose(iou_per_class(counts), expected, atol=1e-15)
    assert mean_iou(counts) == pytest.approx(expected.mean())


def test_ignored_truth_and_unsure_prediction() -> None:
    truth = np.array([0, 0, 1, 255], np.uint8)
    predicted = np.array([0, 255, 1, 1], np.uint8)
    # The unsure pixel misses class 0; the ignored one counts nowhere.
    np.testing.assert_allclose(iou_per_class(confusion_matrix(truth, predicted, 3)), [0.5, 1.0, np.nan])


def test_sums_equal_one_pass() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 5, (2, 6, 30, 30))
    parts = sum(confusion_matrix(t, p, 5) for t, p in zip(truth, predicted, strict=True))
    np.testing.assert_array_equal(parts, confusion_matrix(truth, predicted, 5))


@pytest.mark.parametrize(
    ("truth", "predicted", "says"),
    [(np.zeros((2, 2), int), np.zeros((2, 3), int), "shape"), (np.full(3, 9), np.zeros(3, int), "outside")],
)
def test_mistakes_are_named(truth: np.ndarray, predicted: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        confusion_matrix(truth, predicted, 4)


def test_nothing_seen_is_nan() -> None:
    assert np.isnan(mean_iou(np.zeros((3, 4), np.int64)))
