"""COCO-Object: COCO's 80 things and background, introduced by GroupViT (arXiv 2202.11094)."""

from __future__ import annotations

from typing import Literal

from pipeline.datasets.base import Dataset, MaskDataset, Source
from pipeline.datasets.cocojson import open_coco_json
from pipeline.datasets.cocostuff import RAW_IDS, list_maps, open_coco_images
from pipeline.formats.masks import identity_ids
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology

NAME = "cocoobject81"
THINGS = 80

SOURCE = Source(
    "COCO-Object",
    "https://cocodataset.org (maps: https://github.com/nightrome/cocostuff, stuffthingmaps)",
    """\
coco/
  images/val2017/000000000139.jpg ...         (or val2017/)
  annotations/val2017/000000000139.png ...    (stuffthingmaps, or *_instanceTrainIds.png made from them)
    or annotations/instances_val2017.json     (instances; val2014 works as well)""",
)


def coco_object_ontology() -> Ontology:
    """Background (with the default words) and COCO's 80 things; class i is thing i - 1 of COCO-Stuff."""
    things = load_ontology("cocostuff171").classes[:THINGS]
    return Ontology.from_dict(
        {"name": NAME, "background": "default", "classes": [thing.model_dump() for thing in things]}
    )


def open_coco_object(
    root: str | None, *, split: str = "val2017", source: Literal["auto", "maps", "instances"] = "auto"
) -> Dataset:
    """COCO-Object with 81 classes; every pixel counts.

    Args:
        root: the folder with ``images`` and ``annotations``.
        split: ``val2017``, ``train2017``, or another split with an instances file, such as ``val2014``.
        source: ``maps``, behind the published numbers, takes the things from the COCO-Stuff maps and makes
            everything else background. ``instances`` draws the instances file (see ``cocojson``); the two
            differ where instances overlap. ``auto`` prefers maps.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``.
    """
    place, images = open_coco_images(SOURCE, root, split)
    classes = coco_object_ontology()
    kind, masks = (
        ("", {}) if source == "instances" else list_maps(place, split, suffix="_instanceTrainIds.png")
    )
    if masks:
        raw = {value: position + 1 if position < THINGS else 0 for value, position in RAW_IDS.items()}
        return MaskDataset(
            name=NAME,
            split=split,
            classes=classes,
            samples=SOURCE.samples(images | masks, images, masks, place),
            identity=kind,
            ids=identity_ids(THINGS + 1) if kind == "instanceTrainIds" else {**raw, 255: 0},
        )
    annotations = f"annotations/instances_{split}.json"
    if source == "maps" or not place.exists(annotations):
        wanted = "label maps" if source == "maps" else f"label maps and no {annotations}"
        raise SOURCE.missing(place.uri, f"there are no {wanted} of {split}")
    folder = next(iter(images.values())).rpartition("/")[0]
    return open_coco_json(
        place.uri_of(annotations), place.uri_of(folder), ontology=classes, name=NAME, split=split
    )
