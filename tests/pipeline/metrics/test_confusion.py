from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    jaccard_score,
    precision_score,
    recall_score,
)
from sklearn.metrics import confusion_matrix as sklearn_confusion

from pipeline.metrics.confusion import (
    accuracy_per_class,
    confusion_matrix,
    frequency_weighted_iou,
    harmonic_iou,
    iou_per_class,
    mean_accuracy,
    mean_iou,
    pixel_accuracy,
    precision_per_class,
)
from pipeline.metrics.pixels import joint_counts


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int64])
def test_against_scikit_learn(dtype: type) -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 7, (2, 50, 40)).astype(dtype)
    flat = truth.ravel(), predicted.ravel()
    counts = confusion_matrix(truth, predicted, 7)
    np.testing.assert_array_equal(counts[:, :7], sklearn_confusion(*flat))
    for ours, theirs in (
        (iou_per_class(counts), jaccard_score(*flat, average=None)),
        (accuracy_per_class(counts), recall_score(*flat, average=None)),
        (precision_per_class(counts), precision_score(*flat, average=None)),
        (mean_iou(counts), jaccard_score(*flat, average="macro")),
        (frequency_weighted_iou(counts), jaccard_score(*flat, average="weighted")),
        (pixel_accuracy(counts), accuracy_score(*flat)),
        (mean_accuracy(counts), balanced_accuracy_score(*flat)),
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-15)


@given(st.data(), st.sampled_from([1, 3, 254, 255, 256, 300]), st.sampled_from([255, 65535]))
def test_against_a_loop(data: st.DataObject, num_classes: int, ignore_index: int) -> None:
    ids = np.uint8 if num_classes < 255 and ignore_index == 255 else np.uint16
    if num_classes > ignore_index:
        ignore_index = 65535
    near_the_end = st.integers(max(0, num_classes - 3), num_classes - 1)
    truth = data.draw(arrays(ids, (3, 4), elements=near_the_end | st.just(ignore_index)))
    predicted = data.draw(arrays(ids, (3, 4), elements=st.integers(0, np.iinfo(ids).max) | near_the_end))
    expected = np.zeros((num_classes, num_classes + 1), np.int64)
    for row, column in zip(truth.ravel().tolist(), predicted.ravel().tolist(), strict=True):
        if row != ignore_index:
            expected[row, min(column, num_classes)] += 1
    counts = confusion_matrix(truth, predicted, num_classes, ignore_index=ignore_index)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, expected)


def test_ignored_truth_and_unsure_prediction() -> None:
    truth = np.array([0, 0, 1, 255], np.uint8)
    predicted = np.array([0, 255, 1, 1], np.uint8)
    # The unsure pixel misses class 0; the ignored one counts nowhere.
    counts = confusion_matrix(truth, predicted, 3)
    np.testing.assert_allclose(iou_per_class(counts), [0.5, 1.0, np.nan])
    np.testing.assert_allclose(accuracy_per_class(counts), [0.5, 1.0, np.nan])
    np.testing.assert_allclose(precision_per_class(counts), [1.0, 1.0, np.nan])
    assert pixel_accuracy(counts) == pytest.approx(2 / 3)
    assert mean_accuracy(counts) == 0.75
    assert frequency_weighted_iou(counts) == pytest.approx((2 * 0.5 + 1 * 1.0) / 3)


def test_an_ignored_id_among_the_classes_is_ignored() -> None:
    truth = np.array([0, 1, 2], np.uint8)
    assert confusion_matrix(truth, truth, 3, ignore_index=0)[:, :3].trace() == 2


def test_inputs_stay_as_they_are() -> None:
    truth, predicted = np.array([0, 255, 1], np.uint8), np.array([7, 1, 255], np.uint8)
    confusion_matrix(truth, predicted, 3)
    assert truth.tolist() == [0, 255, 1]
    assert predicted.tolist() == [7, 1, 255]


def test_sums_equal_one_pass() -> None:
    rng = np.random.default_rng(1)
    truth, predicted = rng.integers(0, 5, (2, 6, 30, 30))
    parts = sum(confusion_matrix(t, p, 5) for t, p in zip(truth, predicted, strict=True))
    np.testing.assert_array_equal(parts, confusion_matrix(truth, predicted, 5))


def test_counts_beyond_the_precision_of_float32() -> None:
    size = (1 << 24) + 1001
    ones = np.ones(size, np.uint8)
    assert joint_counts(ones, ones, (2, 2)).tolist() == [[0, 0], [0, size]]


@pytest.mark.parametrize(
    ("truth", "predicted", "says"),
    [
        (np.zeros((2, 2), int), np.zeros((2, 3), int), "shape"),
        (np.full(3, 9), np.zeros(3, int), "outside"),
        (np.full(3, -1), np.zeros(3, int), "outside"),
        (np.full(3, 4, np.uint8), np.zeros(3, np.uint8), "outside"),
        (np.zeros(3, int), np.zeros(3), "integers"),
    ],
)
def test_mistakes_are_named(truth: np.ndarray, predicted: np.ndarray, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        confusion_matrix(truth, predicted, 4)


@pytest.mark.parametrize("metric", [mean_iou, mean_accuracy, pixel_accuracy, frequency_weighted_iou])
def test_nothing_seen_is_nan(metric: object) -> None:
    empty = confusion_matrix(np.empty((0, 4), np.uint8), np.empty((0, 4), np.uint8), 3)
    assert callable(metric)
    assert np.isnan(metric(empty))


def test_groups_and_absent_classes() -> None:
    # IoU 1/2, 1/3, absent, 1.
    confusion = np.array([[1, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 5, 0]])
    np.testing.assert_allclose(iou_per_class(confusion), [1 / 2, 1 / 3, np.nan, 1])
    assert mean_iou(confusion) == pytest.approx((1 / 2 + 1 / 3 + 1) / 3)
    assert mean_iou(confusion, absent="zero") == pytest.approx((1 / 2 + 1 / 3 + 1) / 4)
    assert mean_iou(confusion, [0, 3]) == pytest.approx(0.75)
    assert mean_iou(confusion, [2, 3]) == 1
    assert mean_iou(confusion, [2, 3], absent="zero") == 0.5
    assert np.isnan(mean_iou(confusion, [2]))
    assert np.isnan(mean_iou(confusion, []))


@pytest.mark.parametrize(
    ("seen", "unseen", "harmonic"),
    [
        # Published for MaskCLIP+ on VOC and Context; the seen column follows from the others.
        (0.888, 0.861, 0.874),
        (0.444, 0.667, 0.533),
        # COCO-Stuff is printed as 45.0, from unrounded values.
        (0.381, 0.547, 0.449),
        (0.0, 0.0, 0.0),
        (0.9, 0.0, 0.0),
        (float("nan"), 0.5, float("nan")),
    ],
)
def test_harmonic_iou(seen: float, unseen: float, harmonic: float) -> None:
    assert round(harmonic_iou(seen, unseen), 3) == pytest.approx(harmonic, nan_ok=True)
