"""PhraseCut: referring expressions on Visual Genome images (Wu et al., CVPR 2020), read as CLIPSeg does.

A sample is an image with a phrase. Its mask is the union of all polygons of all instances that the phrase
refers to, at the size of the annotation. As in CLIPSeg, images whose size differs from the annotation's
(``EXCLUDED_IMAGES``), phrases whose boxes have no area, and phrases without a parsed structure are skipped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from models.errors import MaskMillError, WrongUse
from pipeline.datasets.base import Counts, Dataset, Labels, Sample, Source, list_files, shown
from pipeline.files.documents import first_problem, json_kind, parsed_json, read_document
from pipeline.files.images import MAX_PIXELS
from pipeline.files.storage import Storage
from pipeline.ontology.ontology import Ontology

#: Visual Genome ids of images whose size differs from that of their annotation.
EXCLUDED_IMAGES: Final = frozenset(
    {
        150417, 285665, 498246, 61564, 285743, 498269, 498010, 150516, 150344, 286093, 61530, 150333,
        286065, 285814, 498187, 285761, 498042,
    }
)  # fmt: skip

SOURCE = Source(
    "PhraseCut",
    "https://github.com/ChenyunWu/PhraseCutDataset",
    """\
VGPhraseCut_v0/
  refer_train.json, refer_val.json, refer_test.json, refer_miniv.json
  image_data_split.json     (or image_data_split3000.json: sizes of the images)
  images/2318311.jpg ...""",
)


_Kind = TypeVar("_Kind", bound=BaseModel)


@dataclass(frozen=True)
class PhraseSample(Sample):
    """An image and a phrase; the name is PhraseCut's task id.

    Attributes:
        phrase: the referring expression, as written.
        image_id: Visual Genome id; several samples may share an image.
        attribute: the phrase has an attribute ("red").
        relation: the phrase has a relation ("on the table").
        size: (H, W) of the annotation.
        polygons: one polygon each, float64 x, y pairs as bytes.
    """

    phrase: str = ""
    image_id: int = 0
    size: tuple[int, int] = (0, 0)
    polygons: tuple[bytes, ...] = ()
    attribute: bool = False
    relation: bool = False


@dataclass(frozen=True)
class PhraseCutDataset(Dataset):
    """Samples are ``PhraseSample``; the truth is 1 where the phrase applies and 0 elsewhere."""

    @property
    def phrases(self) -> tuple[str, ...]:
        """The phrases, in the order of ``samples``."""
        return tuple(sample.phrase for sample in self.samples if isinstance(sample, PhraseSample))

    def truth(self, sample: Sample) -> Labels:
        """uint8 (H, W), 1 where the phrase applies."""
        assert isinstance(sample, PhraseSample)
        mask = np.zeros(sample.size, np.bool_)
        for polygon in sample.polygons:
            fill_polygon(mask, np.frombuffer(polygon).reshape(-1, 2))
        return mask.astype(np.uint8)


def open_phrasecut(root: str | None, *, split: str = "test") -> PhraseCutDataset:
    """PhraseCut, sorted by image id, with the phrases of an image in file order.

    Args:
        root: the folder ``VGPhraseCut_v0`` or its parent.
        split: ``train``, ``val``, ``test`` or ``miniv``.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``.
    """
    place = SOURCE.open(root, ["images"], ["VGPhraseCut_v0"])
    file = f"refer_{split}.json"
    try:
        data = read_document(place, file, code="dataset_invalid")
    except FileNotFoundError:
        raise SOURCE.missing(place.uri, f"there is no {file}") from None
    sizes = _read_sizes(place)
    images = list_files(place, "images", (".jpg", ".jpeg"))
    counts = Counts()
    tasks = [task for task in _entries(_Task, data, place.uri_of(file)) if _is_used(task, counts)]
    tasks.sort(key=lambda task: task.image_id)
    wanted = sorted({task.image_id for task in tasks})
    absent = [number for number in wanted if str(number) not in images or number not in sizes]
    if absent:
        raise WrongUse(
            "dataset_missing",
            f"PhraseCut in {place.uri}: {len(absent):,} of {len(wanted):,} images of {split} are missing "
            f"in images/ or in image_data_split.json ({shown(absent)}).",
            f"Complete the folder. The layout is\n\n{SOURCE.layout}",
        )
    samples = [
        PhraseSample(
            name=task.task_id,
            image=place.uri_of(images[str(task.image_id)]),
            phrase=task.phrase,
            image_id=task.image_id,
            size=sizes[task.image_id],
            polygons=tuple(
                np.asarray(polygon, np.float64).reshape(-1, 2).tobytes()
                for instance in task.Polygons
                for polygon in instance
            ),
            attribute=task.has("attributes"),
            relation=task.has("relation_descriptions"),
        )
        for task in tasks
    ]
    return PhraseCutDataset(
        name="phrasecut",
        split=split,
        classes=Ontology.from_dict({"name": "phrase", "classes": ["other", "phrase"]}),
        samples=tuple(samples),
        identity=f"refer {hashlib.sha256(data).hexdigest()}",
        left_out=counts.left_out(),
    )


# Filling takes memory for every corner and row of pixels.
_Polygon = Annotated[list[tuple[FiniteFloat, FiniteFloat]], Field(max_length=10_000)]


class _Task(BaseModel):
    """An entry of ``refer_SPLIT.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore", coerce_numbers_to_str=True)

    task_id: str
    image_id: int
    phrase: str
    instance_boxes: list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]]
    Polygons: list[list[_Polygon]]
    phrase_structure: Any = True

    def has(self, part: str) -> bool:
        """Whether ``phrase_structure``, which has name, attributes and relations, has the part."""
        return isinstance(self.phrase_structure, dict) and bool(self.phrase_structure.get(part))


