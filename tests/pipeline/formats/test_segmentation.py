"""Segmentations: what is drawn, against pycocotools, and what is refused before pycocotools sees it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as coco

from pipeline.formats.segmentation import checked, encoded

# pycocotools under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

H, W = 10, 12
SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]
masks = arrays.arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40)), elements=st.integers(0, 1))


def drawn(segmentation: Any, height: int = H, width: int = W) -> np.ndarray:
    mask: np.ndarray = coco.decode(encoded(checked(segmentation, height, width), height, width))
    return mask


def compressed(mask: np.ndarray) -> dict[str, Any]:
    rle = coco.encode(np.asfortranarray(mask))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def runs(mask: np.ndarray) -> dict[str, Any]:
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[-1], flat, [-1]])))
    lengths = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": lengths if flat[0] == 0 else [0, *lengths]}


@settings(deadline=None, max_examples=100)
@given(masks)
def test_masks_come_back_from_both_kinds_of_rle(mask: np.ndarray) -> None:
    for rle in (compressed(mask), runs(mask)):
        np.testing.assert_array_equal(drawn(rle, *mask.shape), mask)


def test_long_runs_of_a_large_mask() -> None:
    mask = np.zeros((3000, 4000), np.uint8)
    mask[2999, 3999] = mask[5, 7] = 1
    np.testing.assert_array_equal(drawn(compressed(mask), *mask.shape), mask)


PAIRS = [[1, 1], [5, 1], [5, 5], [1, 5]]


@pytest.mark.parametrize(
    "segmentation",
    [
        SQUARE,
        [[str(number) for number in SQUARE]],
        PAIRS,
        [PAIRS],
        [{"x": x, "y": y} for x, y in PAIRS],
        [[{"x": x, "y": y} for x, y in PAIRS]],
        [SQUARE, [9, 9, 10, 10], [3, 3], []],
    ],
)
def test_spellings_of_one_polygon(segmentation: Any) -> None:
    reference = coco.decode(coco.frPyObjects([SQUARE], H, W))[:, :, 0]
    assert reference.sum() == 16
    np.testing.assert_array_equal(drawn(segmentation), reference)


def test_polygons_and_rles_make_one_region() -> None:
    corner = np.zeros((H, W), np.uint8)
    corner[8:, 10:] = 1
    both = drawn([SQUARE, runs(corner), compressed(corner)])
    np.testing.assert_array_equal(both, drawn([SQUARE]) | corner)


@pytest.mark.parametrize("segmentation", [[[]], [3, 3], [[3, 3]], [[], [1, 2]]])
def test_points_have_no_area(segmentation: Any) -> None:
    assert checked(segmentation, H, W) == []


@pytest.mark.parametrize(
    "polygon",
    [[-30, -30, 100, -30, 100, 4.5, -30, 4.5], [-0.4, -0.4, 12.6, -0.4, 12.6, 10.6, -0.4, 10.6]],
)
def test_what_lies_outside_is_cut_off(polygon: list[float]) -> None:
    reference = coco.decode(coco.frPyObjects([polygon], H, W))[:, :, 0]
    np.testing.assert_array_equal(drawn([polygon]), reference)
    assert reference[:4].all()


def counted(text: str) -> dict[str, Any]:
    return {"size": [H, W], "counts": text}


@pytest.mark.parametrize(
    ("segmentation", "says"),
    [
        ({"size": [H, W], "counts": [0, 10]}, "describes 10 pixels, the image has 10 x 12 = 120"),
        ({"size": [H, W], "counts": [0, 60, 6000]}, "describes 6,060 pixels"),
        ({"size": [H, W], "counts": []}, "describes 0 pixels"),
        ({"size": [H, W], "counts": [130, -10]}, "no numbers of pixels"),
        ({"size": [H, W], "counts": [0.5, 119.5]}, "no numbers of pixels"),
        ({"size": [H, W], "counts": [float("nan"), 120]}, "nan"),
        ({"size": [H, W], "counts": 120}, "not a list of numbers"),
        ({"size": [H, W], "counts": None}, "not a list of numbers"),
        ({"size": [H, W], "counts": {}}, "not a list of numbers"),
        ({"size": [W, H], "counts": [120]}, r"size is \[12, 10\], the image's \[10, 12\]"),
        ({"size": [H], "counts": [120]}, "size is"),
        ({"size": None, "counts": [120]}, "size is None"),
        ({"size": [H, W]}, "no counts"),
        ({"counts": [120]}, "no size"),
        ({}, "no size"),
        (counted(""), "not a compressed RLE"),
        (counted("zzzz~~~~~!!"), "not a compressed RLE"),
        (counted("`"), "not a compressed RLE"),  # ends in the middle of a number
        (counted("\x00"), "not a compressed RLE"),
        (counted("猫"), "not a compressed RLE"),
        (counted("o" * 30 + "0"), "not a compressed RLE"),  # one number of 155 bits
        (counted("0"), "describes 0 pixels"),
        (counted("O"), "no numbers of pixels"),  # -1
        ([[1, 1, float("nan"), 1, 5, 5]], "nan"),
        ([[1, 1, float("inf"), 1, 5, 5]], "inf"),
        ([[1, 1, None, 1, 5, 5]], "None"),
        ([[1, 1, 5e7, 1, 5, 5]], r"corner \(5e\+07, 1\) lies far outside the image of 10 x 12"),
        ([[1, 1, 1e300, 1, 5, 5]], "far outside"),
        ([[1, 1, 5, -500, 5, 5]], "far outside"),
        ([[1, 1, 10**400, 1, 5, 5]], "not a list of numbers"),
        ([[0, 0, 100, 100] * 30_000], "the outline of 60,000 corners is 6,000,000 pixels long"),
        ([[1, 1, 5, 1, 5, 5, 1]], "7 numbers"),
        ([10, 10, 40, 40], "four numbers"),
        ([[10, 10, 40, 40]], "four numbers"),
        ([["a"] * 6], "not a list of numbers"),
        ([[[1, 1, 1], [2, 2, 2], [3, 3, 3]]], "not a list of numbers"),
        ([[1, 1, 5, 1, [5, 5]]], "not a list of numbers"),
        ([{"a": 1}], "no size"),
        ([True, None], "where a polygon should be"),
        ("10 10 50 50", "neither polygons nor RLE"),
        (7, "neither polygons nor RLE"),
    ],
)  # fmt: skip
def test_what_is_refused(segmentation: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        checked(segmentation, H, W)


numbers = st.one_of(st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=3), st.none(), st.booleans())
values = st.recursive(
    numbers,
    lambda inner: (
        st.lists(inner, max_size=8)
        | st.fixed_dictionaries({"size": st.just([H, W]) | inner, "counts": st.text(max_size=12) | inner})
        | st.fixed_dictionaries({"x": inner, "y": inner})
    ),
    max_leaves=12,
)


@settings(deadline=None, max_examples=500)
@given(values)
def test_anything_is_drawn_or_refused(segmentation: Any) -> None:
    try:
        parts = checked(segmentation, H, W)
    except ValueError:
        return
    if parts:
        assert coco.decode(encoded(parts, H, W)).shape == (H, W)


@settings(deadline=None, max_examples=300)
@given(st.text(st.characters(min_codepoint=48, max_codepoint=111), min_size=1, max_size=12))
def test_a_string_of_the_right_alphabet_is_a_mask_or_refused(text: str) -> None:
    rle = counted(text)
    try:
        (part,) = checked(rle, H, W)
    except ValueError:
        return
    mask = coco.decode(encoded([part], H, W))
    np.testing.assert_array_equal(drawn(compressed(mask)), mask)
