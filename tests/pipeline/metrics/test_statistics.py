from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.metrics.boundary import boundary_counts
from pipeline.metrics.calibration import calibration_counts
from pipeline.metrics.confusion import confusion_matrix
from pipeline.metrics.statistics import SegmentationStatistics, summarise, summarise_classes

CLASSES = 5
Image = tuple[np.ndarray, np.ndarray, np.ndarray]


def image(seed: int) -> Image:
    """Truth, prediction, confidence of an image of random size with regions, ignored and undecided pixels."""
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, CLASSES, (2, 4, 5)).astype(np.uint8)
    truth, predicted = (np.kron(cell, np.ones((int(rng.integers(2, 9)), 7), np.uint8)) for cell in cells)
    predicted = np.resize(predicted, truth.shape)
    predicted = np.where(rng.random(truth.shape) < 0.5, truth, predicted)
    truth[rng.random(truth.shape) < 0.05] = 255
    predicted[rng.random(truth.shape) < 0.05] = 255
    return truth, predicted, rng.integers(0, 256, truth.shape).astype(np.uint8)


IMAGES = [image(seed) for seed in range(8)]
PARTS = [SegmentationStatistics.of(*each, CLASSES) for each in IMAGES]


def same(one: SegmentationStatistics, two: SegmentationStatistics) -> bool:
    return one.images == two.images and all(
        np.array_equal(getattr(one, name), getattr(two, name))
        and getattr(one, name).dtype == getattr(two, name).dtype == np.int64
        for name in ("confusion", "boundary", "calibration")
    )


def total(parts: list[SegmentationStatistics]) -> SegmentationStatistics:
    return sum(parts, SegmentationStatistics.zero(CLASSES))


def test_of_is_what_the_parts_count() -> None:
    for (truth, predicted, confidence), part in zip(IMAGES, PARTS, strict=True):
        assert part.images == 1
        np.testing.assert_array_equal(part.confusion, confusion_matrix(truth, predicted, CLASSES))
        np.testing.assert_array_equal(part.boundary, boundary_counts(truth, predicted, CLASSES))
        np.testing.assert_array_equal(
            part.calibration, calibration_counts(confidence, truth, predicted, CLASSES)
        )


def test_a_sum_is_a_single_pass_over_all_pixels() -> None:
    truth, predicted, confidence = (np.concatenate([each[i].ravel() for each in IMAGES]) for i in range(3))
    merged = total(PARTS)
    assert merged.images == len(IMAGES)
    np.testing.assert_array_equal(merged.confusion, confusion_matrix(truth, predicted, CLASSES))
    np.testing.assert_array_equal(
        merged.calibration, calibration_counts(confidence, truth, predicted, CLASSES)
    )


@settings(max_examples=50)
@given(st.permutations(range(8)), st.lists(st.integers(0, 8), max_size=5))
def test_any_split_merges_bit_for_bit(order: list[int], cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), 8]
    workers = [total([PARTS[i] for i in order[start:end]]) for start, end in pairwise(ends)]
    single = total(PARTS)
    assert same(total(workers), single)
    assert summarise(total(workers)) == summarise(single)
    # The way through Ray: one row of an Arrow table from each worker, put end to end.
    table = pa.Table.from_pylist([worker.to_arrays() for worker in workers])
    columns = {name: table[name].combine_chunks().flatten().to_numpy() for name in table.column_names}
    assert same(SegmentationStatistics.from_arrays(CLASSES, **columns), single)


def test_travels_light() -> None:
    rng = np.random.default_rng(0)
    truth = np.kron(rng.integers(0, 171, (4, 5)), np.ones((90, 90), int)).astype(np.uint8)
    part = SegmentationStatistics.of(truth, truth, None, 171)
    assert sum(array.nbytes for array in part.to_arrays().values()) < 2000 < part.confusion.nbytes


