from __future__ import annotations

import warnings
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, confusion_matrix, jaccard_score

from models.errors import MaskMillError
from pipeline.metrics.foreground import (
    CLIPSEG,
    STANDARD,
    THRESHOLDS,
    Convention,
    ForegroundStatistics,
    average_precision,
    binary_iou,
    foreground_iou,
    mean_iou,
    precision_recall_curve,
    summarise,
)

Sample = tuple[np.ndarray, np.ndarray, int]
CONVENTIONS = pytest.mark.parametrize("convention", [CLIPSEG, STANDARD], ids=lambda c: c.name)


def samples(count: int = 6, seed: int = 0, classes: int = 3) -> list[Sample]:
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        truth = rng.random((13, 17)) < 0.3
        probability = np.clip(rng.normal(0.3 + 0.25 * truth, 0.2), 0, 1).astype(np.float32)
        found.append((probability, truth, index % classes))
    return found


def statistics_of(parts: list[Sample]) -> ForegroundStatistics:
    return ForegroundStatistics.merge(ForegroundStatistics.of(*part) for part in parts)


def same(one: ForegroundStatistics, two: ForegroundStatistics) -> bool:
    return (
        one.thresholds == two.thresholds
        and np.array_equal(one.class_ids, two.class_ids)
        and np.array_equal(one.counts, two.counts)
        and one.counts.dtype == two.counts.dtype == np.int64
    )


def test_thresholds_are_those_of_the_paper() -> None:
    assert len(THRESHOLDS) == 49
    np.testing.assert_allclose(THRESHOLDS, np.arange(1, 50) / 50)


def test_counts_against_scikit_learn() -> None:
    (probability, truth, _), *_ = samples()
    counts = ForegroundStatistics.of(probability, truth, 7).counts[0]
    for threshold, row in zip(THRESHOLDS, counts, strict=True):
        (tn, fp), (fn, tp) = confusion_matrix(truth.ravel(), (probability > threshold).ravel(), labels=[0, 1])
        assert row.tolist() == [tp, fp, fn, tn]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_probability_at_the_threshold_is_background(dtype: type) -> None:
    probability = np.array(THRESHOLDS, dtype)
    counts = ForegroundStatistics.of(probability, np.ones(49, bool), 0).counts[0]
    assert counts[:, 0].tolist() == list(range(48, -1, -1))


def test_unknown_pixels_are_left_out() -> None:
    (probability, truth, _), *_ = samples()
    known = np.arange(truth.size).reshape(truth.shape) % 3 > 0
    masked = ForegroundStatistics.of(probability, truth, 0, known=known)
    assert same(masked, ForegroundStatistics.of(probability[known], truth[known], 0))


def by_definition(parts: list[Sample], added: int) -> dict[str, np.ndarray]:
    """IoU at every threshold, in plain loops over what the paper's text says."""
    total: dict[float, np.ndarray] = {}
    per_class: dict[float, dict[int, np.ndarray]] = {}
    for t in THRESHOLDS:
        total[t], per_class[t] = np.zeros(4), defaultdict(lambda: np.zeros(4))
        for probability, truth, class_id in parts:
            found = probability > t
            counts = np.array(
                [
                    np.sum(found & truth),
                    np.sum(found & ~truth),
                    np.sum(~found & truth),
                    np.sum(~found & ~truth),
                ]
            )
            total[t] += counts
            per_class[t][class_id] += counts

    def iou(hits: float, *misses: float) -> float:
        return hits / (added + hits + sum(misses))

    return {
        "iou_fg": np.array([iou(tp, fp, fn) for tp, fp, fn, tn in total.values()]),
        "iou_bin": np.array(
            [0.5 * iou(tp, fp, fn) + 0.5 * iou(tn, fp, fn) for tp, fp, fn, tn in total.values()]
        ),
        "miou": np.array(
            [np.mean([iou(tp, fp, fn) for tp, fp, fn, _ in c.values()]) for c in per_class.values()]
        ),
    }


@CONVENTIONS
@pytest.mark.parametrize("classes", [3, 6], ids=["classes", "one class per sample"])
def test_iou_by_definition(convention: Convention, classes: int) -> None:
    parts = samples(classes=classes)
    statistics = statistics_of(parts)
    expected = by_definition(parts, convention.added)
    np.testing.assert_allclose(foreground_iou(statistics, convention), expected["iou_fg"])
    np.testing.assert_allclose(binary_iou(statistics, convention), expected["iou_bin"])
    np.testing.assert_allclose(mean_iou(statistics, convention), expected["miou"])
    best, at = summarise(statistics, convention), summarise(statistics, convention, threshold=0.3)
    for name, values in expected.items():
        assert best[name] == pytest.approx(values.max())
        assert best[f"{name}_threshold"] == THRESHOLDS[values.argmax()]
        assert at[name] == pytest.approx(values[14])
        assert at[f"{name}_threshold"] == pytest.approx(0.3)


def test_standard_is_scikit_learn() -> None:
    parts = samples()
    statistics = statistics_of(parts)
    probability = np.concatenate([part[0].ravel() for part in parts])
    truth = np.concatenate([part[1].ravel() for part in parts])
    assert foreground_iou(statistics, STANDARD)[24] == pytest.approx(jaccard_score(truth, probability > 0.5))
    both = jaccard_score(truth, probability > 0.5, average="macro")
    assert binary_iou(statistics, STANDARD)[24] == pytest.approx(both)
    # All that the counts know of a probability is how many thresholds it exceeds.
    exceeded = (probability[:, None] > np.array(THRESHOLDS, np.float32)).sum(1)
    assert average_precision(statistics, STANDARD) == pytest.approx(average_precision_score(truth, exceeded))
    assert average_precision(statistics, STANDARD) == pytest.approx(
        average_precision_score(truth, probability), abs=0.01
    )


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=30))
def test_standard_average_precision_is_scikit_learns(pixels: list[tuple[int, bool]]) -> None:
    level, truth = (np.array(column) for column in zip(*pixels, strict=True))
    statistics = ForegroundStatistics.of((level - 0.5) / 50, truth, 0)
    if not truth.any():
        assert np.isnan(average_precision(statistics, STANDARD))
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = average_precision_score(truth, np.clip(level, 1, 50))
    assert average_precision(statistics, STANDARD) == pytest.approx(expected)


