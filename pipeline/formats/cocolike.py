"""What the relatives of COCO JSON share: a file a split with images, annotations and categories.

    annotations/PREFIX_SPLIT.json
    images/SPLIT/NAME.jpg           if images are copied

Category ids are class ids + 1, image ids row numbers + 1: 0 means "none" to some readers. ``file_name`` is
relative to the folder of the split, or of the source if images are not copied, ``coco_url`` the address that
the image was labelled from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import MaskMillError, WrongUse
from pipeline.files.documents import first_problem, parsed_json, read_document
from pipeline.files.images import MAX_PIXELS
from pipeline.files.storage import Storage, is_remote, open_storage
from pipeline.formats.base import ReadSample, Sample
from pipeline.formats.classes import FoundClass
from pipeline.formats.masks import shown
from pipeline.formats.names import refuse_outside, suffix_of
from pipeline.table.statistics import Labels

_M = TypeVar("_M", bound=BaseModel)

Side = Annotated[int, Field(ge=1, le=MAX_PIXELS)]
_Channel = Annotated[int, Field(ge=0, le=255)]


def image_entry(sample: Sample) -> dict[str, Any]:
    """The entry of an image."""
    height, width = sample.labels.shape
    return {
        "id": sample.number + 1,
        "file_name": _file_name(sample),
        "height": height,
        "width": width,
        "coco_url": sample.uri,
    }


def _file_name(sample: Sample) -> str:
    """That of the copy, or what the source calls the image if it stays there: ids are in our names only."""
    ours = f"{sample.name}{sample.suffix}"
    theirs = "/".join(sample.uri.split("/")[-1 - sample.name.count("/") :])
    stem = theirs[: -len(sample.suffix)]
    same = stem in (sample.name, re.sub(r"-[0-9a-f]{16}$", "", sample.name))
    return theirs if sample.image is None and same and theirs.lower().endswith(sample.suffix) else ours


def copy_image(sample: Sample, output: Storage) -> None:
    """Write the image to its place, if it is to be copied."""
    if sample.image is not None:
        output.write_bytes(f"images/{sample.split}/{sample.name}{sample.suffix}", sample.image)


class Model(BaseModel):
    """An entry; what else it holds is passed over."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Category(Model):
    id: int
    name: str
    isthing: bool | None = None
    color: tuple[_Channel, _Channel, _Channel] | None = None


class CocoImage(Model):
    """An image; ``ignored`` as in ``coco``."""

    id: int
    file_name: str
    height: Side
    width: Side
    coco_url: str | None = None
    ignored: Any = None

    @property
    def size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width


class CocoAnnotation(Model):
    """A segment of an image."""

    image_id: int
    category_id: int
    iscrowd: bool | None = None
    segmentation: Any = None


class _File(Model):
    images: list[Any]
    annotations: list[Any]
    categories: list[Any]


def left_out(splits: Sequence[CocoSplit]) -> list[str]:
    """What is to be said of annotations that belong to no image; see ``Imported.left_out``."""
    return [
        f"{split.where}: {len(split.strays):,} annotations left out, of images that the file does not list: "
        f"number {shown(split.strays)}"
        for split in splits
        if split.strays
    ]


@dataclass(frozen=True)
class CocoSplit:
    """A JSON file, checked but for its annotations.

    Attributes:
        place: the dataset.
        name: of the file, within ``place``.
        split: what follows the prefix in its name.
        classes: by category id, ascending.
        images: by image id.
        annotations: as in the file.
        folder: of the images, path or URI; None if they are where ``coco_url`` says.
        strays: places in the file, from 1, of annotations of images that it does not list, once ``by_image``
            has looked.
    """

    place: Storage
    name: str
    split: str
    classes: Mapping[int, FoundClass]
    images: Mapping[int, CocoImage]
    annotations: Sequence[Any]
    folder: Storage | None
    strays: list[int] = field(default_factory=list)

    @property
    def where(self) -> str:
        """The file, for errors."""
        return self.place.uri_of(self.name)

    def by_image(self) -> dict[int, list[tuple[int, CocoAnnotation]]]:
        """The annotations of each image, with their places in the file, from 1.

        Those of images that are not listed are left out.

        Raises:
            MaskMillError: ``dataset_invalid``, also for a category that is not listed.
        """
        found: dict[int, list[tuple[int, CocoAnnotation]]] = {image_id: [] for image_id in self.images}
        self.strays.clear()
        for place, raw in enumerate(self.annotations, 1):
            one = parsed(CocoAnnotation, raw, title(place), self.where)
            if one.category_id not in self.classes:
                raise invalid(self.where, f"{title(place)} is of a category that the file does not list")
            if one.image_id in found:
                found[one.image_id].append((place, one))
            else:
                self.strays.append(place)
        return found

    def sample(self, number: int, image: CocoImage, read: Callable[[], Labels]) -> ReadSample:
        """A sample of this split."""
        file = refuse_outside(image.file_name, self.where)
        if self.folder is None and image.coco_url and _is_address(image.coco_url):
            uri = image.coco_url
        else:
            uri = (self.folder or self.place).uri_of(file)
        return ReadSample(
            number=number,
            id=number,
            name=file.removesuffix(PurePosixPath(file).suffix),
            uri=uri,
            suffix=suffix_of(file),
            split=self.split,
            read=read,
        )