def test_what_is_not_measured_is_nan() -> None:
    truth, predicted, _ = IMAGES[0]
    part = SegmentationStatistics.of(truth, predicted, None, CLASSES, boundary=False)
    metrics = summarise(part)
    assert np.isnan(metrics["ece"])
    assert np.isnan(metrics["boundary_miou"])
    assert metrics["miou"] == summarise(PARTS[0])["miou"] > 0


@pytest.mark.parametrize(
    "empty",
    [
        SegmentationStatistics.zero(CLASSES),
        SegmentationStatistics.of(*np.empty((3, 0, 0), np.uint8), CLASSES),
        SegmentationStatistics.of(np.full((4, 4), 255, np.uint8), *np.zeros((2, 4, 4), np.uint8), CLASSES),
    ],
    ids=["no image", "no pixel", "all ignored"],
)
def test_nothing_is_nan(empty: SegmentationStatistics) -> None:
    metrics = summarise(empty, ["seen"] * CLASSES)
    assert set(metrics) == {
        "miou", "pixel_accuracy", "mean_accuracy", "fwiou", "boundary_miou", "ece",
        "miou_seen", "miou_unseen", "hiou",
    }  # fmt: skip
    assert np.isnan(list(metrics.values())).all()
    assert np.isnan(empty.miou)


def test_groups() -> None:
    # IoU 3/4, 1/2, 0 (a seen class predicted on the unseen), never there, 4/5.
    confusion = np.zeros((5, 6), np.int64)
    confusion[0, :2] = 3, 1
    confusion[1, 1] = 1
    confusion[4, 4:] = 4, 1
    confusion[2, 5] = 7
    part = SegmentationStatistics(1, confusion, np.zeros((5, 2), np.int64), np.zeros((256, 2), np.int64))
    metrics = summarise(part, ["seen", "seen", "unseen", None, "unseen"])
    seen, unseen = (3 / 4 + 1 / 2) / 2, (0 + 4 / 5) / 2
    assert metrics["miou_seen"] == pytest.approx(seen)
    assert metrics["miou_unseen"] == pytest.approx(unseen)
    assert metrics["hiou"] == pytest.approx(2 / (1 / seen + 1 / unseen))
    assert summarise(part)["miou"] == pytest.approx((3 / 4 + 1 / 2 + 0 + 4 / 5) / 4)
    assert summarise(part, absent="zero")["miou"] == pytest.approx((3 / 4 + 1 / 2 + 0 + 4 / 5) / 5)
    assert "hiou" not in summarise(part)
    with pytest.raises(ValueError, match="groups"):
        summarise(part, ["seen"])


def test_classes() -> None:
    truth, predicted = np.array([[0, 0, 0, 1]], np.uint8), np.array([[0, 0, 2, 1]], np.uint8)
    rows = summarise_classes(SegmentationStatistics.of(truth, predicted, None, 4))
    np.testing.assert_array_equal(rows["pixels"], [3, 1, 0, 0])
    np.testing.assert_allclose(rows["iou"], [2 / 3, 1, 0, np.nan])
    np.testing.assert_allclose(rows["boundary_iou"], [2 / 3, 1, 0, np.nan])
    np.testing.assert_allclose(rows["accuracy"], [2 / 3, 1, np.nan, np.nan])
    np.testing.assert_allclose(rows["precision"], [1, 1, 0, np.nan])


def test_an_image_is_scored_by_the_classes_in_it() -> None:
    truth, predicted = np.array([[0, 0, 0, 1]], np.uint8), np.array([[0, 0, 2, 1]], np.uint8)
    assert SegmentationStatistics.of(truth, predicted, None, 100).miou == pytest.approx((2 / 3 + 1 + 0) / 3)
    # A class that is predicted only where the truth is ignored is not there.
    truth[0, 2] = 255
    assert SegmentationStatistics.of(truth, predicted, None, 100).miou == 1


def test_statistics_of_other_classes_do_not_add_up() -> None:
    with pytest.raises(ValueError, match="classes"):
        SegmentationStatistics.zero(3) + SegmentationStatistics.zero(4)
