"""LVIS' layout, the union of overlapping instances, and prompts that mean several classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from models.errors import MaskMillError
from pipeline.datasets.cocofile import CocoCategory
from pipeline.datasets.cocojson import CocoDataset, category_ontology, open_coco_root
from pipeline.datasets.generalised import (
    GeneralisedPrompt,
    MatchedPrompt,
    generalised_prompts,
    match_prompts,
)
from pipeline.datasets.registry import open_dataset
from pipeline.evaluation.prompts.generalised import generalised_queries
from pipeline.evaluation.prompts.pixels import squeezed_mask
from tests.pipeline.datasets.conftest import Write, photo

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")

NAMES = {3: "bow_(weapon)", 1: "bus_(vehicle)", 8: "bow_(decorative_ribbons)", 5: "deck_chair"}


def rectangle(x: int, y: int, width: int, height: int) -> list[list[int]]:
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


def lvis_file() -> dict[str, Any]:
    """As LVIS v1 writes it: no file names, no ``iscrowd``."""
    return {
        "images": [
            {"id": 30, "coco_url": "http://images.cocodataset.org/val2017/000000000030.jpg", "height": 10,
             "width": 12, "neg_category_ids": [3], "not_exhaustive_category_ids": [5], "license": 1},
            {"id": 4, "coco_url": "http://images.cocodataset.org/train2017/000000000004.jpg", "height": 8,
             "width": 8, "neg_category_ids": [], "not_exhaustive_category_ids": []},
        ],
        "categories": [
            {"id": number, "name": name, "synonyms": [name], "frequency": "c"}
            for number, name in NAMES.items()
        ],
        "annotations": [
            {"id": 1, "image_id": 30, "category_id": 1, "segmentation": rectangle(0, 0, 8, 8), "area": 64},
            {"id": 2, "image_id": 30, "category_id": 5, "segmentation": rectangle(2, 2, 3, 3), "area": 9},
            {"id": 3, "image_id": 30, "category_id": 1, "segmentation": rectangle(6, 6, 5, 3), "area": 15},
            {"id": 4, "image_id": 4, "category_id": 8, "segmentation": rectangle(1, 1, 2, 2), "area": 4},
        ],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("images", "beside"),
    [
        ("", "notes.txt"),
        ("", "images/logo.jpg"),
        ("", "images/val2017/logo.jpg"),
        ("images/", "notes.txt"),
        ("images/", "train2017/labels.txt"),
    ],
)
@pytest.mark.parametrize("annotations", ["", "annotations/"])
def test_layouts(images: str, beside: str, annotations: str, tmp_path: Path, write: Write) -> None:
    files = {
        beside: b"of no use",
        f"{annotations}lvis_v1_val.json": lvis_file(),
        f"{images}val2017/000000000030.jpg": photo(10, 12),
        f"{images}train2017/000000000004.jpg": photo(8, 8),
    }
    write(str(tmp_path), files)
    dataset = open_dataset("lvis", root=str(tmp_path))
    assert isinstance(dataset, CocoDataset)
    # By category id; brackets go where the name is unique without them.
    assert dataset.class_names == ("bus", "bow (weapon)", "deck chair", "bow (decorative ribbons)")
    assert [sample.name for sample in dataset.samples] == ["train2017/000000000004", "val2017/000000000030"]
    image, truth = dataset.image_and_truth(dataset.samples[1])
    assert image.shape == (10, 12, 3)
    expected = np.full((10, 12), 255)
    expected[:8, :8] = 0
    expected[6:9, 6:11] = 0
    expected[2:5, 2:5] = 2
    np.testing.assert_array_equal(truth, expected)
    # The chair lies on the bus; the union of the bus goes on beneath it.
    sample = dataset.samples[1]
    assert dataset.class_ids_of(sample) == {0, 2}
    np.testing.assert_array_equal(dataset.union(sample, {0}), (expected == 0) | (expected == 2))
    np.testing.assert_array_equal(dataset.union(sample, {2, 3}), expected == 2)
    assert not dataset.union(sample, {1}).any()


@pytest.mark.parametrize(
    ("class_ids", "images"),
    [
        ((0,), ["val2017/000000000030"]),
        ((2,), []),  # not all deck chairs are marked in the image that shows one
        ((0, 2), []),
        ((2, 3), ["train2017/000000000004"]),
        ((0, 3), ["train2017/000000000004", "val2017/000000000030"]),
    ],
)
def test_images_that_are_marked_in_part_are_not_asked(
    class_ids: tuple[int, ...], images: list[str], tmp_path: Path, write: Write
) -> None:
    files = {"val2017/000000000030.jpg": photo(10, 12), "train2017/000000000004.jpg": photo(8, 8)}
    write(str(tmp_path), {"lvis_v1_val.json": lvis_file(), **files})
    dataset = open_dataset("lvis", root=str(tmp_path))
    assert isinstance(dataset, CocoDataset)
    prompt = MatchedPrompt(GeneralisedPrompt("x", "y", ()), class_ids, ())
    found = [read().truths[0] for read in generalised_queries(dataset, [prompt])]
    samples = [sample for sample in dataset.samples if sample.name in images]
    assert len(found) == len(samples)
    for truth, sample in zip(found, samples, strict=True):
        np.testing.assert_array_equal(truth, squeezed_mask(dataset.union(sample, class_ids)))


def test_what_is_missing_is_said(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), {"val2017/000000000030.jpg": photo(10, 12)})
    with pytest.raises(MaskMillError, match=r"no annotations/lvis_v1_val\.json") as caught:
        open_dataset("lvis", root=str(tmp_path))
    assert caught.value.code == "dataset_missing"
    write(str(tmp_path), {"lvis_v1_val.json": lvis_file()})
    with pytest.raises(MaskMillError, match=r"1 of its 2 images .*train2017/000000000004\.jpg") as caught:
        open_dataset("lvis", root=str(tmp_path))
    assert caught.value.code == "dataset_missing" and "COCO 2017" in str(caught.value)


def test_two_categories_of_one_name_are_refused() -> None:
    with pytest.raises(MaskMillError) as caught:
        category_ontology([CocoCategory(id="1", name="dog"), CocoCategory(id="2", name="dog")])
    assert caught.value.code == "ontology_invalid"


def test_unions_on_real_annotations(coco_tiny: Path) -> None:
    dataset = open_coco_root(str(coco_tiny), ontology=None)
    reference = COCO(str(coco_tiny / "annotations" / "instances_val2017.json"))
    ids = {category["name"]: category["id"] for category in reference.dataset["categories"]}
    images = {image["file_name"]: image["id"] for image in reference.dataset["images"]}
    wanted = ("dining table", "person", "chair")
    classes = {dataset.class_names.index(name) for name in wanted}
    overlaps = 0
    for sample in dataset.samples[:40]:
        found = reference.loadAnns(
            reference.getAnnIds(images[f"{sample.name}.jpg"], catIds=[ids[name] for name in wanted])
        )
        union = dataset.union(sample, classes)
        masks = [reference.annToMask(annotation) == 1 for annotation in found]
        np.testing.assert_array_equal(union, np.any(masks, axis=0) if masks else np.zeros(union.shape, bool))
        overlaps += int((union & ~np.isin(dataset.truth(sample), list(classes))).sum())
    assert overlaps > 0  # things of other classes lie over what is meant


def test_the_prompts_are_the_paper_s() -> None:
    prompts = {prompt.text: prompt for prompt in generalised_prompts()}
    kinds = {text: prompt.kind for text, prompt in prompts.items()}
    assert kinds == {
        **dict.fromkeys(("sit on", "drink from", "ride on"), "affordances"),
        **dict.fromkeys(("can fly", "can be driven", "can swim"), "attributes"),
        **dict.fromkeys(("has wheels", "has legs"), "meronymy"),
    }
    counts = {text: len(set(prompt.class_names)) for text, prompt in prompts.items()}
    assert list(counts.values()) == [10, 5, 3, 12, 6, 7, 10, 33]
    assert all(len(prompt.class_names) == counts[text] for text, prompt in prompts.items())
    assert set(prompts["sit on"].class_names) < set(prompts["has legs"].class_names)


@pytest.mark.parametrize(
    ("data", "ids", "lacking"),
    [
        (["car", "Couch", "bus (vehicle)", "carrot"], (0, 1, 2), ("jet_plane",)),
        (["car_(automobile)", "bus", "railcar_(part_of_a_train)"], (0, 1), ("sofa", "jet_plane")),
        (["jet plane", "sofa", "couch"], (0, 1, 2), ("car_(automobile)", "bus_(vehicle)")),
        (["dog"], (), ("car_(automobile)", "sofa", "jet_plane", "bus_(vehicle)")),
    ],
)
def test_names_of_other_data(data: list[str], ids: tuple[int, ...], lacking: tuple[str, ...]) -> None:
    prompt = GeneralisedPrompt("x", "y", ("car_(automobile)", "sofa", "jet_plane", "bus_(vehicle)"))
    (match,) = match_prompts([prompt], data)
    assert (match.class_ids, match.lacking) == (ids, lacking)
