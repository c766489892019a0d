"""COCO JSON: instances drawn into one semantic map per image.

Crowd regions are drawn first, then instances from large to small, each over the earlier ones, so that a cup
on a table is a cup. ``iscrowd`` regions count as their class, as in COCO-Stuff's maps, but lie beneath all
instances because their outlines are coarse. Pixels without an instance, or of a category that is not in the
ontology, are background if the ontology has one, else ignored.

LVIS is COCO JSON too. Its images have no ``file_name`` but a URL that ends with the COCO split and the name,
so the reader looks for ``train2017/000000391895.jpg`` in the image folder.

``cocofile`` reads and checks the file, ``segmentation`` its polygons and RLEs.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt

from models.errors import WrongUse
from pipeline.datasets.base import Dataset, Labels, Sample, Source, read_image, shown
from pipeline.datasets.cocofile import CocoCategory, CocoImage, invalid, read_coco
from pipeline.files.documents import read_document
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.segmentation import draw_instances
from pipeline.ontology.ontology import BACKGROUND, Ontology
from pipeline.ontology.reading import load_ontology

SOURCE = Source(
    "COCO JSON",
    "https://cocodataset.org/#format-data",
    """\
root/
  annotations/instances_val2017.json  (images, annotations, categories)
  images/val2017/ or val2017/         (the files that it names)""",
)
_FEW_FOLDERS = 8


@dataclass(frozen=True)
class CocoSample(Sample):
    """An image with its instances.

    Attributes:
        size: (H, W) of the annotation.
        instances: UTF-8 JSON, the list for ``draw_instances``.
        not_exhaustive: ids of classes that LVIS has not annotated exhaustively in this image.
    """

    size: tuple[int, int] = (0, 0)
    instances: bytes = b"[]"
    not_exhaustive: frozenset[int] = frozenset()


@dataclass(frozen=True)
class CocoDataset(Dataset):
    """Truth drawn from instances; the module docstring has the rule."""

    def truth(self, sample: Sample) -> Labels:
        """See ``Dataset.truth``."""
        assert isinstance(sample, CocoSample)
        blank = 0 if self.classes.background is not None else self.ignore_index
        labels: Labels = np.full(sample.size, blank, self.classes.mask_dtype)
        return draw_instances(labels, json.loads(sample.instances))

    def class_ids_of(self, sample: Sample) -> set[int]:
        """Classes with an instance in the image, including those hidden beneath others in ``truth``."""
        assert isinstance(sample, CocoSample)
        return {int(class_id) for class_id, *_ in json.loads(sample.instances)}

    def not_exhaustive_ids_of(self, sample: Sample) -> frozenset[int]:
        """Classes that are not annotated exhaustively in the image; see ``CocoSample``."""
        assert isinstance(sample, CocoSample)
        return sample.not_exhaustive

    def union(self, sample: Sample, class_ids: Collection[int]) -> npt.NDArray[np.bool_]:
        """Union of all instances of the classes, bool (H, W), including parts that others cover."""
        assert isinstance(sample, CocoSample)
        wanted = [[1, *rest] for class_id, *rest in json.loads(sample.instances) if class_id in class_ids]
        blank: Labels = np.zeros(sample.size, np.uint8)
        return draw_instances(blank, wanted) == 1


def open_coco_json(
    annotations: str,
    images: str,
    *,
    ontology: Ontology | str | None,
    name: str = "coco-json",
    split: str | None = None,
) -> CocoDataset:
    """Open a COCO instances file as semantic truth.

    Args:
        annotations: path or URI of the JSON file.
        images: folder of its images; ``file_name`` is relative to it and may not lead out of it.
        ontology: classes match categories by name or synonym, ignoring case. None turns every category into a
            class (``category_ontology``).
        name: name of the dataset.
        split: name of the split; by default the stem of the JSON file.

    Raises:
        MaskMillError: ``dataset_missing``, also for missing images; ``dataset_invalid`` for
            a file that is not COCO JSON, an annotation that cannot be drawn, or a class without a category.
    """
    path = PurePosixPath(annotations)
    storage = open_storage(annotations.removesuffix(path.name).rstrip("/") or ".")
    try:
        data = read_document(storage, path.name, code="dataset_invalid")
    except FileNotFoundError:
        raise SOURCE.missing(storage.uri, f"there is no {path.name}") from None
    where = storage.uri_of(path.name)
    file = read_coco(data, where)
    if ontology is None:
        classes = category_ontology(file.categories)
        class_of = {category.id: place for place, category in enumerate(file.categories)}
    else:
        classes = ontology if isinstance(ontology, Ontology) else load_ontology(ontology)
        class_of = _classes_by_category(file.categories, classes, where)
    place = open_storage(images)
    names = _names([image.file for image in file.images], where)
    absent = _absent(place, list(names))
    if absent:
        raise WrongUse(
            "dataset_missing",
            f"{where}: {len(absent):,} of its {len(names):,} images are not in {place.uri}: {shown(absent)}.",
            "Give the folder that holds the images that the JSON names; its file names are relative to it.",
        )
    sizes = {image.id: _size(image, place) for image in file.images}
    instances, left_out = file.instances(class_of, sizes)
    samples = [
        CocoSample(
            name=names[image.file],
            image=place.uri_of(image.file),
            size=sizes[image.id],
            instances=json.dumps(
                [
                    [class_of[one.category_id], int(one.crowd), one.order, one.parts]
                    for one in instances[image.id]
                ],
                separators=(",", ":"),
            ).encode(),
            not_exhaustive=frozenset(
                class_of[category] for category in image.not_exhaustive_category_ids if category in class_of
            ),
        )
        for image in file.images
    ]
    return CocoDataset(
        name=name,
        split=split or path.stem,
        classes=classes,
        samples=tuple(sorted(samples, key=lambda sample: sample.name)),
        identity=f"instances {hashlib.sha256(data).hexdigest()}",
        left_out=left_out,
    )


def open_coco_root(
    root: str | None,
    *,
    split: str = "val2017",
    ontology: Ontology | str | None,
    annotations: str | None = None,
    images: str | None = None,
) -> CocoDataset:
    """``open_coco_json`` with COCO's folder names below ``root`` as defaults."""
    if annotations is None:
        place = SOURCE.open(root, ["annotations"])
        annotations = place.uri_of(f"annotations/instances_{split}.json")
    if images is None:
        place = SOURCE.open(root, [f"images/{split}", split])
        images = place.uri_of(f"images/{split}" if place.exists(f"images/{split}") else split)
    return open_coco_json(annotations, images, ontology=ontology, split=split)


