"""A COCO JSON file, checked entry by entry: images, categories and instances with their segmentations.

Ids are compared as text, so that 7, 7.0 and "7" are one id. Missing annotation ids are made up, missing sizes
are those of the pictures. An annotation that cannot be drawn for sure is an error; what the file gives for
nothing, such as annotations of images that it does not list, is counted.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from models.errors import MaskMillError, WrongUse
from pipeline.datasets.base import Counts, LeftOut
from pipeline.files.documents import first_problem, json_kind, parsed_json
from pipeline.files.images import MAX_PIXELS
from pipeline.formats.segmentation import Parts, checked


def _id(value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is not an id")
    return str(value).strip()


def _name(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a name")
    name = " ".join(unicodedata.normalize("NFC", str(value)).split())
    if not name:
        raise ValueError("the name is empty")
    return name


Id = Annotated[str, BeforeValidator(_id)]
Side = Annotated[int, Field(ge=1)]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class CocoCategory(_Entry):
    """A category; the name without blanks around it."""

    id: Id
    name: Annotated[str, BeforeValidator(_name)]


class CocoImage(_Entry):
    """An image as the file describes it; LVIS has ``coco_url`` instead of ``file_name``."""

    id: Id
    file_name: Annotated[str, Field(min_length=1)] | None = None
    coco_url: str | None = None
    height: Side | None = None
    width: Side | None = None
    not_exhaustive_category_ids: tuple[Id, ...] = ()

    @property
    def file(self) -> str:
        """Path relative to the folder of images."""
        return self.file_name or "/".join((self.coco_url or "").split("/")[-2:])


class _Annotation(_Entry):
    id: Id | None = None
    image_id: Id
    category_id: Id
    iscrowd: bool | None = None
    segmentation: Any = None


@dataclass(frozen=True)
class Instance:
    """An annotation that can be drawn.

    Attributes:
        category_id: its category.
        crowd: ``iscrowd``.
        order: decides between instances of one size: the id if it is a number, else the place in the file.
        parts: the checked segmentation.
    """

    category_id: str
    crowd: bool
    order: int
    parts: Parts


@dataclass(frozen=True)
class CocoFile:
    """What a COCO JSON file holds.

    Attributes:
        where: the file, for errors.
        categories: sorted by id, numbers first.
        images: in the order of the file.
    """

    where: str
    categories: tuple[CocoCategory, ...]
    images: tuple[CocoImage, ...]
    _annotations: list[Any]

    def instances(
        self, taken: Container[str], sizes: Mapping[str, tuple[int, int]]
    ) -> tuple[dict[str, list[Instance]], tuple[LeftOut, ...]]:
        """Check the annotations.

        Args:
            taken: ids of the categories whose instances are wanted. Segmentations of others are not checked.
            sizes: (H, W) by image id.

        Returns:
            The instances by image id, in the order of the file, and what is not among them.

        Raises:
            MaskMillError: ``dataset_invalid``, naming the annotation.
        """
        names = {category.id: category.name for category in self.categories}
        found: dict[str, list[Instance]] = {image.id: [] for image in self.images}
        counts = Counts()
        for place, raw in enumerate(self._annotations, 1):
            one = _entry(_Annotation, raw, "annotation", place, self.where)
            title = _title("annotation", one.id, place)
            if one.category_id not in names:
                counts.add(
                    "annotation of a category that the file does not list", f"{title}: {one.category_id}"
                )
            elif one.image_id not in found:
                reason = "annotation of an image that the file does not list"
                counts.add(reason, f"{title}: {one.image_id}")
            elif one.category_id not in taken:
                counts.add("annotation of a category that is no class here", names[one.category_id])
            elif not one.segmentation:
                raise invalid(self.where, f"{title} has no segmentation, only a box")
            else:
                try:
                    parts = checked(one.segmentation, *sizes[one.image_id])
                except ValueError as error:
                    raise invalid(self.where, f"{title}: its segmentation cannot be drawn: {error}") from None
                if not parts:
                    counts.add("annotation without an area", title)
                    continue
                order = int(one.id) if one.id is not None and one.id.isdecimal() else place
                found[one.image_id].append(Instance(one.category_id, bool(one.iscrowd), order, parts))
        return found, counts.left_out()


_M = TypeVar("_M", CocoCategory, CocoImage, _Annotation)
_Listed = TypeVar("_Listed", CocoCategory, CocoImage)


def read_coco(data: bytes, where: str) -> CocoFile:
    """Read a file and check all but its annotations.

    Args:
        data: the file.
        where: its name, for errors.

    Raises:
        MaskMillError: ``dataset_invalid``, naming the entry.
    """
    content = parsed_json(data, where, code="dataset_invalid")
    if not isinstance(content, dict):
        raise invalid(where, f"it holds {json_kind(content)}, not COCO JSON")
    for key in ("images", "categories", "annotations"):
        if not isinstance(content.get(key), list):
            raise invalid(where, f"it is not COCO JSON: it has no list {key!r}")
    categories = _listed(CocoCategory, content["categories"], "category", where)
    images = _listed(CocoImage, content["images"], "image", where)
    if not images:
        raise invalid(where, "it lists no images")
    for image in images:
        if "\0" in image.file or not PurePosixPath(image.file).name:
            raise invalid(where, f"image {image.id} has no file_name")
        if (image.height or 1) * (image.width or 1) > MAX_PIXELS:
            raise invalid(
                where,
                f"image {image.id} of {image.height} x {image.width} pixels exceeds the limit of "
                f"{MAX_PIXELS:,} pixels",
            )
    return CocoFile(where, tuple(sorted(categories, key=_numbers_first)), images, content["annotations"])


def _listed(kind: type[_Listed], entries: list[Any], word: str, where: str) -> tuple[_Listed, ...]:
    found: dict[str, _Listed] = {}
    for place, raw in enumerate(entries, 1):
        entry = _entry(kind, raw, word, place, where)
        if entry.id in found:
            raise invalid(where, f"two entries have the id of {word} {entry.id}")
        found[entry.id] = entry
    return tuple(found.values())


def _entry(kind: type[_M], raw: Any, word: str, place: int, where: str) -> _M:
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        given = raw.get("id") if isinstance(raw, dict) else None
        title = _title(word, None if given is None else str(given), place)
        raise invalid(where, f"{title}: {first_problem(error)}") from None


def _title(word: str, number: str | None, place: int) -> str:
    """How messages call an entry: by its id, or by its place from 1."""
    return f"{word} {number}" if number is not None else f"{word} at place {place:,}"


def _numbers_first(category: CocoCategory) -> tuple[bool, int, str]:
    number = category.id
    return (False, int(number), "") if number.isdecimal() else (True, 0, number)


def invalid(where: str, why: str) -> MaskMillError:
    """``dataset_invalid`` for a COCO JSON file."""
    return WrongUse(
        "dataset_invalid",
        f"{where}: {why}.",
        "Correct the file; the format is described at https://cocodataset.org/#format-data.",
    )
