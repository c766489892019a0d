"""Label Studio: a task for each image, with the labels as brush masks, which people correct.

    label_config.xml   the labelling interface: Settings, Labeling Interface, Code
    tasks.json         to import; the labels are predictions
    images/NAME.jpg    if images are copied

A brush mask is all of a class in an image. Background has no mask; if there is a background, pixels without a
class have one, called "ignored". Images on a disk are served by Label Studio itself: start it with
``LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED=true`` and ``LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT``, which is
this folder if images are copied, else ``/``; and add a folder below as local storage of the project. Images
elsewhere keep their addresses.
"""

from __future__ import annotations

import functools
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, ClassVar, cast
from urllib.parse import quote, unquote

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from models.errors import WrongUse
from pipeline.files.documents import decoded, first_problem, read_document
from pipeline.files.images import MAX_PIXELS
from pipeline.files.storage import Storage, is_remote, open_storage
from pipeline.formats.base import Entry, Imported, ReadSample, Sample, Written
from pipeline.formats.brush import decode_brush, encode_brush
from pipeline.formats.classes import FoundClass, hex_color, ontology_of
from pipeline.formats.jsonfile import encode
from pipeline.formats.labelmap import VOID_COLOR, ignored_name, is_ignored
from pipeline.formats.names import refuse_outside, suffix_of
from pipeline.formats.pictures import image_size
from pipeline.ontology.ontology import BACKGROUND, MAX_CLASSES, Ontology
from pipeline.table.statistics import Labels

CONFIG_FILE = "label_config.xml"
TASKS_FILE = "tasks.json"
IMAGES = "images"
LOCAL_FILES = "/data/local-files/?d="
"""Where Label Studio serves files from its disk."""
FROM_NAME = "label"
TO_NAME = "image"
BRUSH = "brushlabels"


@dataclass(frozen=True)
class LabelStudio:
    """See the module.

    Attributes:
        local_files: what stands before the path of an image on a disk.
        model_version: what Label Studio shows as the author of the labels.
    """

    name: ClassVar[str] = "labelstudio"
    with_images: ClassVar[bool] = False
    with_confidence: ClassVar[bool] = True
    max_classes: ClassVar[int] = MAX_CLASSES

    local_files: str = LOCAL_FILES
    model_version: str = "maskmill"

    def write_part(
        self, part: str, samples: Iterable[Sample], ontology: Ontology, output: Storage
    ) -> Iterator[Written]:
        """See ``Format``."""
        for sample in samples:
            data = {
                "name": sample.name,
                "split": sample.split,
                "source": sample.uri,
                "height": sample.labels.shape[0],
                "width": sample.labels.shape[1],
            }
            if sample.image is not None:
                file = f"{IMAGES}/{sample.name}{sample.suffix}"
                output.write_bytes(file, sample.image)
                data = {"image": self.local_files + quote(file), **data, "file": file}
            elif is_remote(sample.uri):
                data = {"image": sample.uri, **data}
            else:
                data = {"image": self.local_files + quote(sample.uri.lstrip("/")), **data}
            prediction: dict[str, Any] = {
                "model_version": self.model_version,
                "result": list(_regions(sample, ontology)),
            }
            labelled = sample.labels != ontology.ignore_index
            if sample.confidence is not None and labelled.any():
                prediction["score"] = _score(sample.confidence[labelled])
            yield Written({"data": data, "predictions": [prediction]})

    def finish(self, entries: Iterable[Entry], ontology: Ontology, output: Storage) -> Sequence[str]:
        """See ``Format``."""
        output.write_bytes(CONFIG_FILE, _config(ontology))
        with output.new_file(TASKS_FILE) as file:
            between = b"[\n"
            for entry in entries:
                file.write(between + encode(entry))
                between = b",\n"
            file.write(b"[]\n" if between == b"[\n" else b"\n]\n")
        return [TASKS_FILE, CONFIG_FILE]


def _has_background(ontology: Ontology) -> bool:
    return ontology.num_classes > 1 and ontology.names[0].casefold() == BACKGROUND


def _regions(sample: Sample, ontology: Ontology) -> Iterator[dict[str, Any]]:
    background = _has_background(ontology)
    labels = sample.labels
    for number in np.unique(labels).tolist():
        if number == (0 if background else ontology.ignore_index):
            continue
        mask = labels == number
        ignored = number == ontology.ignore_index
        region: dict[str, Any] = {
            "id": f"{sample.number}-{number}",
            "type": BRUSH,
            "from_name": FROM_NAME,
            "to_name": TO_NAME,
            "original_width": labels.shape[1],
            "original_height": labels.shape[0],
            "image_rotation": 0,
            "value": {
                "format": "rle",
                "rle": encode_brush(mask),
                BRUSH: [ignored_name(ontology.names) if ignored else ontology.names[number]],
            },
        }
        if sample.confidence is not None and not ignored:
            region["score"] = _score(sample.confidence[mask])
        yield region


