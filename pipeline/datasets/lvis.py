"""LVIS v1 (Gupta, Dollár and Girshick, CVPR 2019): 1203 classes of things on COCO's images.

Every class is annotated in only some of the images, so pixels without an instance are unknown: ignored, not
background. For classes that are not annotated exhaustively in an image (``not_exhaustive_category_ids``),
``truth`` has the annotated instances, and the sample lists these classes.
"""

from __future__ import annotations

from models.errors import MaskMillError
from pipeline.datasets.base import Source
from pipeline.datasets.cocojson import CocoDataset, open_coco_json

NAME = "lvis"
SOURCE = Source(
    "LVIS v1",
    "https://www.lvisdataset.org/dataset",
    """\
root/
  annotations/lvis_v1_val.json  (or lvis_v1_val.json)
  train2017/000000391895.jpg    (COCO 2017's images; val needs both folders; or images/train2017)
  val2017/000000397133.jpg""",
)


def open_lvis(root: str | None, *, split: str = "val") -> CocoDataset:
    """LVIS with all classes in the file, named by ``pipeline.datasets.cocojson.category_ontology``.

    Args:
        root: the folder with annotations and images.
        split: ``val`` or ``train``.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``.
    """
    parts = ("train2017", "val2017")
    place = SOURCE.open(root, [*parts, *(f"images/{part}" for part in parts)])
    # A folder "images" may exist for other reasons, so count the split folders.
    folder = max(("", "images/"), key=lambda folder: sum(place.exists(folder + part) for part in parts))
    for file in (f"annotations/lvis_v1_{split}.json", f"lvis_v1_{split}.json"):
        if place.exists(file):
            try:
                return open_coco_json(
                    place.uri_of(file), place.uri_of(folder), ontology=None, name=NAME, split=split
                )
            except MaskMillError as error:
                if error.code != "dataset_missing":
                    raise
                raise type(error)(
                    error.code,
                    error.message,
                    f"Complete the folder. The layout is\n\n{SOURCE.layout}",
                ) from error
    raise SOURCE.missing(place.uri, f"there is no annotations/lvis_v1_{split}.json")
