from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import jaccard_score

from pipeline.metrics import paired
from pipeline.metrics.confusion import mean_iou
from pipeline.metrics.paired import Gains, iou_of_counts, miou_of_counts, paired_bootstrap
from pipeline.metrics.statistics import SegmentationStatistics

CLASSES = 4
IGNORED = 255


def maps(count: int, seed: int = 0, classes: int = CLASSES) -> np.ndarray:
    """Truth and the labels of two models: (3, N, H, W). The last class is only predicted."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes - 1, (count, 6, 6)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.1] = IGNORED
    return np.stack([truth, *(_wrong(truth, rng, share, classes) for share in (0.3, 0.5))])


def _wrong(truth: np.ndarray, rng: np.random.Generator, share: float, classes: int) -> np.ndarray:
    labels = np.where(rng.random(truth.shape) < share, rng.integers(0, classes, truth.shape), truth)
    return np.where(labels == IGNORED, 0, labels).astype(np.uint8)


def counts(truth: np.ndarray, labels: np.ndarray, classes: int = CLASSES) -> np.ndarray:
    """True, predicted and correct pixels by image and class, (3, N, C)."""
    matrices = [
        SegmentationStatistics.of(*pair, None, classes, boundary=False).confusion
        for pair in zip(truth, labels, strict=True)
    ]
    return np.array([[m.sum(1), m[:, :-1].sum(0), np.diag(m)] for m in matrices]).swapaxes(0, 1)


def both(count: int, seed: int = 0) -> tuple[np.ndarray, tuple, tuple]:
    truth, one, two = maps(count, seed)
    (true, *first), (_, *second) = counts(truth, one), counts(truth, two)
    return true, tuple(first), tuple(second)


def test_the_resamples_are_those_of_a_plain_loop_with_scikit_learn() -> None:
    images, resamples, seed = 7, 25, 3
    truth, one, two = maps(images)
    (true, *first), (_, *second) = counts(truth, one), counts(truth, two)
    gains = paired_bootstrap(true, tuple(first), tuple(second), resamples=resamples, seed=seed)
    rng = np.random.default_rng(seed)
    for found, by_class in zip(gains.mean, gains.classes, strict=True):
        drawn = rng.integers(0, images, images)
        pixels = truth[drawn].ravel()
        known = pixels != IGNORED
        occurring = np.isin(np.arange(CLASSES), pixels)
        first_iou, second_iou = (
            jaccard_score(pixels[known], model[drawn].ravel()[known], labels=range(CLASSES), average=None)
            for model in (one, two)
        )
        expected = np.where(occurring, second_iou - first_iou, np.nan)
        assert by_class == pytest.approx(expected, nan_ok=True)
        assert found == pytest.approx(np.nanmean(expected))


def test_the_mean_is_over_the_classes_of_the_truth() -> None:
    true, (predicted, correct), _ = both(5)
    confusion = sum(
        SegmentationStatistics.of(*pair, None, CLASSES).confusion for pair in zip(*maps(5)[:2], strict=True)
    )
    sums = true.sum(0), predicted.sum(0), correct.sum(0)
    assert sums[0][3] == 0 and sums[1][3] > 0, "the last class is only predicted"
    assert miou_of_counts(*sums) == pytest.approx(mean_iou(confusion, [0, 1, 2]))
    assert np.isnan(iou_of_counts(*sums)[3])
    assert np.isnan(miou_of_counts(np.zeros(2), np.ones(2), np.zeros(2)))


def test_blocks_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    true, first, second = both(13)
    whole = paired_bootstrap(true, first, second, resamples=40, seed=1)
    # Blocks of one resample and of a few images, then of a few resamples.
    for entries in (15, 30, 61):
        monkeypatch.setattr(paired, "BLOCK_ENTRIES", entries)
        parts = paired_bootstrap(true, first, second, resamples=40, seed=1)
        assert np.array_equal(parts.mean, whole.mean)
        assert np.array_equal(parts.classes, whole.classes, equal_nan=True)


@given(st.integers(0, 2**32), st.integers(1, 30))
def test_swapped_models_have_the_opposite_gain_in_every_resample(seed: int, images: int) -> None:
    true, first, second = both(images, seed % 1000)
    forth = paired_bootstrap(true, first, second, resamples=20, seed=seed)
    back = paired_bootstrap(true, second, first, resamples=20, seed=seed)
    assert np.array_equal(forth.mean, -back.mean, equal_nan=True)
    assert np.array_equal(forth.classes, -back.classes, equal_nan=True)
    same = paired_bootstrap(true, first, first, resamples=20, seed=seed)
    assert not np.nan_to_num(same.mean).any()


def test_an_interval_is_made_of_quantiles() -> None:
    mean = np.random.default_rng(0).normal(0.02, 0.01, 5000)
    low, high = Gains(np.append(mean, np.nan), np.empty((5001, 0))).interval(0.9)
    assert low == pytest.approx(norm.ppf(0.05, 0.02, 0.01), abs=1e-3)
    assert high == pytest.approx(norm.ppf(0.95, 0.02, 0.01), abs=1e-3)
    assert np.isnan(Gains(np.full(5, np.nan), np.empty((5, 0))).interval(0.9)).all()


def test_upper_ends_hold_for_all_classes_at_once() -> None:
    rng = np.random.default_rng(1)
    errors = np.linspace(0.01, 0.1, 50)
    resampled = rng.normal(0, errors, (20_000, 50))
    judged = np.arange(50) != 7
    highs = Gains(resampled.mean(1), resampled).class_highs(np.zeros(50), judged, 0.95)
    assert np.isnan(highs[7])
    # Of independent normal deviations the largest is known.
    assert highs[judged] / errors[judged] == pytest.approx(norm.ppf(0.975 ** (1 / 49)), rel=0.03)
    (one,) = Gains(resampled[:, 0], resampled[:, :1]).class_highs(np.zeros(1), np.ones(1, bool), 0.95)
    assert one == pytest.approx(1.96 * 0.01, rel=0.03)
    alike = Gains(np.zeros(9), np.zeros((9, 2))).class_highs(np.zeros(2), np.ones(2, bool), 0.95)
    assert alike.tolist() == [0, 0]


def test_the_interval_covers_the_true_difference_as_often_as_it_says() -> None:
    """Two models on 150 images out of a population of 20,000: the interval is that of the population."""
    rng = np.random.default_rng(7)

    def world(images: int) -> tuple[np.ndarray, tuple, tuple]:
        true = np.rint(np.exp(rng.normal(6, 1, (images, 5))) * (rng.random((images, 5)) < 0.6)).astype(
            np.int64
        )
        hard = rng.normal(0.7, 0.15, (images, 1))
        models = []
        for better in (0.0, 0.02):
            right = np.clip(hard + better + rng.normal(0, 0.1, true.shape), 0, 1)
            correct = np.rint(true * right).astype(np.int64)
            wrong = true.sum(1, keepdims=True) - correct.sum(1, keepdims=True)
            models.append((correct + wrong // 5, correct))
        return true, models[0], models[1]

    true, first, second = world(20_000)
    expected = miou_of_counts(true.sum(0), *(part.sum(0) for part in second)) - miou_of_counts(
        true.sum(0), *(part.sum(0) for part in first)
    )
    covered = 0
    for seed in range(200):
        low, high = paired_bootstrap(*world(150), resamples=400, seed=seed).interval(0.95)
        covered += low <= expected <= high
    # 186 to 200 of 200 is where 95 % would be but for one case in a thousand.
    assert covered >= 180
