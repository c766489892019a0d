"""COCO-Stuff, read as its toolbox does: with pycocotools, category by category, and with Pillow."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image
from pycocotools.coco import COCO

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Loss, Sample
from pipeline.formats.coco_stuff import CocoStuff, read_coco_stuff
from pipeline.ontology.ontology import Ontology
from tests.pipeline.formats.drawn import check_same, contents, datasets, export, picture


@given(datasets())
@settings(max_examples=10)
def test_labels_come_back(tmp_path_factory, drawn):
    ontology, samples = drawn
    output = open_storage(tmp_path_factory.mktemp("out"))
    names, lost = export(CocoStuff(), ontology, samples, output)
    assert lost == Loss() and names == sorted({f"annotations/stuff_{one.split}.json" for one in samples})
    before = contents(output)
    export(CocoStuff(), ontology, samples, output)
    assert contents(output) == before
    if samples:
        check_same(read_coco_stuff(output.uri), ontology, samples)
    shutil.rmtree(output.root)


@pytest.mark.parametrize("classes", [4, 255, 300])
def test_the_toolbox_finds_what_the_pixel_map_shows(tmp_path, classes, capsys):
    ontology = Ontology.from_dict({"name": "x", "classes": [f"c{number}" for number in range(classes)]})
    labels = np.array([[0, 1, 2, classes - 1], [ontology.ignore_index, 1, 0, 2]], ontology.mask_dtype)
    output = open_storage(tmp_path)
    one = Sample(
        number=0, id=5, name="a.b", uri="/p/a.b.png", suffix=".png", labels=labels, image=picture(2, 4)
    )
    export(CocoStuff(), ontology, [one], output)
    coco = COCO(output.path("annotations/stuff_train.json"))
    capsys.readouterr()
    (image,) = coco.loadImgs(coco.getImgIds())
    drawn = np.zeros(labels.shape, int)
    for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image["id"], iscrowd=False)):
        mask = coco.annToMask(annotation).astype(bool)
        assert not drawn[mask].any() and mask.sum() == annotation["area"]
        drawn[mask] = annotation["category_id"]
    assert drawn.tolist() == [[1, 2, 3, classes], [0, 2, 1, 3]]
    with Image.open(output.path("annotations/stuff_train_pixelmaps/a.b.png")) as pixels:
        assert (np.asarray(pixels) == drawn).all()
        assert pixels.mode == ("P" if classes <= 255 else "I;16")
        if pixels.mode == "P":
            palette = np.array(pixels.getpalette()).reshape(-1, 3)
            assert (palette[1 : classes + 1] == ontology.palette()).all() and not palette[0].any()
    assert output.exists(f"images/train/{image['file_name']}")


def test_overlapping_annotations_are_refused(tmp_path):
    ontology = Ontology.from_dict({"name": "x", "classes": ["a", "b"]})
    output = open_storage(tmp_path)
    one = Sample(number=0, id=5, name="n", uri="/p/n.png", suffix=".png", labels=np.array([[0, 1]], np.uint8))
    export(CocoStuff(), ontology, [one], output)
    file = output.read_json("annotations/stuff_train.json")
    file["annotations"][1]["segmentation"] = file["annotations"][0]["segmentation"]
    output.write_json("annotations/stuff_train.json", file)
    with pytest.raises(MaskMillError, match="place 2 overlaps another") as error:
        [one.labels for one in read_coco_stuff(output.uri).samples]
    assert error.value.code == "dataset_invalid"
