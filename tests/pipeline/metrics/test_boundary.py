from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import distance_transform_cdt

from pipeline.metrics.boundary import band_width, boundary_counts, boundary_iou_per_class


def reference(truth: np.ndarray, predicted: np.ndarray, num_classes: int, ratio: float) -> np.ndarray:
    """Class by class: distance to the nearest pixel that is not of the class, the outside included."""
    distance = max(1, round(ratio * np.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2)))
    known = truth != 255
    counts = np.zeros((num_classes, 2), np.int64)
    for index in range(num_classes):
        bands = []
        for labels in truth, predicted:
            mask = np.pad((labels == index) & known, 1)
            depth = distance_transform_cdt(mask, metric="chessboard")
            bands.append((mask & (depth <= distance))[1:-1, 1:-1])
        counts[index] = np.count_nonzero(bands[0] & bands[1]), np.count_nonzero(bands[0] | bands[1])
    return counts


@given(st.data(), st.integers(1, 14), st.integers(1, 14), st.sampled_from([0.02, 0.1, 0.15, 0.3, 2.0]))
def test_against_distances(data: st.DataObject, height: int, width: int, ratio: float) -> None:
    ids = st.sampled_from([0, 0, 0, 1, 2, 255])
    truth, predicted = (data.draw(arrays(np.uint8, (height, width), elements=ids)) for _ in range(2))
    np.testing.assert_array_equal(
        boundary_counts(truth, predicted, 3, dilation_ratio=ratio), reference(truth, predicted, 3, ratio)
    )


def blobs(seed: int, num_classes: int, dtype: type) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, num_classes, (6, 8)), np.ones((15, 12), int)).astype(dtype)


@pytest.mark.parametrize(("num_classes", "dtype"), [(4, np.uint8), (4, np.int64), (300, np.uint16)])
def test_against_distances_on_regions(num_classes: int, dtype: type) -> None:
    truth, predicted = blobs(0, num_classes, dtype), blobs(1, num_classes, dtype)
    predicted[20:70, 10:80] = truth[20:70, 10:80]
    truth[30:34] = 255
    if num_classes > 255:
        truth[truth == 255] = 254
    counts = boundary_counts(truth, predicted, num_classes, ignore_index=255)
    np.testing.assert_array_equal(counts, reference(truth, predicted, num_classes, 0.02))
    assert counts[:, 0].sum() > 0


def test_by_hand() -> None:
    # 7 x 7 in a field of the other class, moved by one: rings of 24 pixels.
    truth, predicted = np.zeros((2, 20, 20), np.uint8)
    truth[5:12, 5:12] = 1
    predicted[5:12, 6:13] = 1
    assert band_width(20, 20) == 1
    both, either = boundary_counts(truth, predicted, 2)[1]
    assert (both, either) == (12, 36)  # six columns of the top and of the bottom are in both
    assert boundary_iou_per_class(np.array([[both, either]])).tolist() == [12 / 36]


def test_stricter_than_iou_for_large_objects() -> None:
    truth, predicted = np.zeros((2, 300, 400), np.uint8)
    truth[50:250, 50:350] = 1
    predicted[54:254, 54:354] = 1
    boundary = boundary_iou_per_class(boundary_counts(truth, predicted, 2))[1]
    overlap = 196 * 296 / (2 * 200 * 300 - 196 * 296)
    assert boundary < overlap - 0.3


def test_ignored_pixels_neither_help_nor_hurt() -> None:
    truth = blobs(0, 3, np.uint8)
    truth[40:45] = truth[:, 30:36] = 255
    known = truth != 255
    right = np.where(known, truth, 2)
    assert np.unique(boundary_iou_per_class(boundary_counts(truth, right, 3))).tolist() == [1]
    wrong = np.where(known, blobs(1, 3, np.uint8), 0)
    other = np.where(known, wrong, blobs(2, 3, np.uint8))
    assert not np.array_equal(wrong, other)
    np.testing.assert_array_equal(boundary_counts(truth, wrong, 3), boundary_counts(truth, other, 3))


@pytest.mark.parametrize("shape", [(0, 5), (4, 5)])
def test_nothing_known_is_nan(shape: tuple[int, int]) -> None:
    counts = boundary_counts(np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8), 2)
    assert not counts.any()
    assert np.isnan(boundary_iou_per_class(counts)).all()


def test_undecided_pixels_miss() -> None:
    truth = np.zeros((9, 9), np.uint8)
    predicted = np.full((9, 9), 255, np.uint8)
    assert boundary_counts(truth, predicted, 2).tolist() == [[0, 32], [0, 0]]


def test_only_one_image_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"\(H, W\)"):
        boundary_counts(np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4), np.uint8), 2)


@pytest.mark.parametrize(
    ("height", "width", "pixels"), [(480, 640, 16), (375, 500, 12), (1, 1, 1), (20, 20, 1)]
)
def test_band_width(height: int, width: int, pixels: int) -> None:
    assert band_width(height, width) == pixels
