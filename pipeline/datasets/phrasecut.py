"""PhraseCut: referring expressions on Visual Genome images (Wu et al., CVPR 2020), read as CLIPSeg does.

A sample is an image with a phrase. Its mask is the union of all polygons of all instances that the phrase
refers to, at the size of the annotation. As in CLIPSeg, images whose size differs from the annotation's
(``EXCLUDED_IMAGES``), phrases whose boxes have no area, and phrases without a parsed structure are skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from models.errors import MaskMillError, WrongUse
from pipeline.datasets.base import Dataset, Labels, Sample, Source, list_files, shown
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
        data = place.read_bytes(file)
    except FileNotFoundError:
        raise SOURCE.missing(place.uri, f"there is no {file}") from None
    sizes = _read_sizes(place)
    images = list_files(place, "images", (".jpg", ".jpeg"))
    try:
        tasks = [task for task in json.loads(data) if _is_used(task)]
        tasks.sort(key=lambda task: int(task["image_id"]))
        wanted = sorted({int(task["image_id"]) for task in tasks})
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
                name=str(task["task_id"]),
                image=place.uri_of(images[str(task["image_id"])]),
                phrase=str(task["phrase"]),
                image_id=int(task["image_id"]),
                size=sizes[int(task["image_id"])],
                polygons=tuple(
                    np.asarray(polygon, np.float64).reshape(-1, 2).tobytes()
                    for instance in task["Polygons"]
                    for polygon in instance
                ),
                attribute=_has(task, "attributes"),
                relation=_has(task, "relation_descriptions"),
            )
            for task in tasks
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise _invalid(place.uri_of(file), error) from error
    return PhraseCutDataset(
        name="phrasecut",
        split=split,
        classes=Ontology.from_dict({"name": "phrase", "classes": ["other", "phrase"]}),
        samples=tuple(samples),
        identity=f"refer {hashlib.sha256(data).hexdigest()}",
    )


def _is_used(task: dict[str, Any]) -> bool:
    area = sum(width * height for _, _, width, height in task["instance_boxes"])
    return (
        int(task["image_id"]) not in EXCLUDED_IMAGES and area > 0 and bool(task.get("phrase_structure", True))
    )


def _has(task: dict[str, Any], part: str) -> bool:
    """Whether ``phrase_structure``, which has name, attributes and relations, has the part."""
    structure = task.get("phrase_structure")
    return isinstance(structure, dict) and bool(structure.get(part))


def _read_sizes(place: Storage) -> dict[int, tuple[int, int]]:
    files = place.glob("image_data_split*.json")
    if not files:
        raise SOURCE.missing(place.uri, "there is no image_data_split.json")
    try:
        rows = json.loads(place.read_bytes(files[0]))
        return {int(row["image_id"]): (int(row["height"]), int(row["width"])) for row in rows}
    except (KeyError, TypeError, ValueError) as error:
        raise _invalid(place.uri_of(files[0]), error) from error


def _invalid(where: str, error: Exception) -> MaskMillError:
    return WrongUse(
        "dataset_invalid",
        f"{where} is not as PhraseCut publishes it ({type(error).__name__}: {error}).",
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
