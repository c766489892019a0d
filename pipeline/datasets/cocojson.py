"""COCO JSON: instances drawn into one semantic map per image.

The rule: crowd regions first, then instances from large to small, later ones over earlier ones, so that a cup
on a table is a cup. ``iscrowd`` regions count as their class, as they do in COCO-Stuff's maps, but lie
beneath every single instance, since their outlines are coarse. Pixels of no instance, or of a category that
the ontology does not name, are background if the ontology has one, and ignored otherwise.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from models.errors import MaskMillError
from pipeline.datasets.base import Dataset, Labels, Sample, Source, shown
from pipeline.ontology import BACKGROUND, Ontology, load_ontology
from pipeline.storage import open_storage

SOURCE = Source(
    "COCO JSON",
    "https://cocodataset.org/#format-data",
    """\
root/
  annotations/instances_val2017.json  (images, annotations, categories)
  images/val2017/ or val2017/         (the files that it names)""",
)


@dataclass(frozen=True)
class CocoSample(Sample):
    """An image with its instances.

    Attributes:
        size: (H, W) of the annotation.
        instances: UTF-8 JSON, a list of [class id, whether crowd, annotation id, segmentation].
    """

    size: tuple[int, int] = (0, 0)
    instances: bytes = b"[]"


@dataclass(frozen=True)
class CocoDataset(Dataset):
    """See the module's text for how instances become one map."""

    def truth(self, sample: Sample) -> Labels:
        """See ``Dataset.truth``; raises ``dataset_invalid`` for a malformed segmentation."""
        assert isinstance(sample, CocoSample)
        blank = 0 if self.classes.background is not None else self.ignore_index
        labels: Labels = np.full(sample.size, blank, self.classes.mask_dtype)
        return draw_instances(labels, json.loads(sample.instances), where=sample.name)