def open_place(place: str) -> tuple[Storage, str | None]:
    """A dataset given by its folder, or by one JSON file: the folder, and the name of the file."""
    folder, _, name = place.rpartition("/")
    if not name.lower().endswith(".json"):
        return open_storage(place), None
    storage = open_storage(folder or ("/" if place.startswith("/") else "."))
    # A folder may have such a name, too.
    return (open_storage(place), None) if storage.fs.isdir(storage.path(name)) else (storage, name)


def read_splits(
    place: Storage, prefix: str, format_name: str, images: str | None, *, file: str | None = None
) -> list[CocoSplit]:
    """Read the JSON files in ``annotations``, or in the folder itself, whose names begin with ``prefix``.

    Args:
        place: the dataset.
        file: read this file of the folder alone, whatever its name.
        prefix: of their names.
        format_name: for errors.
        images: folder of the images, or of folders of splits, if they are elsewhere.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``.
    """
    names = [] if file is None else [file]
    for folder in ("annotations", "") if file is None else ():
        start = f"{folder}/{prefix}".lstrip("/")
        names = [name for name in place.list(folder) if name.startswith(start) and name.endswith(".json")]
        if names:
            break
    if not names or not place.exists(names[0]):
        what = file or f"annotations/{prefix}….json"
        raise WrongUse(
            "dataset_missing",
            f"There is no {what} in {place.uri}.",
            f"Give the folder of a dataset in the format {format_name}, or another --format.",
        )
    splits = [_read_split(place, name, prefix, images) for name in names]
    for split in splits:
        if split.classes != splits[0].classes:
            raise invalid(split.where, f"its categories are not those of {splits[0].where}")
    return splits


def _read_split(place: Storage, name: str, prefix: str, images: str | None) -> CocoSplit:
    where = place.uri_of(name)
    raw = parsed_json(read_document(place, name, code="dataset_invalid"), where, code="dataset_invalid")
    content = parsed(_File, raw, "the file", where)
    categories = [parsed(_Category, one, "a category", where) for one in content.categories]
    found = [parsed(CocoImage, one, "an image", where) for one in content.images]
    classes = {
        one.id: FoundClass(
            one.name, one.color, None if one.isthing is None else "thing" if one.isthing else "stuff"
        )
        for one in sorted(categories, key=lambda category: category.id)
    }
    by_id = {one.id: one for one in found}
    if len(classes) < len(categories) or len(by_id) < len(found):
        raise invalid(where, "two images, or two categories, have one id")
    for one in found:
        if one.height * one.width > MAX_PIXELS:
            raise invalid(where, f"image {one.id} of {one.height} x {one.width} pixels is too large")
    split = PurePosixPath(name).name.removeprefix(prefix).removesuffix(".json")
    root = place if images is None else open_storage(images)
    folders = [f"images/{split}", split] if images is None else [split, ""]
    folder = next((root.child(one) if one else root for one in folders if not one or root.exists(one)), None)
    return CocoSplit(place, name, split, classes, by_id, content.annotations, folder)


def title(place: int) -> str:
    """What errors call an annotation."""
    return f"the annotation at place {place:,}"


def _is_address(uri: str) -> bool:
    return is_remote(uri) or uri.startswith("/")


def parsed(kind: type[_M], entry: Any, what: str, where: str) -> _M:
    """An entry of a file as its model.

    Raises:
        MaskMillError: ``dataset_invalid``, naming the entry and the field.
    """
    try:
        return kind.model_validate(entry)
    except ValidationError as error:
        raise invalid(where, f"{what}: {first_problem(error)}") from None


def invalid(where: str, why: str) -> MaskMillError:
    """``dataset_invalid`` for a file."""
    return WrongUse("dataset_invalid", f"{where}: {why}.", "Correct the file, or get it again.")
