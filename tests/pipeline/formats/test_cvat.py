"""CVAT's segmentation masks, read as its documentation says, and by Datumaro, which CVAT reads them with."""

from __future__ import annotations

import shutil

import cv2
import numpy as np
from hypothesis import given, settings
from PIL import Image

from pipeline.files.storage import open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.cvat import Cvat, read_cvat, voc_colors
from pipeline.ontology.ontology import Ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export
from tests.pipeline.formats.readers import run_reader


@given(datasets())
@settings(max_examples=12)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    if ontology.num_classes > Cvat.max_classes:
        return
    output = open_storage(tmp_path_factory.mktemp("out"))
    names, lost = export(Cvat(), ontology, samples, output)
    assert lost == Loss() and names[0] == "labelmap.txt"
    before = contents(output)
    export(Cvat(), ontology, samples, output)
    assert contents(output) == before
    if samples:
        wanted = [Sample(**{**vars(one), "suffix": ".jpg"}) for one in samples]
        check_same(read_cvat(output.uri), ontology, wanted)
    for one in samples:
        with Image.open(output.path(f"SegmentationObject/{_listed(one.name)}.png")) as picture:
            objects = np.asarray(picture)
        _check_objects(objects, one, ontology)
    shutil.rmtree(output.root)


def _listed(name: str) -> str:
    return name.replace("a%2Eb", "a%252Eb")


def _check_objects(objects: np.ndarray, one: Sample, ontology: Ontology) -> None:
    """Black where CVAT shows nothing; else one connected piece of one class in each colour."""
    skipped = [ontology.ignore_index, *([0] if ontology.background else [])]
    assert (objects.any(2) == ~np.isin(one.labels, skipped)).all()
    colors, inverse = np.unique(objects.reshape(-1, 3), axis=0, return_inverse=True)
    inverse = inverse.reshape(one.labels.shape)
    assert {tuple(color) for color in colors.tolist()} <= {tuple(c) for c in voc_colors().tolist()}
    for number, color in enumerate(colors):
        if color.any():
            piece = inverse == number
            assert len(np.unique(one.labels[piece])) == 1
            assert cv2.connectedComponents(piece.astype(np.uint8), connectivity=8)[0] == 2


def test_the_colours_of_voc():
    """The first of the devkit's colour map, and the last."""
    assert voc_colors()[:6].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [0, 0, 128], [128, 0, 128],
    ]  # fmt: skip
    assert voc_colors()[255].tolist() == [224, 224, 192]


def test_more_pieces_than_colours(tmp_path):
    ontology = Ontology.from_dict({"name": "x", "classes": ["a", "b"]})
    labels = np.full((64, 64), 255, np.uint8)
    labels[::2, ::2] = 0  # 1,024 pieces
    labels[1, 1:4] = 1
    output = open_storage(tmp_path)
    one = Sample(number=0, id=5, name="n", uri="/p/n.jpg", suffix=".jpg", labels=labels)
    export(Cvat(), ontology, [one], output)
    with Image.open(tmp_path / "SegmentationObject/n.png") as picture:
        objects = np.asarray(picture)
    for number in (0, 1):
        assert (objects[labels == number] == voc_colors()[number + 1]).all()
    check_same(read_cvat(output.uri), ontology, [one])


def test_datumaro_reads_it(tmp_path):
    names = ["a", "#b", "猫 c", 'd "e", f', "x:y"]
    ontology = Ontology.from_dict({"name": "x", "classes": names, "background": ["rest"]})
    rng = np.random.default_rng(0)
    samples = []
    for number, name in enumerate(("plain", "my photo, 1", "猫/b.c", "#1")):
        labels = rng.choice(np.array([0, 1, 2, 3, 4, 5, 255], np.uint8), (6, 7 + number))
        samples.append(Sample(number=number, id=number, name=name, uri="", suffix=".jpg", labels=labels))
    output = open_storage(tmp_path / "out")
    export(Cvat(), ontology, samples, output)
    np.savez(tmp_path / "wanted.npz", *(one.labels for one in samples))
    found = run_reader("datumaro_voc", output.root, str(tmp_path / "found.npz"))
    assert found["labels"] == ["background", "a", "%23b", "猫 c", 'd "e", f', "x%3Ay", "ignored"]
    assert found["items"] == ["plain", "my photo, 1", "猫/b.c", "%231"]
    with np.load(tmp_path / "found.npz") as drawn:
        for number, one in enumerate(samples):
            # Background and pixels without a class are no annotations.
            expected = np.where(np.isin(one.labels, (0, 255)), 0, one.labels)
            assert (drawn[f"arr_{number}"] == expected).all()