def category_ontology(categories: Sequence[CocoCategory]) -> Ontology:
    """An ontology with a class for every category, in the order given, without background.

    LVIS's underscores become spaces, and a qualifier in parentheses is dropped if the name is unique without
    it: "bus_(vehicle)" becomes "bus", but "bow_(weapon)" and "bow_(decorative_ribbons)" keep theirs.

    Raises:
        MaskMillError: ``ontology_invalid`` if two categories share a name, or there is none.
    """
    names = [spoken_names(category.name) for category in categories]
    short = Counter(name.casefold() for _, name in names)
    return Ontology.from_dict(
        {
            "name": "categories",
            "classes": [brief if short[brief.casefold()] == 1 else full for full, brief in names],
        }
    )


def spoken_names(category: str) -> tuple[str, str]:
    """A category's name in words, with and without LVIS's qualifier in parentheses."""
    full = " ".join(category.replace("_", " ").split())
    return full, full.partition(" (")[0]


def _size(image: CocoImage, place: Storage) -> tuple[int, int]:
    """(H, W): of the file, or of the picture if the file has none."""
    if image.height is not None and image.width is not None:
        return image.height, image.width
    height, width, _ = read_image(place.uri_of(image.file)).shape
    return height, width


def _names(files: Sequence[str], where: str) -> dict[str, str]:
    """Unique names of samples, by file: the path without its suffix, or with it if several would share it."""
    twice = [file for file, count in Counter(files).items() if count > 1]
    if twice:
        raise invalid(where, f"{len(twice):,} files are listed as several images: {shown(twice)}")
    short = {file: str(PurePosixPath(file).with_suffix("")) for file in files}
    shared = Counter(short.values())
    return {file: name if shared[name] == 1 else str(PurePosixPath(file)) for file, name in short.items()}


def _absent(place: Storage, files: Sequence[str]) -> list[str]:
    """Files that are missing or would lie outside ``place``."""
    paths = [PurePosixPath(file) for file in files]
    folders = {
        str(path).rpartition("/")[0] for path in paths if not path.is_absolute() and ".." not in path.parts
    }
    if len(folders) > _FEW_FOLDERS and not place.is_local:
        # One recursive listing instead of a request per folder.
        present = set(place.list(posixpath.commonpath(sorted(folders)), recursive=True))
    else:
        present = {file for folder in folders for file in place.list(folder)}
    return [file for file, path in zip(files, paths, strict=True) if str(path) not in present]


def _classes_by_category(categories: Sequence[CocoCategory], classes: Ontology, where: str) -> dict[str, int]:
    """Class id by category id, for the categories that are in the ontology."""
    class_by_word = {name.casefold(): number for number, name in enumerate(classes.names)}
    for entry in classes.classes:
        for synonym in entry.synonyms:
            class_by_word[synonym.casefold()] = class_by_word[entry.name.casefold()]
    found = {
        category.id: class_by_word[category.name.casefold()]
        for category in categories
        if category.name.casefold() in class_by_word
    }
    absent = [
        name
        for number, name in enumerate(classes.names)
        if number not in found.values() and name != BACKGROUND
    ]
    if absent:
        raise WrongUse(
            "dataset_invalid",
            f"{where} has no category for {len(absent)} classes of {classes.name}: {shown(absent)}.",
            "Give the class its category's name as a synonym, or leave the class out of the ontology. "
            f"Categories: {shown([category.name for category in categories]) or 'none'}.",
        )
    return found
