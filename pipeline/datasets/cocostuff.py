"""COCO-Stuff 164k: 80 things and 91 stuff classes on the images of COCO 2017."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

from pipeline.datasets.base import MaskDataset, Source, list_files
from pipeline.files.storage import Storage
from pipeline.formats.masks import identity_ids
from pipeline.ontology.reading import load_ontology

#: COCO category ids that no released annotation uses.
_UNUSED: Final = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})

#: Id (0..170) by pixel value in the published ``stuffthingmaps``, which is the category id - 1 (0..181).
RAW_IDS: Final = MappingProxyType(
    {
        category - 1: position
        for position, category in enumerate(number for number in range(1, 183) if number not in _UNUSED)
    }
)

SOURCE = Source(
    "COCO-Stuff 164k",
    "https://github.com/nightrome/cocostuff (images: https://cocodataset.org)",
    """\
coco_stuff164k/
  images/val2017/000000000139.jpg ...
  annotations/val2017/000000000139_labelTrainIds.png ...  (mmsegmentation's, 0-170)
    or 000000000139.png ...                               (as published, stuffthingmaps, 0-181)""",
)


def open_cocostuff(root: str | None, *, split: str = "val2017") -> MaskDataset:
    """COCO-Stuff 164k with 171 classes.

    Args:
        root: the folder with ``images`` and ``annotations`` (or ``stuffthingmaps``).
        split: ``val2017`` or ``train2017``.

    Raises:
        MaskMillError: ``dataset_missing``.
    """
    place, images = open_coco_images(SOURCE, root, split)
    kind, masks = list_maps(place, split, suffix="_labelTrainIds.png")
    if not masks:
        raise SOURCE.missing(place.uri, f"there are no label maps of {split}")
    return MaskDataset(
        name="cocostuff171",
        split=split,
        classes=load_ontology("cocostuff171"),
        samples=SOURCE.samples(images | masks, images, masks, place),
        identity=kind,
        ids=identity_ids(171) if kind == "labelTrainIds" else {**RAW_IDS, 255: 255},
    )


def open_coco_images(source: Source, root: str | None, split: str) -> tuple[Storage, dict[str, str]]:
    """The folder of a COCO dataset, and its images by name.

    Raises:
        MaskMillError: ``dataset_missing``.
    """
    place = source.open(root, ["images", "annotations", "stuffthingmaps", split])
    for folder in (f"images/{split}", split):
        images = list_files(place, folder, (".jpg", ".jpeg"))
        if images:
            return place, images
    raise source.missing(place.uri, f"there are no images in images/{split} or {split}")


def list_maps(place: Storage, split: str, *, suffix: str) -> tuple[str, dict[str, str]]:
    """List label maps, preferring converted ones.

    Args:
        place: the folder of the dataset.
        split: ``val2017``, …
        suffix: suffix of converted maps, such as ``_labelTrainIds.png``.

    Returns:
        The kind of maps (``labelTrainIds`` for that suffix, or ``stuffthingmaps``), and paths by name, which
        are empty without maps.
    """
    folders: Sequence[str] = (
        f"annotations/{split}",
        f"stuffthingmaps/{split}",
        f"stuffthingmaps_trainval2017/{split}",
    )
    for folder in folders:
        files = list_files(place, folder, ".png")
        ending = suffix.removesuffix(".png")
        converted = {name.removesuffix(ending): path for name, path in files.items() if name.endswith(ending)}
        if converted:
            return ending.lstrip("_"), converted
        raw = {name: path for name, path in files.items() if not name.endswith("TrainIds")}
        if raw:
            return "stuffthingmaps", raw
    return "stuffthingmaps", {}
