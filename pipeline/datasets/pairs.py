"""The user's own dataset: a folder of images and a folder of masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePosixPath

from models.errors import WrongUse
from pipeline.corpus.sources.found import IMAGE_EXTENSIONS
from pipeline.datasets.base import (
    Counts,
    MaskDataset,
    Sample,
    Source,
    list_files,
    read_text,
    shown,
)
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.masks import identity_ids
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology

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
    has_truth: bool = True,
) -> MaskDataset:
    """Match images and masks by relative path without extension, or else by file name alone.

    Every image needs a mask; masks without an image are counted and left out.

    Args:
        root: folder with ``images`` and ``masks``; not needed if both are given.
        split: ``all``, or path of a text file with a name per line (relative to ``images``, with or without
            extension).
        ontology: meaning of the ids: an ontology, a built-in name or a YAML file.
        images: folder of images, instead of ``root/images``.
        masks: folder of masks, instead of ``root/masks``.
        has_truth: False if the masks are labels of a model.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_*``.
    """
    classes = ontology if isinstance(ontology, Ontology) else load_ontology(ontology)
    image_place, mask_place = _place(root, "images", images), _place(root, "masks", masks)
    counts = Counts()
    image_files = list_files(image_place, "", IMAGE_EXTENSIONS, recursive=True, others=counts)
    mask_files = list_files(mask_place, "", ".png", recursive=True, others=(no_masks := Counts()))
    for place, files, what, others, given in (
        (image_place, image_files, "images", counts, images),
        (mask_place, mask_files, "mask PNGs", no_masks, masks),
    ):
        found = "; ".join(map(str, others.left_out()))
        but = f", but {found}" if found else ""
        if not files and given is not None:
            raise WrongUse(
                "dataset_missing",
                f"There are no {what} in {place.uri}{but}.",
                "Check the path. Masks are PNG files whose values are class ids, 255 is ignored.",
            )
        if not files:
            raise SOURCE.missing(place.uri, f"there are no {what}{but}")
    wanted = sorted(image_files)
    if split != "all":
        folder, _, name = split.rpartition("/")
        try:
            wanted = _listed(open_storage(folder or "."), name, image_files)
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
            "Add them, or give a list of the images with masks: --split FILE (text, one name per line).",
        )
    if split == "all":
        for path in sorted(set(mask_files.values()) - set(matched.values())):
            counts.add("mask without an image", path)
    kind = MaskDataset if has_truth else Agreement
    return kind(
        name="pairs",
        split=PurePosixPath(split).stem,
        classes=classes,
        samples=tuple(
            Sample(name, image_place.uri_of(image_files[name]), mask_place.uri_of(matched[name]))
            for name in wanted
        ),
        identity="masks",
        ids=identity_ids(classes.num_classes, ignore=classes.ignore_index),
        left_out=counts.left_out(),
    )


class Agreement(MaskDataset):
    """Images whose masks are labels of a model, so that figures are agreement with it."""

    @property
    def has_truth(self) -> bool:
        """See ``Dataset.has_truth``."""
        return False


def _listed(place: Storage, name: str, images: Mapping[str, str]) -> list[str]:
    """The names in a list: a line each, as names may have blanks; the images' own endings may be there."""
    lines = [line.removesuffix("\r") for line in read_text(place, name).split("\n") if line.strip()]
    by_path = {path: name for name, path in images.items()}
    return sorted({line if line in images else by_path.get(line.strip(), line.strip()) for line in lines})


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
