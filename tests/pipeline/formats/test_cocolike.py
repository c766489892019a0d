"""What COCO's relatives refuse to read, each fault made in an export that is right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.formats.base import Sample
from pipeline.formats.coco_panoptic import CocoPanoptic, read_coco_panoptic
from pipeline.formats.coco_stuff import CocoStuff, read_coco_stuff
from pipeline.ontology.ontology import Ontology
from tests.pipeline.formats.drawn import export, picture

ONTOLOGY = Ontology.from_dict({"name": "x", "classes": ["cat", "grass"]})
LABELS = np.array([[0, 1, 255], [0, 0, 1]], np.uint8)


def sample(image: bytes | None = None, uri: str = "s3://photos/a/n.jpg") -> Sample:
    return Sample(number=0, id=9, name="n", uri=uri, suffix=".jpg", labels=LABELS, image=image)


def put(*path: Any, value: Any) -> Callable[[dict], None]:
    def change(file: dict) -> None:
        for key in path[:-1]:
            file = file[key]
        file[path[-1]] = value

    return change


def double(key: str) -> Callable[[dict], None]:
    return lambda file: file[key].append(file[key][0])


BOTH = {
    "list": (lambda file: file.clear(), "images: Field required"),
    "images": (put("images", value={}), "images"),
    "image": (put("images", 0, value=7), "an image"),
    "image id": (put("images", 0, "id", value="seven"), r"an image: id"),
    "two images": (double("images"), "have one id"),
    "two categories": (double("categories"), "have one id"),
    "no categories": (put("categories", value=[]), "at least one class|category"),
    "name": (put("categories", 0, "name", value=None), "a category: name"),
    "same name": (put("categories", 1, "name", value="CAT"), "already used"),
    "outside": (put("images", 0, "file_name", value="../../n.jpg"), "not in the dataset"),
    "huge": (put("images", 0, "height", value=10**9), "an image: height"),
    "large": (put("images", 0, "height", value=10**8), "is too large"),
    "no size": (put("images", 0, "width", value=0), "an image: width"),
    "infinite": (put("images", 0, "width", value=float("inf")), "an image: width"),
    "annotation": (put("annotations", 0, value=[]), "annotation at place 1"),
}
PANOPTIC = {
    "other image": (put("annotations", 0, "image_id", value=5), "place 1 is of"),
    "category": (put("annotations", 0, "segments_info", 0, "category_id", value=7), "of no category"),
    "no entry": (lambda file: file["annotations"][0]["segments_info"].pop(), "segment 2 has no entry"),
    "one id": (put("annotations", 0, "segments_info", 1, "id", value=1), "have the id 1|has the id"),
    "id": (put("annotations", 0, "segments_info", 0, "id", value=2**24), "segments_info"),
    "mask": (put("annotations", 0, "file_name", value="/etc/passwd"), "not in the dataset"),
    "no mask": (put("annotations", 0, "file_name", value="m.png"), "cannot be read"),
    "folder": (put("annotations", 0, "file_name", value="."), "cannot be read"),
    "size": (put("images", 0, "height", value=3), "2 x 3 pixels, the image 3 x 3"),
}
STUFF = {
    "category": (put("annotations", 0, "category_id", value=7), "place 1 is of"),
    "short": (put("annotations", 0, "segmentation", "counts", value="1"), "cannot be drawn"),
    "size": (put("annotations", 0, "segmentation", "size", value=[9, 9]), "cannot be drawn"),
    "nothing": (put("annotations", 0, "segmentation", value=None), "cannot be drawn"),
}
FORMATS: dict[str, Any] = {
    "panoptic": (CocoPanoptic(), read_coco_panoptic, BOTH | PANOPTIC),
    "stuff": (CocoStuff(), read_coco_stuff, BOTH | STUFF),
}


@pytest.mark.parametrize(
    ("kind", "case"), [(kind, case) for kind, (_, _, cases) in FORMATS.items() for case in cases]
)
def test_what_is_wrong_is_told(tmp_path, kind, case):
    form, read, cases = FORMATS[kind]
    change, why = cases[case]
    export(form, ONTOLOGY, [sample()], open_storage(tmp_path))
    path = tmp_path / f"annotations/{kind}_train.json"
    file = json.loads(path.read_bytes())
    change(file)
    path.write_text(json.dumps(file))
    with pytest.raises(MaskMillError, match=why) as error:
        [one.labels for one in read(str(tmp_path)).samples]
    assert error.value.code in ("dataset_invalid", "mask_invalid", "ontology_invalid")


@pytest.mark.parametrize("text", ["", "[", "[]", "7", "[" * 100_000, '{"images": 1' + "0" * 5000 + "}"])
def test_what_is_no_coco_json_is_told(tmp_path, text):
    (tmp_path / "panoptic_train.json").write_text(text)
    with pytest.raises(MaskMillError, match=r"panoptic_train\.json") as error:
        read_coco_panoptic(str(tmp_path))
    assert error.value.code == "dataset_invalid"


def test_masks_that_are_none_are_told(tmp_path):
    export(CocoPanoptic(), ONTOLOGY, [sample()], open_storage(tmp_path))
    mask = tmp_path / "annotations/panoptic_train/n.png"
    whole = mask.read_bytes()
    Image.new("P", (3, 2)).save(mask)
    for content, why in (
        (mask.read_bytes(), "mode P"),
        (whole[:50], "no whole PNG"),
        (b"", "no whole PNG"),
        (whole[:16] + (60_000).to_bytes(4, "big") * 2 + whole[24:], "60000 x 60000"),
    ):
        mask.write_bytes(content)
        with pytest.raises(MaskMillError, match=why):
            [one.labels for one in read_coco_panoptic(str(tmp_path)).samples]


def test_categories_of_all_splits_are_the_same(tmp_path):
    output = open_storage(tmp_path)
    export(CocoStuff(), ONTOLOGY, [sample()], output)
    file = output.read_json("annotations/stuff_train.json")
    file["categories"][0]["name"] = "dog"
    output.write_json("annotations/stuff_val.json", file)
    with pytest.raises(MaskMillError, match=r"stuff_val\.json: its categories are not those of .*train"):
        read_coco_stuff(str(tmp_path))


@pytest.mark.parametrize("kind", FORMATS)
def test_where_images_are(tmp_path, kind):
    form, read, _ = FORMATS[kind]

    def address(**options: str) -> str:
        (one,) = read(str(tmp_path / "out"), **options).samples
        assert one.labels.tolist() == LABELS.tolist()
        return one.uri

    output = open_storage(tmp_path / "out")
    export(form, ONTOLOGY, [sample()], output)
    assert address() == "s3://photos/a/n.jpg"
    assert address(images=str(tmp_path / "mine")) == str(tmp_path / "mine/n.jpg")
    (tmp_path / "mine/train").mkdir(parents=True)
    Path(tmp_path / "mine/train/n.jpg").write_bytes(b"x")
    assert address(images=str(tmp_path / "mine")) == str(tmp_path / "mine/train/n.jpg")
    export(form, ONTOLOGY, [sample(picture(2, 3, ".jpg"))], output)
    assert address() == str(tmp_path / "out/images/train/n.jpg")


def test_no_dataset(tmp_path):
    with pytest.raises(MaskMillError, match="coco-stuff") as error:
        read_coco_stuff(str(tmp_path))
    assert error.value.code == "dataset_missing"
