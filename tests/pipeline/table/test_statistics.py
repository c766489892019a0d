"""Statistics of one labelled image against plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.table.statistics import agreement, quality, quality_of, segments, softmin

shapes = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24)


@st.composite
def maps(draw, dtype=None, high=None):
    """A label map of few or many values and a confidence map of the same shape."""
    kind = dtype or draw(st.sampled_from([np.uint8, np.uint16]))
    shape = draw(shapes)
    top = draw(st.sampled_from([0, 3, np.iinfo(kind).max]))
    labels = draw(hnp.arrays(kind, shape, elements=st.integers(0, top)))
    return labels, draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255)))


def test_read_only_input():
    labels = np.frombuffer(bytes(range(6)), np.uint8).reshape(2, 3)
    assert segments(labels, labels, ignore_index=255)


@given(maps(), st.sampled_from([0, 2, 255, 65535]))
def test_segments_against_brute_force(pair, ignore_index):
    labels, confidence = pair
    expected = []
    for class_id in np.unique(labels).tolist():
        if class_id != ignore_index:
            ys, xs = np.nonzero(labels == class_id)
            expected.append(
                {
                    "class_id": class_id,
                    "area": len(ys),
                    "mean_confidence": pytest.approx(confidence[ys, xs].mean() / 255, abs=1e-12),
                    "bbox": [xs.min(), ys.min(), xs.max() - xs.min() + 1, ys.max() - ys.min() + 1],
                }
            )
    assert segments(labels, confidence, ignore_index=ignore_index) == expected


def softmin_of_pixels(pixels: np.ndarray, temperature: float) -> float:
    """cleanlab's formula, pixel by pixel: inner product of s and softmax(1 - s), shifted by its maximum."""
    s = pixels.astype(np.float64) / 255
    x = (1 - s) / temperature
    weights = np.exp(x - x.max())
    return float((s * weights / weights.sum()).sum())


@given(maps(), st.sampled_from([0, 255]), st.sampled_from([0.01, 0.1, 1.0]))
def test_softmin_against_the_direct_formula(pair, ignore_index, temperature):
    labels, confidence = pair
    pixels = confidence[labels != ignore_index]
    expected = softmin_of_pixels(pixels, temperature) if pixels.size else 0.0
    score = softmin(confidence, labels, ignore_index=ignore_index, temperature=temperature)
    assert score == pytest.approx(expected, abs=1e-12)
    assert 0 <= score <= 1
    if temperature == 0.1:
        assert quality(confidence, labels, ignore_index=ignore_index, score="softmin") == score


@given(maps(), st.sampled_from([0, 255]))
def test_quality_is_the_mean_over_classes_of_their_confidence(pair, ignore_index):
    labels, confidence = pair
    classes = [c for c in np.unique(labels) if c != ignore_index]
    means = [confidence[labels == c].mean() / 255 for c in classes]
    expected = np.mean(means) if means else 0.0
    score = quality(confidence, labels, ignore_index=ignore_index)
    assert score == pytest.approx(expected, abs=1e-12)
    assert quality_of(segments(labels, confidence, ignore_index=ignore_index)) == pytest.approx(score)


@pytest.mark.parametrize(("score", "below"), [("softmin", 0.45), ("classes", 0.9)])
def test_quality_falls_with_doubt(score, below):
    labels = np.zeros((10, 10), np.uint8)
    sure = np.full((10, 10), 250, np.uint8)
    doubtful = sure.copy()
    doubtful[:2] = 60
    scores = [quality(c, labels, ignore_index=255, score=score) for c in (sure, doubtful)]
    assert scores[0] == pytest.approx(250 / 255)
    assert scores[1] < below
    labels[:2] = 255  # the doubtful pixels were left without a label
    assert quality(doubtful, labels, ignore_index=255, score=score) == pytest.approx(250 / 255)


@given(maps(), maps(), st.sampled_from([0, 255]))
def test_agreement_is_the_dice_coefficient_of_each_class(pair, other, ignore_index):
    labels, again = pair[0], np.resize(other[0], pair[0].shape)
    expected = []
    for number in np.unique(labels):
        one, two = labels == number, again == number
        if number != ignore_index:
            expected.append(2 * (one & two).sum() / (one.sum() + two.sum()))
    assert agreement(labels, again, ignore_index=ignore_index) == pytest.approx(expected)
    whole = agreement(labels, labels, ignore_index=ignore_index)
    assert whole == [1.0] * len(expected)
