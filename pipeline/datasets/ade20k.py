"""ADE20K, 150 classes of the scene parsing challenge."""

from __future__ import annotations

from pipeline.datasets.base import MaskDataset, Source, list_files
from pipeline.ontology.reading import load_ontology

SOURCE = Source(
    "ADE20K, scene parsing benchmark",
    "http://sceneparsing.csail.mit.edu (ADEChallengeData2016.zip)",
    """\
ADEChallengeData2016/
  images/validation/ADE_val_00000001.jpg ...
  annotations/validation/ADE_val_00000001.png ...  (0 other, 1-150)""",
)


def open_ade20k(root: str | None, *, split: str = "validation") -> MaskDataset:
    """ADE20K: label 0 ("other") is ignored, label i is class i - 1.

    Args:
        root: the folder ``ADEChallengeData2016`` or its parent.
        split: ``validation`` or ``training``.

    Raises:
        MaskMillError: ``dataset_missing``.
    """
    place = SOURCE.open(root, ["annotations"], ["ADEChallengeData2016"])
    images = list_files(place, f"images/{split}", (".jpg", ".jpeg"))
    masks = list_files(place, f"annotations/{split}", ".png")
    if not images or not masks:
        absent = f"images in images/{split}" if not images else f"label maps in annotations/{split}"
        raise SOURCE.missing(place.uri, f"there are no {absent}")
    return MaskDataset(
        name="ade150",
        split=split,
        classes=load_ontology("ade150"),
        samples=SOURCE.samples(images | masks, images, masks, place),
        identity="annotations",
        ids={0: 255, **{label: label - 1 for label in range(1, 151)}},
    )