def _score(confidence: np.ndarray) -> float:
    return round(float(confidence.mean()) / 255, 4)


def _config(ontology: Ontology) -> bytes:
    """The labelling interface."""
    shown = [*zip(ontology.names, ontology.palette().tolist(), strict=True)]
    if _has_background(ontology):
        shown = [*shown[1:], (ignored_name(ontology.names), list(VOID_COLOR))]
    view = ElementTree.Element("View")
    ElementTree.SubElement(
        view, "Image", {"name": TO_NAME, "value": "$image", "zoom": "true", "zoomControl": "true"}
    )
    brushes = ElementTree.SubElement(view, "BrushLabels", {"name": FROM_NAME, "toName": TO_NAME})
    for name, color in shown:
        ElementTree.SubElement(brushes, "Label", {"value": name, "background": hex_color(color)})
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode").encode() + b"\n"


# --- reading ---


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Value(_Entry):
    format: str | None = None
    rle: list[int] | None = None
    brushlabels: list[str] = []


class _Region(_Entry):
    type: str
    original_width: int | None = None
    original_height: int | None = None
    value: _Value = _Value()


class _Result(_Entry):
    result: list[_Region] = []
    was_cancelled: bool = False


class _Data(_Entry):
    image: str
    name: str | None = Field(None, min_length=1)
    split: str = "train"
    source: str | None = None
    file: str | None = None
    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)


class _Task(_Entry):
    data: _Data
    annotations: list[_Result] = []
    predictions: list[_Result | int] = []
    """Ids of them, in what Label Studio exports."""

    @property
    def regions(self) -> list[_Region]:
        """The newest annotation's, or else the newest prediction's."""
        made = [one for one in self.annotations if not one.was_cancelled]
        made = made or [one for one in self.predictions if isinstance(one, _Result)]
        return made[-1].result if made else []


def read_labelstudio(place: str, *, images: str | None = None, annotated: bool = False) -> Imported:
    """Read tasks of Label Studio with brush masks: what ``LabelStudio`` wrote, or what Label Studio exported.

    The newest annotation of a task counts, and if there is none, the newest prediction. Where masks overlap,
    the later one is in front.

    Args:
        place: path or URI of the folder with ``tasks.json`` and ``label_config.xml``, or of another JSON file
            beside a ``label_config.xml``.
        images: folder of the images.
        annotated: only tasks that a person has submitted; predictions do not count.

    Raises:
        MaskMillError: ``dataset_missing``, ``dataset_invalid``, ``ontology_invalid``.
    """
    folder, name = place, TASKS_FILE
    if place.lower().endswith(".json"):
        folder, _, name = place.rpartition("/")
    storage = open_storage(folder or ".")
    names, colors = _read_config(storage)
    background = len(names) > 1 and is_ignored(names[-1])
    found = list(map(FoundClass, names, colors))
    if background:
        found = [FoundClass(BACKGROUND), *found[:-1]]
    ontology = ontology_of("labelstudio", found, where=storage.uri_of(CONFIG_FILE))
    if not storage.exists(name):
        raise _missing(storage, name)
    return Imported(
        ontology, _Samples(storage, name, ontology, names[-1] if background else None, images, annotated)
    )


def _read_config(storage: Storage) -> tuple[list[str], list[tuple[int, ...] | None]]:
    """Names and colours of the labels."""
    where = storage.uri_of(CONFIG_FILE)
    try:
        text = decoded(
            read_document(storage, CONFIG_FILE, code="dataset_invalid"), where, code="dataset_invalid"
        )
    except FileNotFoundError:
        raise _missing(storage, CONFIG_FILE) from None
    try:
        labels = ElementTree.fromstring(text).findall(".//BrushLabels/Label")
    except ElementTree.ParseError as error:
        raise WrongUse("dataset_invalid", f"{where}: not valid XML: {error}.", "Correct the file.") from None
    if not labels:
        raise WrongUse("dataset_invalid", f"{where} has no <Label> in <BrushLabels>.", "Give the right file.")
    colors = [re.fullmatch(r"#([0-9a-fA-F]{6})", label.get("background", "")) for label in labels]
    return (
        [label.get("value", "") for label in labels],
        [tuple(bytes.fromhex(color[1])) if color else None for color in colors],
    )


