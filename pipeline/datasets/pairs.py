"""The user's own dataset: a folder of images and a folder of masks."""

from __future__ import annotations

from collections import Counter
from pathlib import PurePosixPath

from models.errors import WrongUse
from pipeline.datasets.base import (
    IMAGE_SUFFIXES,
    MaskDataset,
    Sample,
    Source,
    identity_ids,
    list_files,
    read_list,
    shown,
)
from pipeline.files.storage import Storage, open_storage
from pipeline.ontology.ontology import Ontology, load_ontology

SOURCE = Source(
    "Image and mask pairs",
    "your own annotation tool",
    """\
root/
  images/cat.jpg, zoo/zebra.jpg ...
  masks/cat.png, zoo/zebra.png ...  (or side by side: zebra.png; values are class ids, 255 is ignored)""",
)


def open_pairs(
    root: str | None = None,
    *,
    split: str = "all",
    ontology: Ontology | str,
    images: str | None = None,
    masks: str | None = None,
) -> MaskDataset:
    """Match images and masks by relative path without extension, or else by file name alone.

    Every image needs a mask; masks without an image are ignored.

    Args:
        root: folder with ``images`` and ``masks``; not needed if both are given.
        split: ``all``, or path of a text file with a name per line (relative to ``images``, no extension).
        ontology: meaning of the ids: an ontology, a built-in name or a YAML file.
        images: folder of images, instead of ``root/images``.
        masks: folder of masks, instead of ``root/masks``.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_*``.
    """
    classes = ontology if isinstance(ontology, Ontology) else load_ontology(ontology)
    image_place, mask_place = _place(root, "images", images), _place(root, "masks", masks)
    image_files = list_files(image_place, "", IMAGE_SUFFIXES, recursive=True)
    mask_files = list_files(mask_place, "", ".png", recursive=True)
    for place, files, what in ((image_place, image_files, "images"), (mask_place, mask_files, "mask PNGs")):
        if not files and (images if what == "images" else masks) is not None:
            raise WrongUse(
                "dataset_missing",
                f"There are no {what} in {place.uri}.",
                "Check the path. Masks are PNG files whose values are class ids, 255 is ignored.",
            )
        if not files:
            raise SOURCE.missing(place.uri, f"there are no {what}")
    wanted = sorted(image_files)
    if split != "all":
        folder, _, name = split.rpartition("/")
        try:
            wanted = sorted(set(read_list(open_storage(folder or "."), name)))
        except FileNotFoundError:
            raise SOURCE.missing(folder or None, f"there is no list {name}") from None
    matched = _match(wanted, mask_files)
    absent = [f"{name} (image)" for name in wanted if name not in image_files]
    absent += [f"{name} (mask)" for name in wanted if name not in matched]
    if absent:
        raise WrongUse(
            "dataset_missing",
            f"{image_place.uri} and {mask_place.uri}: for {len(wanted):,} pairs, {len(absent):,} files are "
            f"missing: {shown(absent)}.",
            "Add them, or give a list of the images to measure as split (a text file, one name per line).",
        )
    return MaskDataset(
        name="pairs",
        split=PurePosixPath(split).stem,
        classes=classes,
        samples=tuple(
            Sample(name, image_place.uri_of(image_files[name]), mask_place.uri_of(matched[name]))
            for name in wanted
        ),
        identity="masks",
        ids=identity_ids(classes.num_classes, ignore=classes.ignore_index),
    )


def _place(root: str | None, folder: str, given: str | None) -> Storage:
    if given is not None:
        return open_storage(given)
    if root is None:
        raise SOURCE.missing(None, f"neither root nor a folder of {folder} was given")
    return open_storage(root).child(folder)


def _match(names: list[str], masks: dict[str, str]) -> dict[str, str]:
    """Path of the mask by image name: matched by relative path, and by file name for the rest."""
    by_path = {name: masks[name] for name in names if name in masks}
    if len(by_path) == len(names):
        return by_path
    by_stem: dict[str, list[str]] = {}
    for name, path in masks.items():
        by_stem.setdefault(PurePosixPath(name).name, []).append(path)
    sharing = Counter(PurePosixPath(name).name for name in names)
    matched = dict(by_path)
    for name in names:
        stem = PurePosixPath(name).name
        candidates = by_stem.get(stem, [])
        if name in matched or not candidates:
            continue
        if len(candidates) > 1 or sharing[stem] > 1:
            raise WrongUse(
                "dataset_invalid",
                f"Image {name} could belong to several masks or images: {shown(candidates)}.",
                "Give images and masks the same relative paths.",
            )
        matched[name] = candidates[0]
    return matched
