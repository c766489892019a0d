"""Cityscapes, read as torchvision does, and by the reader of the benchmark."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from torchvision.datasets import Cityscapes as Torchvision

from models.errors import MaskMillError
from pipeline.datasets.cityscapes import open_cityscapes
from pipeline.files.storage import open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.cityscapes import CITYSCAPES, Cityscapes, read_cityscapes
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture


@given(datasets())
@settings(max_examples=8)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    if ontology.num_classes > Cityscapes.max_classes:
        return
    output = open_storage(tmp_path_factory.mktemp("out"))
    names, lost = export(Cityscapes(), ontology, samples, output)
    assert lost == Loss() and names == ["labels.csv"]
    before = contents(output)
    export(Cityscapes(), ontology, samples, output)
    assert contents(output) == before
    if samples:
        imported = read_cityscapes(output.uri)
        check_same(imported, ontology, [replace(one, suffix=".png") for one in samples])
        assert (imported.ontology.palette() == ontology.palette()).all()
    shutil.rmtree(output.root)


def test_torchvision_reads_the_ids_of_cityscapes(tmp_path):
    """All classes are Cityscapes' own, in another order, one of them never trained."""
    names = ["sky", "Road", "caravan", "bicycle"]
    ontology = Ontology.from_dict({"name": "x", "classes": names})
    labels = np.array([[0, 1, 2, 3, 255]], np.uint8)
    aachen = "aachen/aachen_000000_000019"
    shown = picture(1, 5, ".jpg")
    one = Sample(number=0, id=5, name="", uri="", suffix=".jpg", labels=labels, image=shown)
    samples = [
        replace(one, name=name)
        for name in (f"{aachen}_leftImg8bit", aachen, "x", "all/x", "my photo_leftImg8bit, 1", "a/b/猫")
    ]
    samples.append(replace(one, name="v", split="val"))
    output = open_storage(tmp_path)
    export(Cityscapes(), ontology, samples, output)
    types = ["semantic", "color"]
    dataset = Torchvision(str(tmp_path), split="train", mode="fine", target_type=types)
    assert len(dataset) == len(samples) - 1
    assert any(path.endswith(f"{aachen}_leftImg8bit.png") for path in dataset.images)
    palette = np.vstack([ontology.palette(), np.zeros((1, 3), np.uint8)])
    for image, (ids, colors) in dataset:
        assert image.size == (5, 1) and np.abs(np.asarray(image).astype(int) - (10, 200, 30)).max() < 6
        assert np.asarray(ids).tolist() == [[23, 7, 29, 33, 0]]
        assert (np.asarray(colors) == palette[None]).all()
    check_same(read_cityscapes(output.uri), ontology, [replace(sample, suffix=".png") for sample in samples])
    # The benchmark's reader takes the train ids.
    benchmark = open_cityscapes(str(tmp_path), split="val")
    (found,) = benchmark.samples
    assert found.name == "all/v_leftImg8bit"
    assert benchmark.truth(found).tolist() == [[10, 0, 255, 18, 255]]


def test_the_ids_are_those_of_the_benchmark(tmp_path):
    """Its 19 classes, read without our table."""
    ontology = load_ontology("cityscapes19")
    labels = np.append(np.arange(19), 255).astype(np.uint8)[None]
    one = Sample(number=0, id=5, name="x", uri="", suffix=".png", labels=labels)
    output = open_storage(tmp_path)
    export(Cityscapes(), ontology, [one], output)
    output.delete("labels.csv")
    check_same(read_cityscapes(output.uri), ontology, [one])
    train_ids = [train for _, train in CITYSCAPES.values() if train != 255]
    assert train_ids == [*range(19)] and len(CITYSCAPES) == 34


def test_what_is_refused(tmp_path):
    output = open_storage(tmp_path)
    with pytest.raises(MaskMillError, match="There is no gtFine") as error:
        read_cityscapes(output.uri)
    assert error.value.code == "dataset_missing"
    output.write_bytes("labels.csv", b"name,id,trainId,color\ncat,0,0,#102030\ndog,0,0,#102031\n")
    with pytest.raises(MaskMillError, match=r"labels\.csv:3: not a class with an id of its own") as error:
        read_cityscapes(output.uri)
    ontology = Ontology.from_dict({"name": "x", "classes": ["a", "b"]})
    one = Sample(number=0, id=5, name="x", uri="", suffix=".png", labels=np.array([[0, 1]], np.uint8))
    export(Cityscapes(), ontology, [one], output)
    output.write_bytes("labels.csv", b"name,id,trainId,color\ncat,0,0,#102030\n")
    with pytest.raises(MaskMillError, match="holds ids that cityscapes does not have: 1") as error:
        [one.labels for one in read_cityscapes(output.uri).samples]
    assert error.value.code == "mask_invalid"