@dataclass(frozen=True)
class _Samples:
    """The samples of a file of tasks; may be iterated again.

    Attributes:
        ignored: the label of pixels without a class; None if they have no mask, and background neither.
    """

    storage: Storage
    file: str
    ontology: Ontology
    ignored: str | None
    images: str | None
    annotated: bool = False

    @cached_property
    def _ids(self) -> dict[str, int]:
        ids = {name: number for number, name in enumerate(self.ontology.names)}
        return ids if self.ignored is None else {**ids, self.ignored: self.ontology.ignore_index}

    def __iter__(self) -> Iterator[ReadSample]:
        where = self.storage.uri_of(self.file)
        for number, raw in enumerate(_listed(self.storage, self.file)):
            title = f"{where}: task {number + 1}"
            try:
                task = _Task.model_validate(raw)
            except ValidationError as error:
                raise _invalid(title, first_problem(error)) from None
            if self.annotated and all(one.was_cancelled for one in task.annotations):
                continue
            name = task.data.name or _name_of(task.data.image)
            uri = self._uri(task.data, name, title)
            yield ReadSample(
                number=number,
                id=number,
                name=name,
                uri=uri,
                suffix=suffix_of(uri),
                split=task.data.split,
                read=functools.partial(self._labels, task, uri, title),
            )

    def _uri(self, data: _Data, name: str, title: str) -> str:
        if self.annotated and data.source is not None:
            return data.source  # to be found again, not to be read
        if self.images is not None:
            suffix = suffix_of(data.source or data.image)
            return open_storage(self.images).uri_of(refuse_outside(f"{name}{suffix}", title))
        if data.file is not None:
            return self.storage.uri_of(refuse_outside(data.file, title))
        if data.source is not None:
            return data.source
        local = data.image.partition(LOCAL_FILES)
        return f"/{unquote(local[2])}" if local[1] else data.image

    def _labels(self, task: _Task, uri: str, title: str) -> Labels:
        regions = task.regions
        sizes = {(one.original_height, one.original_width) for one in regions}
        if task.data.height is not None:
            sizes.add((task.data.height, task.data.width))
        if len(sizes) > 1:
            raise _invalid(title, f"its masks are of different sizes: {sorted(map(str, sizes))}")
        height, width = next(iter(sizes), (None, None))
        if height is None or width is None:
            height, width = image_size(uri)
        if height < 1 or width < 1 or height * width > MAX_PIXELS:
            raise _invalid(title, f"{height} x {width} pixels are not the size of an image that is read here")
        unlabelled = self.ontology.ignore_index if self.ignored is None else 0
        labels = np.full((height, width), unlabelled, self.ontology.mask_dtype)
        for one in regions:
            if one.type != BRUSH or one.value.rle is None:
                raise _invalid(title, f"a region of type {one.type}; only brush masks are read")
            label = one.value.brushlabels[0] if len(one.value.brushlabels) == 1 else None
            if label not in self._ids:
                raise _invalid(
                    title, f"a mask of {one.value.brushlabels}, which is no label of {CONFIG_FILE}"
                )
            try:
                labels[decode_brush(one.value.rle, height, width)] = self._ids[label]
            except ValueError as error:
                raise _invalid(title, f"the mask of {label}: {error}") from None
        return cast(Labels, labels)


def _name_of(image: str) -> str:
    path = unquote(image.partition(LOCAL_FILES)[2] or re.split(r"[?#]", image, maxsplit=1)[0])
    return PurePosixPath(path).stem or "image"


def _listed(storage: Storage, name: str) -> Iterator[Any]:
    """The items of a JSON list, one by one: a mask takes ten times its text as a list of Python's numbers."""
    where = storage.uri_of(name)
    text = decoded(read_document(storage, name, code="dataset_invalid"), where, code="dataset_invalid")
    decoder = json.JSONDecoder()
    blank = re.compile(r"\s*")
    place = blank.match(text).end()  # type: ignore[union-attr]
    if not text.startswith("[", place):
        raise _invalid(where, "it is not a list of tasks")
    place, first = place + 1, True
    while True:
        place = blank.match(text, place).end()  # type: ignore[union-attr]
        if text.startswith("]", place):
            return
        if not first and text.startswith(",", place):
            place = blank.match(text, place + 1).end()  # type: ignore[union-attr]
        elif not first:
            raise _invalid(where, f"not valid JSON at character {place}")
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise _invalid(where, f"not valid JSON: {error}") from None
        first = False
        yield value


def _invalid(where: str, why: str) -> WrongUse:
    return WrongUse("dataset_invalid", f"{where}: {why}.", "Correct the file, or export it again.")


def _missing(storage: Storage, what: str) -> WrongUse:
    return WrongUse(
        "dataset_missing",
        f"There is no {what} in {storage.uri}.",
        f"Give the folder with {TASKS_FILE} and {CONFIG_FILE}, the labelling interface of the project.",
    )
