"""COCO instances as semantic maps, against pycocotools and real annotations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO

from models.errors import MaskMillError
from pipeline.datasets.cocojson import open_coco_json
from pipeline.datasets.cocoobject import coco_object_ontology
from pipeline.datasets.registry import open_dataset
from pipeline.ontology.ontology import Ontology
from tests.pipeline.datasets.conftest import Write, photo

# pycocotools under NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

PETS = Ontology.from_dict({"name": "pets", "classes": ["Dog", {"name": "feline", "synonyms": ["cat"]}]})


def box(x: int, y: int, width: int, height: int) -> list[list[int]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def counts(mask: np.ndarray) -> dict[str, Any]:
    """Uncompressed RLE, column by column."""
    flat = mask.ravel(order="F").astype(int)
    edges = np.flatnonzero(np.diff(np.concatenate([[-1], flat, [-1]])))
    runs = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": runs if flat[0] == 0 else [0, *runs]}


def content(
    annotations: list[dict[str, Any]], names: tuple[str, ...] = ("dog", "cat", "tree")
) -> dict[str, Any]:
    return {
        "images": [{"id": 7, "file_name": "a.jpg", "height": 10, "width": 12}],
        "categories": [{"id": 10 * number + 1, "name": name} for number, name in enumerate(names)],
        "annotations": [
            {"id": number + 1, "image_id": 7, "iscrowd": 0} | annotation
            for number, annotation in enumerate(annotations)
        ],
    }


DOG, CAT, TREE = 1, 11, 21


def test_small_over_large_and_crowds_beneath(tmp_path: Path, write: Write) -> None:
    crowd = np.zeros((10, 12), np.uint8)
    crowd[:2, :2] = 1  # smaller than all, and still beneath
    packed = rle.encode(np.asfortranarray(crowd))
    annotations = [
        {"category_id": CAT, "segmentation": box(2, 2, 3, 3)},
        {"category_id": DOG, "segmentation": box(0, 0, 8, 8)},
        {"category_id": CAT, "segmentation": counts(crowd), "iscrowd": 1},
        {"category_id": CAT, "segmentation": packed | {"counts": packed["counts"].decode()}, "iscrowd": 1},
        {"category_id": TREE, "segmentation": box(0, 0, 12, 10)},
        {"category_id": DOG, "segmentation": [[1, 1, 2, 2], *box(10, 8, 1, 1)]},  # one polygon has no area
        {"category_id": DOG, "segmentation": [[1, 1], []]},
    ]  # fmt: skip
    write(
        str(tmp_path),
        {"annotations/instances_val2017.json": content(annotations), "val2017/a.jpg": photo(10, 12)},
    )
    dataset = open_dataset("coco-json", root=str(tmp_path), ontology=PETS)
    expected = np.full((10, 12), 255, np.uint8)  # no background in the ontology; trees are not in it
    expected[:8, :8] = 0
    expected[2:5, 2:5] = 1
    expected[8, 10] = 0
    _, truth = dataset.image_and_truth(dataset.samples[0])
    np.testing.assert_array_equal(truth, expected)
    assert dataset.split == "val2017" and dataset.ontology is None
    assert list(map(str, dataset.left_out)) == [
        "1 × annotation of a category that is no class here (tree)",
        "1 × annotation without an area (annotation 7)",
    ]


def test_an_uncovered_crowd_counts_as_its_class(tmp_path: Path, write: Write) -> None:
    crowd = np.zeros((10, 12), np.uint8)
    crowd[5:, :] = 1
    annotations = [
        {"category_id": DOG, "segmentation": counts(crowd), "iscrowd": 1},
        {"category_id": CAT, "segmentation": box(0, 4, 12, 6)},
    ]
    ontology = Ontology.from_dict(PETS.to_dict() | {"background": ["floor"]})
    truths = []
    for kept in (annotations[:1], annotations):
        write(str(tmp_path), {"a.json": content(kept), "img/a.jpg": photo(10, 12)})
        dataset = open_coco_json(str(tmp_path / "a.json"), str(tmp_path / "img"), ontology=ontology)
        truths.append(dataset.truth(dataset.samples[0]))
    expected = np.zeros((10, 12), np.uint8)
    expected[5:] = 1
    np.testing.assert_array_equal(truths[0], expected)
    expected[4:] = 2
    np.testing.assert_array_equal(truths[1], expected)


def test_real_annotations_against_pycocotools(coco_tiny: Path) -> None:
    dataset = open_dataset("cocoobject81", root=str(coco_tiny))  # there are no maps
    assert len(dataset.samples) == 80
    assert dataset.class_names[:2] == ("background", "person") and len(dataset.class_names) == 81
    reference = COCO(str(coco_tiny / "annotations" / "instances_val2017.json"))
    by_name = {category["id"]: category["name"] for category in reference.dataset["categories"]}
    image_ids = {image["file_name"]: image["id"] for image in reference.dataset["images"]}
    crowds = 0
    for sample in dataset.samples:
        annotations = reference.loadAnns(reference.getAnnIds(image_ids[f"{sample.name}.jpg"]))
        crowds += sum(annotation["iscrowd"] for annotation in annotations)
        drawn = [(reference.annToMask(annotation), annotation) for annotation in annotations]
        drawn.sort(key=lambda pair: (1 - pair[1]["iscrowd"], -int(pair[0].sum()), pair[1]["id"]))
        truth = dataset.truth(sample)
        expected = np.zeros(truth.shape, np.uint8)
        for mask, annotation in drawn:
            expected[mask == 1] = dataset.class_names.index(by_name[annotation["category_id"]])
        np.testing.assert_array_equal(truth, expected)
    assert crowds > 0  # the rule for them was put to the test
    assert dataset.image_and_truth(dataset.samples[0])[0].shape[2] == 3


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (lambda c: c["annotations"][0].update(segmentation=[]), "dataset_invalid",
         "annotation 1 has no segmentation, only a box"),
        (lambda c: c["annotations"][0].pop("segmentation"), "dataset_invalid", "annotation 1 has no segm"),
        (lambda c: c["annotations"][0].update(id=None, segmentation=None), "dataset_invalid",
         "annotation at place 1 has no segmentation"),
        (lambda c: c["annotations"][0].update(segmentation=[[0, 0, float("nan"), 5, 5, 5]]),
         "dataset_invalid", "annotation 1: its segmentation cannot be drawn: a polygon holds nan"),
        (lambda c: c["annotations"][0].update(segmentation={"size": [10, 12], "counts": [3]}),
         "dataset_invalid", "annotation 1: .* describes 3 pixels, the image has 10 x 12 = 120"),
        (lambda c: c["annotations"][0].pop("image_id"), "dataset_invalid", "annotation 1: image_id: Field"),
        (lambda c: c["annotations"][0].update(category_id=[]), "dataset_invalid", "annotation 1: categ"),
        (lambda c: c["annotations"][0].update(iscrowd="many"), "dataset_invalid", "annotation 1: iscrowd"),
        (lambda c: c["annotations"].insert(0, None), "dataset_invalid", "annotation at place 1"),
        *((lambda c, key=key: c.pop(key), "dataset_invalid", f"no list '{key}'")
          for key in ("images", "categories", "annotations")),
        (lambda c: c.update(annotations={"1": {}}), "dataset_invalid", "no list 'annotations'"),
        (lambda c: c["images"].clear(), "dataset_invalid", "lists no images"),
        (lambda c: c["images"][0].pop("file_name"), "dataset_invalid", "image 7 has no file_name"),
        (lambda c: c["images"][0].update(file_name="."), "dataset_invalid", "image 7 has no file_name"),
        (lambda c: c["images"][0].update(file_name="a\0.jpg"), "dataset_invalid", "image 7 has no file_name"),
        (lambda c: c["images"][0].update(height=0), "dataset_invalid", "image 7: height"),
        (lambda c: c["images"][0].update(height="tall"), "dataset_invalid", "image 7: height"),
        (lambda c: c["images"][0].update(height=10**6, width=10**6), "dataset_invalid", "exceeds the limit"),
        (lambda c: c["images"].append(c["images"][0]), "dataset_invalid", "two .* have the id of image 7"),
        (lambda c: c["images"].append(c["images"][0] | {"id": 8}), "dataset_invalid",
         r"1 files are listed as several images: a\.jpg"),
        (lambda c: c["categories"].append({"id": "1", "name": "x"}), "dataset_invalid",
         "two entries have the id of category 1"),
        (lambda c: c["categories"][0].update(name=" "), "dataset_invalid", "category 1: name: .*empty"),
        (lambda c: c["categories"].pop(1), "dataset_invalid", r"no category for 1 classes of pets: feline"),
        (lambda c: c["images"][0].update(file_name="b.jpg"), "dataset_missing", r"1 of its 1 .*b\.jpg"),
        (lambda c: c["images"][0].update(file_name="/a.jpg"), "dataset_missing", r"1 of its 1 .* /a\.jpg"),
        (lambda c: c["images"][0].update(file_name="../img/a.jpg"), "dataset_missing", r"\.\./img/a\.jpg"),
    ],
)  # fmt: skip
def test_broken_files(change: Any, code: str, says: str, tmp_path: Path, write: Write) -> None:
    broken = content([{"category_id": DOG, "segmentation": box(0, 0, 2, 2)}])
    change(broken)
    write(str(tmp_path), {"x.json": broken, "img/a.jpg": photo(10, 12)})
    with pytest.raises(MaskMillError) as caught:
        open_coco_json(str(tmp_path / "x.json"), str(tmp_path / "img"), ontology=PETS)
    assert caught.value.code == code
    assert "x.json" in str(caught.value) and re.search(says, str(caught.value)), str(caught.value)


def texts(c: dict[str, Any]) -> None:
    for image in c["images"]:
        image.update(id="7", height="10", width=12.0)


def floats(c: dict[str, Any]) -> None:
    for annotation in c["annotations"]:
        annotation.update(image_id=7.0, category_id=float(annotation["category_id"]))


def no_ids(c: dict[str, Any]) -> None:
    for annotation in c["annotations"]:
        del annotation["id"]


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (texts, []),
        (floats, []),
        (no_ids, []),
        (lambda c: [a.pop("iscrowd") for a in c["annotations"]], []),
        (lambda c: [i.update(height=None, width=None) for i in c["images"]], []),
        (lambda c: [i.pop("height") for i in c["images"]], []),
        (lambda c: [k.update(name=f" {k['name'].upper()}  ") for k in c["categories"]], []),
        (lambda c: c["annotations"][0].update(segmentation=box(0, 0, 4, 4)[0]), []),
        (
            lambda c: c["annotations"].append(c["annotations"][0] | {"id": 99, "image_id": 12345}),
            ["1 × annotation of an image that the file does not list (annotation 99: 12345)"],
        ),
        (
            lambda c: c["annotations"].append(c["annotations"][0] | {"id": 99, "category_id": 1234}),
            ["1 × annotation of a category that the file does not list (annotation 99: 1234)"],
        ),
        (
            lambda c: c["annotations"].extend({"image_id": 7, "category_id": TREE} for _ in range(9)),
            ["9 × annotation of a category that is no class here (tree)"],
        ),
    ],
)
def test_files_that_other_tools_write(change: Any, left_out: list[str], tmp_path: Path, write: Write) -> None:
    plain = [
        {"category_id": DOG, "segmentation": box(0, 0, 4, 4)},
        {"category_id": CAT, "segmentation": box(2, 2, 4, 4)},
    ]
    described = content(plain)
    change(described)
    write(str(tmp_path), {"x.json": described, "img/a.jpg": photo(10, 12)})
    dataset = open_coco_json(str(tmp_path / "x.json"), str(tmp_path / "img"), ontology=PETS)
    expected = np.full((10, 12), 255)
    expected[:4, :4] = 0
    expected[2:6, 2:6] = 1
    np.testing.assert_array_equal(dataset.truth(dataset.samples[0]), expected)
    assert list(map(str, dataset.left_out)) == left_out


def test_two_files_of_one_stem_keep_their_endings(tmp_path: Path, write: Write) -> None:
    described = content([])
    described["images"].append(described["images"][0] | {"id": 8, "file_name": "a.png"})
    described["images"].append(described["images"][0] | {"id": 9, "file_name": "b.jpg"})
    write(str(tmp_path), {"x.json": described} | dict.fromkeys(("a.jpg", "a.png", "b.jpg"), photo(10, 12)))
    dataset = open_coco_json(str(tmp_path / "x.json"), str(tmp_path), ontology=PETS)
    assert [sample.name for sample in dataset.samples] == ["a.jpg", "a.png", "b"]


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize("folders", [2, 20])
def test_images_in_folders_of_their_own(folders: int, remote: bool, tmp_path: Path, write: Write) -> None:
    root = f"memory://coco-{folders}" if remote else str(tmp_path)
    files = [f"scenes/{number}/a.jpg" for number in range(folders)]
    described = content([]) | {
        "images": [
            {"id": number, "file_name": f"./{file}", "height": 10, "width": 12}
            for number, file in enumerate(files)
        ]
    }
    write(root, {"x.json": described} | {f"img/{file}": photo(10, 12) for file in files[1:]})
    with pytest.raises(MaskMillError, match=rf"1 of its {folders} images .*scenes/0/a\.jpg") as caught:
        open_coco_json(f"{root}/x.json", f"{root}/img", ontology=PETS)
    assert caught.value.code == "dataset_missing"
    write(root, {f"img/{files[0]}": photo(10, 12)})
    dataset = open_coco_json(f"{root}/x.json", f"{root}/img", ontology=PETS)
    assert [sample.image for sample in dataset.samples] == [f"{root}/img/{file}" for file in sorted(files)]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", r"x\.json:1: not valid JSON"),
        (b'{"images": [],\n "annotations": oops}', r"x\.json:2: not valid JSON"),
        (b'{"images":\n"caf\xe9"}', r"x\.json:2: not UTF-8 text"),
        (b"[" * 100_000, r"x\.json: nested too deeply"),
        (b'{"images": ' + b"9" * 5000 + b"}", r"x\.json: cannot be read"),
        (b"[]", "holds a list, not COCO JSON"),
        (b"null", "holds null, not COCO JSON"),
        (b"", r"x\.json:1: not valid JSON"),
    ],
)
def test_what_is_no_json(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(MaskMillError, match=says) as caught:
        open_coco_json(str(tmp_path / "x.json"), str(tmp_path), ontology=PETS)
    assert caught.value.code == "dataset_invalid"


def test_a_byte_order_mark_is_no_fault(tmp_path: Path, write: Write) -> None:
    data = json.dumps(content([])).encode("utf-8-sig")
    write(str(tmp_path), {"x.json": data, "a.jpg": photo(10, 12)})
    assert len(open_coco_json(str(tmp_path / "x.json"), str(tmp_path), ontology=PETS).samples) == 1


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError, match=r"no x\.json") as caught:
        open_coco_json(str(tmp_path / "x.json"), str(tmp_path), ontology=PETS)
    assert caught.value.code == "dataset_missing"


def test_fingerprint_follows_the_annotations(tmp_path: Path, write: Write) -> None:
    prints = set()
    for side in (2, 3):
        annotations = [{"category_id": DOG, "segmentation": box(0, 0, side, side)}]
        write(str(tmp_path), {"x.json": content(annotations), "a.jpg": photo(10, 12)})
        dataset = open_coco_json(str(tmp_path / "x.json"), str(tmp_path), ontology=PETS)
        prints.add(dataset.fingerprint())
    assert len(prints) == 2


def test_object_ontology_is_that_of_the_categories(coco_tiny: Path) -> None:
    data = json.loads((coco_tiny / "annotations" / "instances_val2017.json").read_text())
    names = tuple(category["name"] for category in sorted(data["categories"], key=lambda c: c["id"]))
    ontology = coco_object_ontology()
    assert ontology.names == ("background", *names)
    assert ontology.background and not set(ontology.background) & set(names)