class _Size(BaseModel):
    """An entry of ``image_data_split.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    image_id: int
    height: Annotated[int, Field(ge=1, le=MAX_PIXELS)]
    width: Annotated[int, Field(ge=1, le=MAX_PIXELS)]

    @model_validator(mode="after")
    def _fits_memory(self) -> _Size:
        if self.height * self.width > MAX_PIXELS:
            raise ValueError(f"{self.height} x {self.width} pixels exceed the limit of {MAX_PIXELS:,}")
        return self


def _is_used(task: _Task, counts: Counts) -> bool:
    if task.image_id in EXCLUDED_IMAGES:
        counts.add("phrase on an image whose size differs from that of its annotation", task.task_id)
    elif sum(width * height for _, _, width, height in task.instance_boxes) <= 0:
        counts.add("phrase whose boxes have no area", task.task_id)
    elif not task.phrase_structure:
        counts.add("phrase without a parsed structure", task.task_id)
    else:
        return True
    return False


def _read_sizes(place: Storage) -> dict[int, tuple[int, int]]:
    files = place.glob("image_data_split*.json")
    if not files:
        raise SOURCE.missing(place.uri, "there is no image_data_split.json")
    rows = _entries(_Size, read_document(place, files[0], code="dataset_invalid"), place.uri_of(files[0]))
    return {row.image_id: (row.height, row.width) for row in rows}


def _entries(kind: type[_Kind], data: bytes, where: str) -> Iterator[_Kind]:
    """The entries of a JSON list, checked."""
    content = parsed_json(data, where, code="dataset_invalid")
    if not isinstance(content, list):
        raise _invalid(where, f"it holds {json_kind(content)}, not a list")
    for place, raw in enumerate(content, 1):
        try:
            yield kind.model_validate(raw)
        except ValidationError as error:
            raise _invalid(where, f"entry {place:,}, {first_problem(error)}") from None


def _invalid(where: str, why: str) -> MaskMillError:
    return WrongUse(
        "dataset_invalid",
        f"{where} is not as PhraseCut publishes it: {why}.",
        f"Get the file again from {SOURCE.home}.",
    )


def fill_polygon(
    mask: npt.NDArray[np.bool_], points: npt.NDArray[np.float64] | Sequence[Sequence[float]]
) -> None:
    """Set the pixels whose centres, at integer (x, y), lie in a polygon or on its outline.

    Uses the even-odd rule with the outline included, as ``skimage.draw.polygon2mask`` does.

    Args:
        mask: bool (H, W), modified in place.
        points: x and y of the n corners in pixels, (n, 2); may lie outside the mask.
    """
    height = mask.shape[0]
    corners = np.asarray(points, np.float64)
    if not len(corners):
        return
    x, y = corners[:, 0], corners[:, 1]
    next_x, next_y = np.roll(x, -1), np.roll(y, -1)
    top, bottom = np.minimum(y, next_y), np.maximum(y, next_y)
    rows = np.arange(max(0, int(np.ceil(y.min()))), min(height - 1, int(np.floor(y.max()))) + 1)
    if not len(rows):
        return
    line = rows[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = x + (line - y) * (next_x - x) / (next_y - y)
    # The interior just below and just above each row; together they include the outline.
    for crossed in ((top <= line) & (line < bottom), (top < line) & (line <= bottom)):
        crossings = np.sort(np.where(crossed, at, np.inf), axis=1)
        crossings = crossings[:, : int(crossed.sum(axis=1).max(initial=0))]
        _fill_spans(mask, np.repeat(rows, crossings.shape[1] // 2), crossings[:, 0::2], crossings[:, 1::2])
    flat = (y == next_y) & (y == np.floor(y)) & (y >= 0) & (y < height)
    _fill_spans(mask, y[flat].astype(np.intp), np.minimum(x, next_x)[flat], np.maximum(x, next_x)[flat])


def _fill_spans(
    mask: npt.NDArray[np.bool_],
    rows: npt.NDArray[np.intp],
    start: npt.NDArray[np.float64],
    end: npt.NDArray[np.float64],
) -> None:
    """Set columns ceil(start) to floor(end) of each row; skip spans that start at infinity."""
    start, end = start.ravel(), end.ravel()
    real = np.isfinite(start)
    rows, start, end = rows[real], start[real], end[real]
    width = mask.shape[1]
    first = np.clip(np.ceil(start), 0, width).astype(np.intp)
    last = np.clip(np.floor(end) + 1, 0, width).astype(np.intp)
    for row, low, high in zip(rows, first, last, strict=True):
        mask[row, low:high] = True
