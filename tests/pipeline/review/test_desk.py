"""Masks that a page sends are checked; honeypots tell how well people agree with the truth."""

from __future__ import annotations

import gzip
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from models.errors import WrongUse
from pipeline.evaluation.truth import find_truth
from pipeline.ontology.ontology import Ontology
from pipeline.review.desk import decode_page_mask, encode_page_mask, open_desk
from pipeline.review.queue import find_queue, read_queue, write_queue
from tests.pipeline.review.reviews import IGNORED, TOYWORLD, make_reviewed, queue_of, row_id, truth_of

MANY = Ontology.from_dict({"name": "many", "classes": [f"c{number}" for number in range(300)]})


@given(
    arrays(np.uint16, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 299)),
    st.booleans(),
)
def test_masks_of_pages_round_trip(labels: np.ndarray, ignored: bool) -> None:
    labels[0, 0] = MANY.ignore_index if ignored else labels[0, 0]
    found = decode_page_mask(encode_page_mask(labels), labels.shape, MANY)
    assert found.dtype == MANY.mask_dtype
    np.testing.assert_array_equal(found, labels)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (encode_page_mask(np.full((3, 4), 14, np.uint8)), "it has the value 14"),
        (encode_page_mask(np.full((3, 4), 256, np.uint16)), "it has the value 256"),
        (encode_page_mask(np.zeros((4, 4), np.uint8)), "3 x 4 pixels"),
        (encode_page_mask(np.zeros((2, 4), np.uint8)), "3 x 4 pixels"),
        (gzip.compress(bytes(10**7)), "3 x 4 pixels"),  # 10 MB of zeros are not unpacked
        (encode_page_mask(np.zeros((3, 4), np.uint8))[:-9], "3 x 4 pixels"),  # cut off
        (b"", "3 x 4 pixels"),
        (b"PNG", "not compressed"),
    ],
)
def test_other_masks_are_refused(data: bytes, why: str) -> None:
    assert TOYWORLD.num_classes == 14
    with pytest.raises(WrongUse, match=why):
        decode_page_mask(data, (3, 4), TOYWORLD)


def test_honeypots_tell_who_agrees_with_the_truth(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0, 0.6, 0.6, 0.0, 0.0])
    desk = open_desk(queue_of(folder, 5, known=(0, 1, 2, 3)))
    assert desk.agreement() == []
    for number, decision, who in ((0, "accepted", "Ann"), (1, "rejected", "Ann"), (3, "rejected", "Bob")):
        desk.save(row_id(folder, number), decision, None, reviewer=who, follows=None)  # type: ignore[arg-type]
    painted = truth_of(folder, 2).copy()
    painted[0] = (painted[0] + 1) % TOYWORLD.num_classes
    desk.save(row_id(folder, 2), "painted", encode_page_mask(painted), reviewer="Ann", follows=None)
    desk.save(row_id(folder, 4), "accepted", None, reviewer="Bob", follows=None)  # nobody knows its truth
    ann, bob = desk.agreement()
    assert (ann.reviewer, ann.judged, ann.right, ann.painted) == ("Ann", 2, 2, 1)
    assert (bob.reviewer, bob.judged, bob.right, bob.painted) == ("Bob", 1, 0, 0)
    # The mean of an accepted image that is right and a painted one that is not quite.
    assert 0.8 < ann.miou < 1 and ann.before < 0.75
    assert (
        "2 of 2 judged right, 1 painted" in ann.described() and bob.described() == "Bob: 0 of 1 judged right"
    )


def test_truth_is_found_by_id_or_by_name(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0, 0.6])
    from pipeline.files.storage import open_storage

    table = open_storage(folder / "table")
    (folder / "truth" / "scene_000_0.png").unlink()
    truth = find_truth(str(folder / "truth"), table, TOYWORLD)
    assert truth.ids.tolist() == [row_id(folder, 1)]
    np.testing.assert_array_equal(truth.read(row_id(folder, 1)), truth_of(folder, 1))
    # What people said of some images is truth of these.
    desk = open_desk(queue_of(folder, 2))
    desk.save(row_id(folder, 0), "accepted", None, reviewer="", follows=None)
    desk.save(row_id(folder, 1), "rejected", None, reviewer="", follows=None)
    truth = find_truth(desk.queue.corrections, table, TOYWORLD)
    assert truth.ids.tolist() == [row_id(folder, 0)]
    with pytest.raises(WrongUse, match="no truth"):
        find_truth(str(folder / "table"), table, TOYWORLD)
    Image.fromarray(np.full((48, 48), 200, np.uint8)).save(folder / "truth" / "scene_001_0.png")
    with pytest.raises(WrongUse, match="has 200"):
        find_truth(str(folder / "truth"), table, TOYWORLD).read(row_id(folder, 1))


def test_a_queue_survives_its_file_and_is_refused_damaged(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0])
    queue = queue_of(folder, 1)
    assert find_queue(str(folder / "table")) is None
    write_queue(queue, str(folder / "table"))
    assert read_queue(str(folder / "table")) == queue == read_queue(str(folder / "table" / "review.json"))
    (folder / "table" / "review.json").write_text('{"schema_version": 1, "entries": [{}]}')
    with pytest.raises(Exception, match="incomplete or was changed"):
        read_queue(str(folder / "table"))
    shutil.rmtree(folder / "table" / "labels")
    with pytest.raises(WrongUse, match="none of the 1 images"):
        open_desk(queue)


def test_pictures_are_small_and_tell_of_what_is_gone(tmp_path: Path) -> None:
    folder = make_reviewed(tmp_path, [0.0, 0.6], size=500)
    desk = open_desk(queue_of(folder, 2))
    row = desk.row(row_id(folder, 0))
    assert desk.picture(row).shape == (500, 500, 3) and desk.picture(row, 100).shape == (100, 100, 3)
    assert desk.thumbnail(row, None).shape == (320, 320, 3)
    (folder / "images" / "scene_000_0.png").write_bytes(_png(np.zeros((9, 9, 3), np.uint8)))
    assert desk.thumbnail(row, None).shape == (320, 320, 3)  # the labels alone
    with pytest.raises(Exception, match="has changed since"):
        desk.picture(row)
    with pytest.raises(WrongUse, match="no image 5"):
        desk.row(5)
    assert IGNORED == 255


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()