def parabolas(x: np.ndarray, y: np.ndarray) -> float:
    """Simpson's rule for an odd number of points: the integral of a parabola through each three."""
    area = 0.0
    for start in range(0, len(x) - 2, 2):
        integral = np.polynomial.Polynomial.fit(x[start : start + 3], y[start : start + 3], 2).integ()
        area += integral(x[start + 2]) - integral(x[start])
    return area


@pytest.mark.parametrize("keep", [2, 3, 4, 11, 48, 49])
def test_clipseg_average_precision(keep: int) -> None:
    parts = samples()
    thresholds = THRESHOLDS[min(14, 49 - keep) :][:keep]
    statistics = ForegroundStatistics.merge(
        ForegroundStatistics.of(*part, thresholds=thresholds) for part in parts
    )
    points = {}
    for t in thresholds[::-1]:
        tp = sum(np.sum((p > t) & g) for p, g, _ in parts)
        fp = sum(np.sum((p > t) & ~g) for p, g, _ in parts)
        fn = sum(np.sum((p <= t) & g) for p, g, _ in parts)
        if tp + fp:
            points.setdefault(tp / (1 + tp + fn), tp / (1 + tp + fp))
    x, y = np.array(sorted(points.items())).T
    if len(x) % 2:
        expected = parabolas(x, y)
    else:
        head = parabolas(x[:-1], y[:-1]) + (x[-1] - x[-2]) * (y[-1] + y[-2]) / 2
        tail = parabolas(x[1:], y[1:]) + (x[1] - x[0]) * (y[1] + y[0]) / 2
        expected = (head + tail) / 2
    assert average_precision(statistics, CLIPSEG) == pytest.approx(expected)
    assert expected > 0


def test_curves() -> None:
    statistics = statistics_of(samples())
    recall, precision = precision_recall_curve(statistics, STANDARD)
    assert (recall[0], precision[0], recall[-1]) == (0, 1, 1)
    assert precision[-1] == pytest.approx(np.mean([part[1].mean() for part in samples()]))
    assert (np.diff(recall) >= 0).all()
    recall, _ = precision_recall_curve(statistics, CLIPSEG)
    assert 0 <= recall[0] < recall[-1] < 1


def test_the_added_one_of_a_small_object() -> None:
    truth = np.arange(100) < 50
    statistics = ForegroundStatistics.of(truth * 0.99, truth, 0)
    assert summarise(statistics, STANDARD, threshold=0.5)["iou_fg"] == 1
    assert summarise(statistics, CLIPSEG, threshold=0.5)["iou_fg"] == 50 / 51
    assert average_precision(statistics, STANDARD) == 1
    # The same point at all 49 thresholds; one point has no area.
    assert [values.tolist() for values in precision_recall_curve(statistics, CLIPSEG)] == [
        [50 / 51],
        [50 / 51],
    ]
    assert average_precision(statistics, CLIPSEG) == 0


@CONVENTIONS
def test_nothing_there(convention: Convention) -> None:
    empty, absent = ForegroundStatistics.zero(), ForegroundStatistics.of(np.zeros(5), np.zeros(5, bool), 0)
    assert np.isnan(average_precision(empty, convention))
    assert np.isnan(average_precision(absent, convention))
    assert np.isnan(summarise(empty, convention)["miou"])
    # Neither true nor found: undefined, and 0 if 1 is added below.
    assert summarise(absent, convention)["miou"] == pytest.approx(
        0 if convention.added else np.nan, nan_ok=True
    )


@settings(max_examples=30)
@given(st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=4))
def test_any_split_merges_bit_for_bit(workers: list[list[int]]) -> None:
    parts = [ForegroundStatistics.of(*part) for part in samples()]
    single = ForegroundStatistics.merge(parts[i] for indices in workers for i in indices)
    sums = [sum((parts[i] for i in indices), ForegroundStatistics.zero()) for indices in workers]
    assert same(single, ForegroundStatistics.merge(sums[::-1]))
    columns = [part.to_arrays() for part in sums]
    if columns:
        joined = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
        assert same(single, ForegroundStatistics.from_arrays(**joined))
        flat = joined["counts"].ravel()
        assert same(single, ForegroundStatistics.from_arrays(joined["class_id"], flat))


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="NaN"):
        ForegroundStatistics.of(np.array([0.1, np.nan]), np.array([True, True]), 0)
    with pytest.raises(ValueError, match="floating"):
        ForegroundStatistics.of(np.array([1, 2]), np.array([True, True]), 0)
    with pytest.raises(ValueError, match="shape"):
        ForegroundStatistics.of(np.array([0.1, 0.2]), np.array([True]), 0)
    with pytest.raises(ValueError, match="thresholds"):
        ForegroundStatistics.zero() + ForegroundStatistics.zero((0.5,))
    with pytest.raises(MaskMillError) as caught:
        summarise(statistics_of(samples()), CLIPSEG, threshold=0.31)
    assert caught.value.code == "wrong_use"