def open_coco_json(
    annotations: str,
    images: str,
    *,
    ontology: Ontology | str,
    name: str = "coco-json",
    split: str | None = None,
) -> CocoDataset:
    """A COCO instances file as semantic truth.

    Args:
        annotations: path or URI of the JSON file.
        images: folder of its images; ``file_name`` is relative to it.
        ontology: classes are matched with categories by name or synonym, whatever the case.
        name: of the dataset.
        split: what to call the part; the JSON's file name by default.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_incomplete`` for images that are not there;
            ``dataset_invalid`` for a file that is not COCO JSON, an annotation without segmentation, or a
            class that no category is called like.
    """
    classes = ontology if isinstance(ontology, Ontology) else load_ontology(ontology)
    path = PurePosixPath(annotations)
    storage = open_storage(annotations.removesuffix(path.name).rstrip("/") or ".")
    try:
        data = storage.read_bytes(path.name)
    except FileNotFoundError:
        raise SOURCE.missing(storage.uri, f"there is no {path.name}") from None
    where = storage.uri_of(path.name)
    try:
        content = json.loads(data)
        class_of = _classes_by_category(content["categories"], classes, where)
        by_image: dict[int, list[Any]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            if annotation["category_id"] not in class_of:
                continue
            if not annotation.get("segmentation"):
                raise _invalid(where, f"annotation {annotation['id']} has no segmentation, only a box")
            entry = [
                class_of[annotation["category_id"]],
                int(bool(annotation.get("iscrowd", 0))),
                annotation["id"],
                annotation["segmentation"],
            ]
            by_image[annotation["image_id"]].append(entry)
        found = [
            (str(image["file_name"]), (int(image["height"]), int(image["width"])), by_image[image["id"]])
            for image in content["images"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _invalid(where, f"it is not COCO JSON ({type(error).__name__}: {error})") from error
    place = open_storage(images)
    present = set(place.list("", recursive=any("/" in file for file, _, _ in found)))
    absent = [file for file, _, _ in found if file not in present]
    if absent:
        raise MaskMillError(
            "dataset_incomplete",
            f"{where}: {len(absent):,} of its {len(found):,} images are not in {place.uri}: {shown(absent)}.",
            "Give the folder that holds the images that the JSON names.",
        )
    samples = [
        CocoSample(
            name=str(PurePosixPath(file).with_suffix("")),
            image=place.uri_of(file),
            size=size,
            instances=json.dumps(entries, separators=(",", ":")).encode(),
        )
        for file, size, entries in found
    ]
    return CocoDataset(
        name=name,
        split=split or path.stem,
        classes=classes,
        samples=tuple(sorted(samples, key=lambda sample: sample.name)),
        identity=f"instances {hashlib.sha256(data).hexdigest()}",
    )


def open_coco_root(
    root: str | None,
    *,
    split: str = "val2017",
    ontology: Ontology | str,
    annotations: str | None = None,
    images: str | None = None,
) -> CocoDataset:
    """Like ``open_coco_json``, with COCO's own folder names below ``root`` where no others are given."""
    if annotations is None:
        place = SOURCE.open(root, ["annotations"])
        annotations = place.uri_of(f"annotations/instances_{split}.json")
    if images is None:
        place = SOURCE.open(root, [f"images/{split}", split])
        images = place.uri_of(f"images/{split}" if place.exists(f"images/{split}") else split)
    return open_coco_json(annotations, images, ontology=ontology, split=split)


def draw_instances(labels: Labels, instances: list[Any], *, where: str) -> Labels:
    """Draw instances into a map, by the rule in the module's text.

    Args:
        labels: (H, W), drawn into.
        instances: [class id, whether crowd, annotation id, segmentation] each; polygons, or RLE with counts
            as list or as compressed string. Polygons of fewer than three points have no area, hence are left
            out.
        where: for errors.

    Raises:
        MaskMillError: ``dataset_invalid``.
    """
    from pycocotools import mask as coco

    height, width = labels.shape
    regions = []
    for class_id, crowd, number, segmentation in instances:
        try:
            if isinstance(segmentation, Mapping):
                counts = segmentation["counts"]
                rle = (
                    coco.frPyObjects(segmentation, height, width)
                    if isinstance(counts, list)
                    else segmentation
                )
                if list(segmentation["size"]) != [height, width]:
                    raise ValueError(f"its size is {segmentation['size']}, the image's {[height, width]}")
            else:
                polygons = [polygon for polygon in segmentation if len(polygon) >= 6]
                if not polygons:
                    continue
                rle = coco.merge(coco.frPyObjects(polygons, height, width))
            area = int(coco.area(rle))
        except Exception as error:  # pycocotools raises bare Exceptions
            raise _invalid(
                where, f"the segmentation of annotation {number} cannot be read ({error})"
            ) from error
        regions.append((not crowd, -area, number, class_id, rle))
    for *_, class_id, rle in sorted(regions, key=lambda region: region[:3]):
        labels[coco.decode(rle).astype(bool)] = class_id
    return labels


def _classes_by_category(categories: list[dict[str, Any]], classes: Ontology, where: str) -> dict[int, int]:
    """Class id by category id, for the categories that the ontology names."""
    class_by_word = {name.casefold(): number for number, name in enumerate(classes.names)}
    for entry in classes.classes:
        for synonym in entry.synonyms:
            class_by_word[synonym.casefold()] = class_by_word[entry.name.casefold()]
    found = {
        category["id"]: class_by_word[str(category["name"]).casefold()]
        for category in categories
        if str(category["name"]).casefold() in class_by_word
    }
    absent = [
        name
        for number, name in enumerate(classes.names)
        if number not in found.values() and name != BACKGROUND
    ]
    if absent:
        raise MaskMillError(
            "dataset_invalid",
            f"{where} has no category for {len(absent)} classes of {classes.name}: {shown(absent)}.",
            "Give the class its category's name as a synonym, or leave the class out of the ontology. "
            f"Categories: {shown([category['name'] for category in categories])}.",
        )
    return found


def _invalid(where: str, why: str) -> MaskMillError:
    return MaskMillError(
        "dataset_invalid",
        f"{where}: {why}.",
        "Correct the file; the format is described at https://cocodataset.org/#format-data.",
    )
