"""PASCAL VOC 2012, and the devkit layout that PASCAL Context shares with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Literal

from pipeline.datasets.base import MaskDataset, Source, list_files, read_list
from pipeline.files.storage import Storage
from pipeline.formats.masks import identity_ids
from pipeline.ontology.reading import load_ontology

SOURCE = Source(
    "PASCAL VOC 2012",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    """\
VOCdevkit/VOC2012/
  JPEGImages/2007_000033.jpg ...
  SegmentationClass/2007_000033.png ...     (or SegmentationClassAug/)
  ImageSets/Segmentation/train.txt, val.txt (or ImageSets/train.txt, val.txt)""",
)


def open_voc(
    root: str | None, *, split: str = "val", classes: Literal["voc20", "voc21"] = "voc21"
) -> MaskDataset:
    """PASCAL VOC 2012 with 20 classes (background ignored) or 21.

    Args:
        root: the folder ``VOC2012``, its parent, or the parent of ``VOCdevkit``.
        split: name of a list in ``ImageSets``. A list that ``SegmentationClass`` does not cover (such as the
            10,582 images of ``train_aug``) is read from ``SegmentationClassAug``.
        classes: ``voc20`` ignores label 0; ``voc21`` makes it class 0. 255 (void) is ignored in both.

    Raises:
        MaskMillError: ``dataset_missing``.
    """
    # Label 0 is background; label i + 1 is class i of voc20.
    ids = (
        identity_ids(21)
        if classes == "voc21"
        else {0: 255, **{label: label - 1 for label in range(1, 21)}, 255: 255}
    )
    return open_devkit(
        SOURCE, root, split, ontology=classes, ids=ids,
        inner=("VOC2012", "VOCdevkit/VOC2012"),
        lists=("ImageSets/Segmentation", "ImageSets"),
        masks=("SegmentationClass", "SegmentationClassAug"),
    )  # fmt: skip


def open_devkit(
    source: Source,
    root: str | None,
    split: str,
    *,
    ontology: str,
    ids: Mapping[int, int],
    inner: Sequence[str],
    lists: Sequence[str],
    masks: Sequence[str],
) -> MaskDataset:
    """Open a dataset of ``JPEGImages``, a mask folder and a list of names.

    Args:
        source: for errors.
        root: as the user gave it.
        split: name of a list.
        ontology: name of a built-in ontology.
        ids: see ``MaskDataset``.
        inner: subfolders of ``root`` that may be the devkit's folder.
        lists: folders of lists; the first one with any lists is used.
        masks: mask folders; the one that covers most of the split is used, the first on a tie.
    """
    place = source.open(root, ["JPEGImages"], inner)
    names = _read_split(source, place, split, lists)
    images = list_files(place, "JPEGImages", (".jpg", ".jpeg"))
    listed = {folder: list_files(place, folder, ".png") for folder in masks}
    if not any(listed.values()):
        raise source.missing(place.uri, f"there are no masks, that is PNGs in {' or '.join(masks)}")
    folder = max(masks, key=lambda candidate: sum(name in listed[candidate] for name in names))
    return MaskDataset(
        name=ontology,
        split=split,
        classes=load_ontology(ontology),
        samples=source.samples(names, images, listed[folder], place),
        identity=folder,
        ids=ids,
    )


def _read_split(source: Source, place: Storage, split: str, lists: Sequence[str]) -> list[str]:
    for folder in lists:
        available = [path for path in place.list(folder) if path.endswith(".txt")]
        if f"{folder}/{split}.txt" in available:
            return read_list(place, f"{folder}/{split}.txt")
        if available:
            known = ", ".join(PurePosixPath(path).stem for path in available)
            raise source.missing(place.uri, f"there is no list {folder}/{split}.txt (there are: {known})")
    raise source.missing(place.uri, f"there is no list {lists[0]}/{split}.txt")
