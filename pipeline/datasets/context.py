"""PASCAL Context, 59 most frequent classes, in mmsegmentation's layout."""

from __future__ import annotations

from typing import Literal

from pipeline.datasets.base import MaskDataset, Source
from pipeline.datasets.voc import open_devkit
from pipeline.formats.masks import identity_ids

SOURCE = Source(
    "PASCAL Context",
    "https://cs.stanford.edu/~roozbeh/pascal-context/ (images: http://host.robots.ox.ac.uk/pascal/VOC/voc2010/;"
    " masks: mmsegmentation's tools/dataset_converters/pascal_context.py)",
    """\
VOCdevkit/VOC2010/
  JPEGImages/2008_000002.jpg ...
  SegmentationClassContext/2008_000002.png ...  (0 background, 1-59)
  ImageSets/SegmentationContext/train.txt, val.txt""",
)


def open_context(
    root: str | None, *, split: str = "val", classes: Literal["context59", "context60"] = "context59"
) -> MaskDataset:
    """PASCAL Context with 59 classes (background ignored) or 60.

    Args:
        root: the folder ``VOC2010``, its parent, or the parent of ``VOCdevkit``.
        split: name of a list in ``ImageSets/SegmentationContext``.
        classes: ``context59`` ignores label 0; ``context60`` makes it class 0.

    Raises:
        MaskMillError: ``dataset_missing``.
    """
    ids = (
        identity_ids(60)
        if classes == "context60"
        else {0: 255, **{label: label - 1 for label in range(1, 60)}, 255: 255}
    )
    return open_devkit(
        SOURCE, root, split, ontology=classes, ids=ids,
        inner=("VOC2010", "VOCdevkit/VOC2010"),
        lists=("ImageSets/SegmentationContext",),
        masks=("SegmentationClassContext",),
    )  # fmt: skip
