"""PASCAL VOC, read as torchvision and Pillow do."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from torchvision.datasets import VOCSegmentation

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.voc import Voc, read_voc
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture
from tests.pipeline.formats.readers import run_reader

SUBSET = Path(__file__).resolve().parents[4] / "shared" / "data" / "voc2012_subset"


@given(datasets())
@settings(max_examples=12)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    if ontology.num_classes > Voc.max_classes:
        return
    output = open_storage(tmp_path_factory.mktemp("out"))
    names, lost = export(Voc(), ontology, samples, output)
    assert lost == Loss() and names[-1] == "labelmap.txt"
    before = contents(output)
    export(Voc(), ontology, samples, output)
    assert contents(output) == before
    imported = read_voc(output.uri)
    check_same(imported, ontology, [replace(one, suffix=".jpg") for one in samples])
    # Colours that two classes share are told apart; none is changed here.
    assert (imported.ontology.palette() == ontology.palette()).all()
    shutil.rmtree(output.root)


def test_torchvision_reads_it(tmp_path):
    ontology = Ontology.from_dict({"name": "x", "classes": ["a:b", "#猫", 'c, "d"'], "background": ["rest"]})
    labels = np.array([[0, 1, 2, 3], [255, 255, 3, 0]], np.uint8)
    one = Sample(number=0, id=5, name="my photo, 1", uri="/p/x.png", suffix=".png", labels=labels)
    samples = [
        replace(one, image=picture(2, 4)),
        replace(one, name="b/猫.x", split="val", labels=labels[::-1], image=picture(2, 4, ".jpg")),
        replace(one, name="c", split="test", image=picture(2, 4)),
    ]
    output = open_storage(tmp_path / "VOCdevkit" / "VOC2012")
    export(Voc(), ontology, samples, output)
    for name, wanted in (("train", [0]), ("val", [1]), ("trainval", [0, 1]), ("test", [2])):
        if name == "test":  # torchvision has this list for 2007 only
            found = output.read_bytes("ImageSets/Segmentation/test.txt").decode().splitlines()
            assert found == ["c"]
            continue
        dataset = VOCSegmentation(str(tmp_path), year="2012", image_set=name)
        assert len(dataset) == len(wanted)
        for (image, mask), number in zip(dataset, wanted, strict=True):
            assert mask.mode == "P" and (np.asarray(mask) == samples[number].labels).all()
            assert image.size == mask.size and np.abs(np.asarray(image).astype(int) - (10, 200, 30)).max() < 6
            palette = np.array(mask.getpalette()).reshape(-1, 3)
            assert (palette[:4] == ontology.palette()).all()
            assert palette[255].tolist() == [224, 224, 192]
    lines = output.read_bytes("labelmap.txt").decode().splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "# label", "background", "a%3Ab", "%23猫", 'c, "d"', "ignored",
    ]  # fmt: skip
    check_same(read_voc(output.uri), ontology, [replace(sample, suffix=".jpg") for sample in samples])


def test_datumaro_reads_it(tmp_path):
    """It takes the colours of the palette, by labelmap.txt."""
    ontology = Ontology.from_dict({"name": "x", "classes": ["a", "猫 c"], "background": ["rest"]})
    labels = np.array([[0, 1, 2, 255], [2, 2, 1, 0]], np.uint8)
    one = Sample(
        number=0, id=5, name="my photo, 1", uri="", suffix=".png", labels=labels, image=picture(2, 4)
    )
    output = open_storage(tmp_path / "out")
    export(Voc(), ontology, [one, replace(one, name="b/c.d", split="val", labels=labels[::-1])], output)
    found = run_reader("datumaro_voc", output.root, str(tmp_path / "found.npz"), "voc_segmentation")
    assert found == {"labels": ["background", "a", "猫 c", "ignored"], "items": ["my photo, 1", "b/c.d"]}
    with np.load(tmp_path / "found.npz") as drawn:
        assert (drawn["arr_0"] == np.where(labels == 255, 3, labels)).all()
        assert (drawn["arr_1"] == drawn["arr_0"][::-1]).all()


def test_odd_classes_and_colours(tmp_path):
    same = [{"name": name, "color": "#102030"} for name in ("Ignored", "void", "x")]
    ontology = Ontology.from_dict({"name": "x", "classes": [*same, "ignored 2"], "ignore_index": 77})
    labels = np.array([[0, 1, 2, 3, 77]], np.uint8)
    output = open_storage(tmp_path)
    one = Sample(number=0, id=5, name="n", uri="/p/n.jpg", suffix=".jpg", labels=labels)
    export(Voc(), ontology, [one], output)
    with Image.open(output.path("SegmentationClass/n.png")) as mask:
        assert np.asarray(mask).tolist() == [[0, 1, 2, 3, 255]]
    check_same(read_voc(output.uri), ontology, [one])


def test_what_is_refused(tmp_path):
    output = open_storage(tmp_path)
    with pytest.raises(MaskMillError, match=r"no ImageSets/Segmentation") as error:
        read_voc(output.uri)
    assert error.value.code == "dataset_missing"
    output.write_bytes("labelmap.txt", b"cat:1,2,3::\ndog:1,2,3::\n")
    with pytest.raises(MaskMillError, match=r"labelmap\.txt:2: dog has the colour of another") as error:
        read_voc(output.uri)
    output.write_bytes("labelmap.txt", b"cat:1,2,3\n")
    with pytest.raises(MaskMillError, match=r"labelmap\.txt:1: not a label") as error:
        read_voc(output.uri)
    output.write_bytes("labelmap.txt", b"cat:1,2,3::\n")
    output.write_bytes("ImageSets/Segmentation/train.txt", b"../x\n")
    with pytest.raises(MaskMillError, match="not in the dataset") as error:
        [one.labels for one in read_voc(output.uri).samples]
    assert error.value.code == "dataset_invalid"


@pytest.mark.skipif(not SUBSET.is_dir(), reason="shared/data/voc2012_subset is not on this machine")
def test_voc_itself(tmp_path):
    """Real masks of VOC, under its own names: 255 around objects, no labelmap."""
    for name in ("JPEGImages", "SegmentationClass"):
        source = SUBSET / {"SegmentationClass": "SegmentationClassAug"}.get(name, name)
        (tmp_path / name).symlink_to(source, target_is_directory=True)
    ids = (SUBSET / "ImageSets/val.txt").read_text().split()[:20]
    output = open_storage(tmp_path)
    output.write_bytes("ImageSets/Segmentation/val.txt", "".join(f"{id}\n" for id in ids).encode())
    imported = read_voc(str(tmp_path))
    assert imported.ontology.names == load_ontology("voc21").names
    samples = list(imported.samples)
    assert [one.name for one in samples] == ids
    for one in samples:
        with Image.open(SUBSET / f"SegmentationClassAug/{one.name}.png") as mask:
            assert (np.asarray(mask) == one.labels).all()
    again = open_storage(tmp_path / "again")
    export(Voc(), imported.ontology, samples, again)
    check_same(read_voc(again.uri), imported.ontology, samples)
