"""Label Studio's tasks, decoded bit by bit as its front end does, and converted by its own SDK."""

from __future__ import annotations

import contextlib
import json
import shutil
from dataclasses import replace
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.brush import decode_brush, encode_brush
from pipeline.formats.labelstudio import LabelStudio, read_labelstudio
from pipeline.ontology.ontology import Ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture
from tests.pipeline.formats.readers import run_reader


class Bits:
    """The reader of rle-pack, after its description: most significant bit first."""

    def __init__(self, data: list[int]) -> None:
        self.whole, self.left = int.from_bytes(bytes(data), "big"), 8 * len(data)

    def read(self, count: int) -> int:
        self.left -= count
        assert self.left >= 0
        return self.whole >> self.left & (1 << count) - 1


def unpacked(data: list[int]) -> list[int]:
    bits = Bits(data)
    total, width = bits.read(32), bits.read(5) + 1
    sizes = [bits.read(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        repeated = bits.read(1)
        count = bits.read(sizes[bits.read(2)]) + 1
        values += [bits.read(width)] * count if repeated else [bits.read(width) for _ in range(count)]
    assert bits.left < 8 and len(values) == total
    return values


@given(st.integers(1, 60), st.integers(1, 400), st.floats(0, 1), st.integers(0, 2**32 - 1), st.booleans())
@settings(max_examples=60)
def test_a_mask_is_what_the_front_end_unpacks(height, width, share, seed, rows):
    mask = np.random.default_rng(seed).random((height, 1 if rows else width)) < share
    mask = np.broadcast_to(mask, (height, width))
    data = encode_brush(mask)
    # Opaque or nothing: an alpha of 1 of 255 would not be seen.
    assert (np.array(unpacked(data)).reshape(height, width, 4) == 255 * mask[..., None]).all()
    assert (decode_brush(data, height, width) == mask).all()


def test_runs_longer_than_the_longest():
    for length in (1 << 14, (1 << 14) + 1, 1 << 15, 100_003):
        mask = np.ones((1, length), bool)
        assert unpacked(encode_brush(mask)) == [255] * (4 * length)
        mask[0, -1] = False
        assert unpacked(encode_brush(mask)) == [255] * (4 * length - 4) + [0] * 4


@given(st.lists(st.integers(0, 255), max_size=40), st.integers(0, 60), st.integers(0, 255))
@settings(max_examples=100)
def test_damaged_masks_are_refused_or_decoded(noise, place, value):
    mask = np.random.default_rng(0).random((7, 9)) < 0.5
    data = encode_brush(mask)
    data[place % len(data)] = value
    for damaged in (noise, data, data[: place % len(data)]):
        with contextlib.suppress(ValueError):
            assert decode_brush(damaged, 7, 9).shape == (7, 9)


@given(datasets())
@settings(max_examples=12)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    output = open_storage(tmp_path_factory.mktemp("out"))
    names, lost = export(LabelStudio(), ontology, samples, output)
    assert lost == Loss() and names == ["tasks.json", "label_config.xml"]
    before = contents(output)
    export(LabelStudio(), ontology, samples, output)
    assert contents(output) == before
    imported = read_labelstudio(output.uri)
    check_same(imported, ontology, samples)
    assert (imported.ontology.palette() == ontology.palette()).all()
    shutil.rmtree(output.root)


def _two(image: bool = False) -> tuple[Ontology, list[Sample]]:
    names = ["a<b", 'c "d"', "猫, e & f"]
    ontology = Ontology.from_dict({"name": "x", "classes": names, "background": ["rest"]})
    labels = np.array([[0, 1, 2, 3, 255], [1, 1, 0, 0, 3]], np.uint8)
    confidence = np.array([[9, 255, 51, 0, 9], [255, 255, 9, 9, 102]], np.uint8)
    one = Sample(
        number=0, id=5, name="b/my photo, #1 猫", uri="/p/b/my photo, #1 猫.jpg", suffix=".jpg",
        labels=labels, confidence=confidence, image=picture(2, 5, ".jpg") if image else None,
    )  # fmt: skip
    other = replace(
        one, number=1, name="c", uri="s3://bucket/c.png", suffix=".png", confidence=None, split="val"
    )
    return ontology, [one, other]


def test_its_own_converter_reads_it(tmp_path):
    """The config is parsed and the masks are converted by label-studio-sdk, and equal the labels."""
    ontology, samples = _two()
    output = open_storage(tmp_path / "out")
    export(LabelStudio(), ontology, samples, output)
    found = run_reader("labelstudio", output.root, str(tmp_path / "found"))
    assert found["labels"] == ["a<b", 'c "d"', "猫, e & f", "ignored"] and found["to_name"] == ["image"]
    assert len(found["files"]) == 8
    for file in found["files"]:
        task = int(file.removeprefix("task-")[0])
        (number,) = (
            n for n, name in {**dict(enumerate(ontology.names)), 255: "ignored"}.items() if name in file
        )
        (path,) = (tmp_path / "found").rglob(file)
        assert (np.load(path) == 255 * (samples[task].labels == number)).all()


def test_a_task_shows_its_image_and_its_masks(tmp_path):
    ontology, samples = _two(image=True)
    output = open_storage(tmp_path)
    export(LabelStudio(), ontology, samples, output)
    first, second = json.loads(output.read_bytes("tasks.json"))
    # Label Studio reads the path from the query, and finds it below its document root.
    (path,) = parse_qs(urlsplit(first["data"]["image"]).query)["d"]
    assert path == "images/b/my photo, #1 猫.jpg" and output.exists(path)
    config = ElementTree.fromstring(output.read_bytes("label_config.xml"))
    image, brushes = config.find("Image"), config.find("BrushLabels")
    assert image is not None and brushes is not None and image.get("value") == "$image"
    labels = {label.get("value") for label in brushes}
    (prediction,) = first["predictions"]
    # (3 × 255 + 51 + 0 + 102, of background 4 × 9) over nine pixels
    assert prediction["score"] == pytest.approx((3 * 255 + 51 + 102 + 4 * 9 - 9) / 9 / 255, abs=1e-4)
    for region in prediction["result"]:
        assert (region["from_name"], region["to_name"]) == (brushes.get("name"), image.get("name"))
        assert brushes.get("toName") == image.get("name")
        assert region["type"] == "brushlabels" and region["value"]["format"] == "rle"
        assert (region["original_width"], region["original_height"], region["image_rotation"]) == (5, 2, 0)
        assert set(region["value"]["brushlabels"]) <= labels
    assert [one.get("score") for one in prediction["result"]] == [1.0, 0.2, 0.2, None]
    assert "score" not in second["predictions"][0]
    output = open_storage(tmp_path / "without")
    export(LabelStudio(), ontology, [replace(one, image=None) for one in samples], output)
    first, second = json.loads(output.read_bytes("tasks.json"))
    assert parse_qs(urlsplit(first["data"]["image"]).query)["d"] == ["p/b/my photo, #1 猫.jpg"]
    assert second["data"]["image"] == "s3://bucket/c.png"
    assert [one.uri for one in read_labelstudio(output.uri).samples] == [one.uri for one in samples]


def test_what_people_corrected_comes_back(tmp_path):
    """As Label Studio exports it: the newest annotation counts, over the prediction."""
    ontology, samples = _two()
    output = open_storage(tmp_path)
    export(LabelStudio(), ontology, samples, output)
    first, second = json.loads(output.read_bytes("tasks.json"))
    mask = np.zeros((2, 5), bool)
    mask[0, 0] = True
    region = {
        **first["predictions"][0]["result"][0],
        "origin": "prediction-changed",
        "value": {"format": "rle", "rle": encode_brush(mask)},
    }
    region["value"]["brushlabels"] = ["a<b"]
    first["annotations"] = [
        {"id": 1, "result": [], "was_cancelled": False},
        {"id": 2, "result": [region], "was_cancelled": False, "lead_time": 3.5},
        {"id": 3, "result": [], "was_cancelled": True},
    ]
    first["predictions"] = [7]  # its id
    del second["data"]["name"]
    output.write_json("project-1.json", [first, second])
    found = list(read_labelstudio(output.uri_of("project-1.json")).samples)
    assert found[0].labels.tolist() == [[1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert found[1].name == "c" and (found[1].labels == samples[1].labels).all()
    for change, reason in (
        ({"type": "polygonlabels"}, "only brush masks are read"),
        ({"value": {"rle": [0, 0], "brushlabels": ["a<b"]}}, "it is not a mask of 2 x 5 pixels"),
        ({"value": {"rle": region["value"]["rle"], "brushlabels": ["?"]}}, "which is no label of"),
        ({"original_width": 6}, "different sizes"),
    ):
        first["annotations"] = [{"result": [region | change]}]
        output.write_json("project-1.json", [first])
        with pytest.raises(MaskMillError, match=rf"task 1: .*{reason}") as error:
            [one.labels for one in read_labelstudio(output.uri_of("project-1.json")).samples]
        assert error.value.code == "dataset_invalid"
    output.write_bytes("tasks.json", output.read_bytes("tasks.json")[:-40])
    with pytest.raises(MaskMillError, match="not valid JSON"):
        [one.labels for one in read_labelstudio(output.uri).samples]
