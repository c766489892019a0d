"""YOLO's polygons, read by supervision, by the rules of Ultralytics, and drawn by Pillow."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import supervision
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from models.errors import MaskMillError
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.escapes import escape
from pipeline.formats.outlines import outlines
from pipeline.formats.yolo import Yolo, read_yolo
from pipeline.ontology.ontology import Ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture


@st.composite
def masks(draw: st.DrawFn) -> np.ndarray:
    """Speckle, blobs with holes in holes, and all that lies between."""
    size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    mask = (rng.random(size) < draw(st.floats(0, 1))).astype(np.uint8)
    larger = draw(st.integers(1, 3))
    return np.kron(mask, np.ones((larger, larger), np.uint8))


@given(masks())
@settings(max_examples=100)
def test_an_outline_covers_a_piece_exactly(mask):
    count, pieces = cv2.connectedComponents(mask, connectivity=8)
    found = list(outlines(mask))
    assert len(found) == count - 1
    for corners in found:
        x, y = corners[0]
        wanted = pieces == pieces[y, x]
        drawn = np.zeros_like(mask)
        cv2.fillPoly(drawn, [corners], 1)
        assert (drawn == wanted).all()
        # A program of its own, which knows nothing of OpenCV.
        canvas = Image.new("L", mask.shape[::-1])
        points = [*map(tuple, corners.tolist())]
        pen = ImageDraw.Draw(canvas)
        pen.polygon(points, fill=1, outline=1) if len(points) > 1 else pen.point(points, fill=1)
        assert (np.asarray(canvas) == wanted).all()


@given(datasets(images=True))
@settings(max_examples=8)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    output = open_storage(tmp_path_factory.mktemp("out"))
    names, lost = export(Yolo(), ontology, samples, output)
    assert lost == Loss() and names == ["data.yaml"]
    before = contents(output)
    export(Yolo(), ontology, samples, output)
    assert contents(output) == before
    if samples:
        wanted = samples
        if ontology.background:  # what has no class becomes background
            wanted = [
                replace(one, labels=np.where(one.labels == ontology.ignore_index, 0, one.labels))
                for one in samples
            ]
        check_same(read_yolo(output.uri), ontology, wanted)
        for one in samples:
            _check_supervision(output, one, ontology)
    shutil.rmtree(output.root)


def _check_supervision(output: Storage, one: Sample, ontology: Ontology) -> None:
    """Every pixel with a class is in a mask of it, and in no other."""
    folder = os.path.dirname(f"{one.split}/{one.name}")
    dataset = supervision.DetectionDataset.from_yolo(
        output.path(f"images/{folder}"),
        output.path(f"labels/{folder}"),
        output.path("data.yaml"),
        force_masks=True,
    )
    offset = int(ontology.background is not None)
    assert [str(name) for name in dataset.classes] == list(ontology.names[offset:])
    (found,) = (
        detections
        for path, _, detections in dataset
        if os.path.basename(path) == os.path.basename(escape(one.name)) + one.suffix
    )
    skipped = [ontology.ignore_index, *range(offset)]
    drawn = np.full(one.labels.shape, -1)
    if len(found):
        assert found.mask.sum(0).max() == 1
        for number, mask in zip(found.class_id, found.mask, strict=True):
            drawn[mask] = number + offset
    assert (drawn == np.where(np.isin(one.labels, skipped), -1, one.labels.astype(int))).all()


def test_ultralytics_rules(tmp_path):
    """What its documentation and its check of a label file ask for."""
    ontology = Ontology.from_dict({"name": "x", "classes": ["1", "no", 'a: "b"', "猫"], "background": ["x"]})
    labels = np.full((50, 1001), 255, np.uint8)
    labels[10:40, 10:900] = 1
    labels[20:30, 20:30] = 255  # a hole
    labels[24:26, 24:26] = 3  # an island within
    labels[0, 0] = 2  # a single pixel, at an edge
    labels[49, 990:] = 4  # a line
    one = Sample(
        number=0,
        id=5,
        name="images/labels/x.y",
        uri="",
        suffix=".gif",
        labels=labels,
        image=picture(50, 1001),
    )
    empty = replace(one, name="e", labels=np.zeros((50, 1001), np.uint8), suffix=".png")
    output = open_storage(tmp_path)
    _, lost = export(Yolo(), ontology, [one, empty, replace(empty, split="extra", suffix=".png")], output)
    assert lost == Loss()
    data = yaml.safe_load(output.read_bytes("data.yaml"))
    assert data["names"] == {0: "1", 1: "no", 2: 'a: "b"', 3: "猫"}
    assert data["train"] == data["val"] == "images/train" and data["extra"] == "images/extra"
    (image,) = (name for name in output.list("images/train", recursive=True) if "x.y" in name)
    assert image.endswith(".png")  # GIF is none of its formats
    # The label file is found by replacing the last "/images/".
    label = "/labels/".join(f"/{image}".rsplit("/images/", 1)).rsplit(".", 1)[0][1:] + ".txt"
    rows = [line.split() for line in output.read_bytes(label).decode().splitlines()]
    assert all(len(row) >= 7 and len(row) % 2 == 1 for row in rows), "else it would be a box"
    values = np.concatenate([np.array(row[1:], np.float32) for row in rows])
    assert values.min() >= 0 and values.max() <= 1
    assert sorted({int(row[0]) for row in rows}) == [0, 1, 2, 3] and len({tuple(row) for row in rows}) == 4
    drawn = np.full(labels.shape, 255, np.uint8)
    for row in rows:
        points = np.array(row[1:], np.float32).reshape(-1, 2)
        assert np.ptp(points, axis=0).min() > 0, "a box without an area"
        # It cuts off what is behind the point, where supervision rounds.
        cv2.fillPoly(drawn, [(points * (1001, 50)).astype(np.int32)], int(row[0]) + 1)
    assert (drawn == labels).all()
    assert output.read_bytes("labels/train/e.txt") == b""
    assert [one.split for one in read_yolo(output.uri).samples] == ["train", "train", "extra"]


@given(masks(), st.integers(1, 6), st.integers(0, 2**32 - 1))
@settings(max_examples=15)
def test_the_loss_is_what_another_rasteriser_finds(tmp_path_factory, mask, smallest, seed):
    """Pixels that Pillow draws as another class or none."""
    ontology = Ontology.from_dict({"name": "x", "classes": ["a", "b"]})
    labels = np.where(np.random.default_rng(seed).random(mask.shape) < 0.2, 255, mask).astype(np.uint8)
    one = Sample(number=0, id=5, name="n", uri="", suffix=".png", labels=labels)
    output = open_storage(tmp_path_factory.mktemp("out"))
    _, lost = export(Yolo(smallest=smallest), ontology, [one], output)
    canvas = Image.new("L", labels.shape[::-1], 255)
    pen = ImageDraw.Draw(canvas)
    for line in output.read_bytes("labels/train/n.txt").decode().splitlines():
        number, *shares = line.split()
        corners = np.rint(np.array(shares, float).reshape(-1, 2) * labels.shape[::-1])
        pen.polygon([*map(tuple, corners.tolist())], fill=int(number), outline=int(number))
    assert lost.pixels == (np.asarray(canvas) != labels)[labels != 255].sum()
    assert lost.pixels >= lost.segments and (smallest > 1 or lost == Loss())
    shutil.rmtree(output.root)


def test_what_is_left_out_is_counted(tmp_path):
    ontology = Ontology.from_dict({"name": "x", "classes": ["a", "b"]})
    rng = np.random.default_rng(0)
    labels = rng.choice(np.array([0, 1, 255], np.uint8), (40, 60), p=[0.1, 0.2, 0.7])
    one = Sample(number=0, id=5, name="n", uri="", suffix=".png", labels=labels, image=picture(40, 60))
    output = open_storage(tmp_path)
    _, lost = export(Yolo(smallest=4), ontology, [one], output)
    small = small_pixels = 0
    for number in (0, 1):
        *_, stats, _ = cv2.connectedComponentsWithStats((labels == number).astype(np.uint8), connectivity=8)
        areas = stats[1:, cv2.CC_STAT_AREA]
        small, small_pixels = small + (areas < 4).sum(), small_pixels + areas[areas < 4].sum()
    assert small > 10 and lost == Loss(pixels=small_pixels, segments=small)
    (found,) = read_yolo(output.uri).samples
    assert (found.labels != labels).sum() == lost.pixels


def test_data_of_others(tmp_path):
    """Names as a list, boxes refused, corners as whole pixels, the smaller polygon in front."""
    output = open_storage(tmp_path)
    output.write_bytes("images/train/n.png", picture(13, 17))
    output.write_bytes("data.yaml", b"path: ../datasets/x\ntrain: images/train\nnames: [cat, dog]\n")
    wanted = np.zeros((13, 17), np.uint8)
    wanted[3:8, 2:12] = 2
    wanted[4:6, 4:7] = 1
    corners = [[(4, 4), (6, 4), (6, 5), (4, 5)], [(2, 3), (11, 3), (11, 7), (2, 7)]]
    rows = [f"{n} " + " ".join(f"{x / 17:.6f} {y / 13:.6f}" for x, y in c) for n, c in enumerate(corners)]
    output.write_bytes("labels/train/n.txt", "\n".join(rows).encode())
    imported = read_yolo(output.uri)
    assert imported.ontology.names == ("background", "cat", "dog")
    (found,) = imported.samples
    assert (found.labels == wanted).all()
    for row, reason in (
        ("0 .5 .5 .1 .1", "a box, not a polygon"),
        ("2 0 0 0 1 1 1", "is no class; there are 2"),
        ("0 0 0 0 1 1", "5 numbers are no polygon"),
        ("0 0 0 0 nan 1 1", "no shares"),
        ("0 0 0 0 7 1 1", "no shares"),
    ):
        output.write_bytes("labels/train/n.txt", f"1 0 0 0 1 1 1\n{row}\n".encode())
        with pytest.raises(MaskMillError, match=rf"n\.txt:2: .*{reason}") as error:
            [one.labels for one in read_yolo(output.uri).samples]
        assert error.value.code == "dataset_invalid"
