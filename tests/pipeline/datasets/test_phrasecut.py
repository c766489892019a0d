"""Referring expressions: which samples count, and polygons against exact geometry."""

from __future__ import annotations

import pickle
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.datasets.phrasecut import EXCLUDED_IMAGES, PhraseSample, fill_polygon, open_phrasecut
from pipeline.datasets.registry import open_dataset
from tests.pipeline.datasets.conftest import Write, photo

SQUARE = [[1, 1], [3, 1], [3, 2], [1, 2]]
CORNER = [[4.0, 0.0], [5.0, 0.0], [5.0, 1.0], [4.0, 1.0]]


def task(image: int, number: int, phrase: str, **changes: Any) -> dict[str, Any]:
    return {
        "task_id": f"{image}__{number}",
        "image_id": image,
        "ann_ids": [number],
        "instance_boxes": [[1, 1, 3, 2]],
        "Polygons": [[SQUARE]],
        "phrase": phrase,
        "phrase_structure": {"name": "thing"},
    } | changes


EXCLUDED = min(EXCLUDED_IMAGES)
TASKS = [
    task(30, 0, "wide tree", phrase_structure={"name": "tree", "attributes": ["wide"]}),
    task(4, 1, "second phrase of 4"),
    task(
        4,
        0,
        "two things",
        phrase_structure={"name": "x", "attributes": [], "relation_descriptions": [["beside", "y"]]},
        instance_boxes=[[1, 1, 3, 2], [4, 0, 2, 2]],
        Polygons=[[SQUARE], [CORNER]],
    ),
    task(4, 2, "no area", instance_boxes=[[1, 1, 0, 2], [2, 2, 5, 0]]),
    task(4, 3, "no structure", phrase_structure=None),
    task(EXCLUDED, 0, "wrong size"),
]
FILES = {
    "VGPhraseCut_v0/refer_test.json": TASKS,
    "VGPhraseCut_v0/image_data_split.json": [
        {"image_id": number, "height": 4, "width": 6} for number in (4, 30, EXCLUDED, 99)
    ],
    "VGPhraseCut_v0/images/4.jpg": photo(4, 6),
    "VGPhraseCut_v0/images/30.jpg": photo(4, 6),
}


def test_samples_and_masks(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), FILES)
    dataset = pickle.loads(pickle.dumps(open_phrasecut(str(tmp_path))))
    # By image number, not by its letters; phrases as in the file.
    assert [sample.name for sample in dataset.samples] == ["4__1", "4__0", "30__0"]
    parts = [(sample.attribute, sample.relation) for sample in dataset.samples]  # type: ignore[attr-defined]
    assert parts == [(False, False), (False, True), (True, False)]
    assert list(map(str, dataset.left_out)) == [
        "1 × phrase whose boxes have no area (4__2)",
        "1 × phrase without a parsed structure (4__3)",
        f"1 × phrase on an image whose size differs from that of its annotation ({EXCLUDED}__0)",
    ]
    assert dataset.phrases == ("second phrase of 4", "two things", "wide tree")
    one, two = np.zeros((4, 6), np.uint8), np.zeros((4, 6), np.uint8)
    one[1:3, 1:4] = 1
    two[1:3, 1:4] = 1
    two[0:2, 4:6] = 1
    for sample, expected in zip(dataset.samples, (one, two, one), strict=True):
        assert isinstance(sample, PhraseSample)
        image, truth = dataset.image_and_truth(sample)
        assert truth.dtype == np.uint8 and image.shape == (4, 6, 3)
        np.testing.assert_array_equal(truth, expected)


@pytest.mark.parametrize(
    ("changes", "code", "says"),
    [
        ({"refer_test.json": None}, "dataset_missing", "there is no refer_test.json"),
        ({"image_data_split.json": None}, "dataset_missing", "image_data_split"),
        ({"images/30.jpg": None}, "dataset_missing", r"1 of 2 images of test .*\(30\)"),
        ({"image_data_split.json": [dict(image_id=4, height=4, width=6)]}, "dataset_missing", r"\(30\)"),
        ({"refer_test.json": [{"image_id": 1}]}, "dataset_invalid", "entry 1, task_id: Field required"),
        *(
            ({"refer_test.json": [TASKS[0], TASKS[1] | change]}, "dataset_invalid", says)
            for change, says in (
                ({"Polygons": [[[1, 2, 3]]]}, r"entry 2, Polygons\.0\.0\.0"),
                ({"Polygons": [[[[1, float("nan")]]]]}, r"Polygons\.0\.0\.0\.1: .*finite"),
                ({"Polygons": [[[[1, float("inf")]]]]}, r"Polygons\.0\.0\.0\.1: .*finite"),
                ({"Polygons": [[[[1, 2]] * 10_001]]}, r"Polygons\.0\.0: .*at most 10000 items"),
                ({"instance_boxes": [[1, 2, 3]]}, r"instance_boxes\.0"),
                ({"image_id": None}, "image_id"),
                ({"phrase": ["a"]}, "phrase"),
            )
        ),
        ({"refer_test.json": {}}, "dataset_invalid", "holds an object, not a list"),
        ({"refer_test.json": b"{"}, "dataset_invalid", "refer_test.json:1: not valid JSON"),
        ({"refer_test.json": b'[\n"\xff"]'}, "dataset_invalid", "refer_test.json:2: not UTF-8"),
        ({"image_data_split.json": [{"image_id": 4}]}, "dataset_invalid", "entry 1, height: Field required"),
        ({"image_data_split.json": [dict(image_id=4, height=0, width=6)]}, "dataset_invalid", "height"),
        ({"image_data_split.json": [dict(image_id=4, height=10**5, width=10**5)]}, "dataset_invalid", "mit"),
    ],
)  # fmt: skip
def test_wrong_files(changes: dict[str, Any], code: str, says: str, tmp_path: Path, write: Write) -> None:
    files = FILES | {f"VGPhraseCut_v0/{name}": content for name, content in changes.items()}
    write(str(tmp_path), {name: content for name, content in files.items() if content is not None})
    with pytest.raises(MaskMillError, match=says) as caught:
        open_dataset("phrasecut", root=str(tmp_path))
    assert caught.value.code == code


def exactly(points: list[tuple[Fraction, Fraction]], x: int, y: int) -> bool:
    """Whether a point is in a polygon or on its outline, in exact numbers, one edge at a time."""
    inside = False
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        cross = (bx - ax) * (y - ay) - (by - ay) * (x - ax)
        if cross == 0 and min(ax, bx) <= x <= max(ax, bx) and min(ay, by) <= y <= max(ay, by):
            return True
        if (ay > y) != (by > y) and x < ax + (y - ay) * (bx - ax) / (by - ay):
            inside = not inside
    return inside


@settings(deadline=None, max_examples=80)  # machines are shared
@given(
    st.lists(st.tuples(st.integers(-12, 44), st.integers(-12, 44)), min_size=1, max_size=9),
    st.sampled_from([1, 2, 4]),
)
def test_polygons_are_filled_exactly(corners: list[tuple[int, int]], parts: int) -> None:
    points = [(Fraction(x, parts), Fraction(y, parts)) for x, y in corners]
    mask = np.zeros((11, 13), np.bool_)
    fill_polygon(mask, np.array([[float(x), float(y)] for x, y in points]))
    expected = np.array([[exactly(points, x, y) for x in range(13)] for y in range(11)])
    np.testing.assert_array_equal(mask, expected)
