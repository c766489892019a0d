"""Cityscapes, 19 evaluated classes."""

from __future__ import annotations

from typing import Final

from pipeline.datasets.base import MaskDataset, Source, list_files
from pipeline.formats.masks import identity_ids
from pipeline.ontology.reading import load_ontology

#: The evaluated label ids, in the order of their train ids 0..18.
LABEL_IDS: Final = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)

SOURCE = Source(
    "Cityscapes",
    "https://www.cityscapes-dataset.com (leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip)",
    """\
cityscapes/
  leftImg8bit/val/frankfurt/frankfurt_000000_000294_leftImg8bit.png ...
  gtFine/val/frankfurt/frankfurt_000000_000294_gtFine_labelIds.png ...  (or *_labelTrainIds.png)""",
)


def open_cityscapes(root: str | None, *, split: str = "val") -> MaskDataset:
    """Cityscapes with fine annotations: label ids are mapped to train ids, all others are ignored.

    Args:
        root: the folder with ``leftImg8bit`` and ``gtFine``.
        split: ``val`` or ``train`` (the labels of ``test`` are not public).

    Raises:
        MaskMillError: ``dataset_missing``.
    """
    place = SOURCE.open(root, ["leftImg8bit", "gtFine"], ["cityscapes"])
    ending = "_leftImg8bit"
    files = list_files(place, f"leftImg8bit/{split}", f"{ending}.png", recursive=True)
    masks = list_files(place, f"gtFine/{split}", "_gtFine_labelTrainIds.png", recursive=True)
    trained = bool(masks)
    if not masks:
        masks = list_files(place, f"gtFine/{split}", "_gtFine_labelIds.png", recursive=True)
    if not files or not masks:
        absent = f"images in leftImg8bit/{split}" if not files else f"label maps in gtFine/{split}"
        raise SOURCE.missing(place.uri, f"there are no {absent}")
    # Label tables look samples up by the full file stem, so it keeps "_leftImg8bit".
    images = {f"{name}{ending}": path for name, path in files.items()}
    masks = {f"{name}{ending}": path for name, path in masks.items()}
    ids = identity_ids(19) if trained else {label: 255 for label in range(34)}
    if not trained:
        # -1, the licence plates, is stored as 255 in 8 bits.
        ids |= {255: 255, **{label: position for position, label in enumerate(LABEL_IDS)}}
    return MaskDataset(
        name="cityscapes19",
        split=split,
        classes=load_ontology("cityscapes19"),
        samples=SOURCE.samples(images | masks, images, masks, place),
        identity="labelTrainIds" if trained else "labelIds",
        ids=ids,
    )
