"""Result folders, read strictly: ``evaluation.json`` and ``benchmark.json`` as typed, checked values.

A result may come from another machine or another year, so a file is checked whole before anything is drawn
from it. Shares are in [0, 1]; what does not exist is None (null or NaN in the file).
"""

from __future__ import annotations

import json
import os
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    ValidationError,
    model_validator,
)

from models.errors import Damaged, WrongUse
from pipeline.files.storage import Storage, open_storage

SCHEMA_VERSION = 1

Number = FiniteFloat | None
Count = NonNegativeInt


class _Record(BaseModel):
    # Fields that a later version adds do not make a file unreadable.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Dataset(_Record):
    """What was measured on."""

    name: str
    split: str | None = None
    images: Count | None = None
    fingerprint: str | None = None


class Model(_Record):
    """What was measured: every field of the recipe, the weights, and whether they are a toy's."""

    recipe: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    toy: bool = False


class ClassResult(_Record):
    """One class: its look and its figures."""

    id: Count
    name: str
    color: Annotated[str, Field(pattern=r"^#[0-9a-fA-F]{6}$")]
    group: str | None = None
    pixels: Count
    iou: Number
    boundary_iou: Number
    accuracy: Number
    precision: Number


class ImageResult(_Record):
    """One image with its score and the picture of it."""

    name: str
    miou: Number
    picture: str | None = None


class Images(_Record):
    """How many images were measured, and the extremes."""

    evaluated: Count
    failed: Count = 0
    missing: Count = 0
    worst: tuple[ImageResult, ...] = ()
    best: tuple[ImageResult, ...] = ()


class Published(_Record):
    """A figure of a paper. It may be put beside ours only if the protocol is the same."""

    method: str
    metric: str
    value: FiniteFloat
    source: str
    protocol: str | None = None


class Evaluation(_Record):
    """``evaluation.json``."""

    kind: Literal["evaluation"]
    title: str
    created: str
    command: str
    protocol: str
    dataset: Dataset
    model: Model
    classes: tuple[ClassResult, ...]
    confusion: tuple[tuple[Count, ...], ...]
    calibration: tuple[tuple[Count, Count, Count], ...] | None = None
    metrics: dict[str, Number]
    images: Images
    published: tuple[Published, ...] = ()

    @model_validator(mode="after")
    def _shapes_agree(self) -> Evaluation:
        count = len(self.classes)
        if len(self.confusion) != count or any(len(row) != count + 1 for row in self.confusion):
            raise ValueError(
                f"the confusion matrix of {count} classes must have {count} × {count + 1} entries"
            )
        return self

    @property
    def toy(self) -> bool:
        """Whether the numbers come from toy weights."""
        return self.model.toy


class Value(_Record):
    """The mean of some runs and the ends of its 95 % interval; those are None where there was one run."""

    mean: Number
    low: Number = None
    high: Number = None


class Row(_Record):
    """One line of a benchmark's table, measured or not."""

    name: str
    series: str | None = None
    x: Number = None
    values: dict[str, Value] = {}
    published: dict[str, Number] = {}
    source: str | None = None
    missing: str | None = None


class Section(_Record):
    """One table; the first of its metrics is the one that is charted."""

    name: str
    title: str
    note: str | None = None
    chart: Literal["bars", "lines"] | None = None
    metrics: Annotated[tuple[str, ...], Field(min_length=1)]
    rows: tuple[Row, ...]


class Claim(_Record):
    """A claim of a paper, and whether it shows here; None: not measured."""

    claim: str
    source: str | None = None
    shows: bool | None
    detail: str | None = None


class Picture(_Record):
    """A picture beside the file."""

    file: str
    caption: str = ""


class Hardware(_Record):
    """What it ran on."""

    cpu: str | None = None
    cores: Count | None = None
    gpu: str | None = None


class Benchmark(_Record):
    """``benchmark.json``."""

    kind: Literal["benchmark"]
    name: str
    title: str
    created: str
    command: str
    hardware: Hardware
    seconds: FiniteFloat | None = None
    toy: bool = False
    sections: tuple[Section, ...]
    claims: tuple[Claim, ...] = ()
    pictures: tuple[Picture, ...] = ()


Result = Evaluation | Benchmark
_FILES: dict[str, type[Evaluation] | type[Benchmark]] = {
    "evaluation.json": Evaluation,
    "benchmark.json": Benchmark,
}


def read_results(folder: str | os.PathLike[str]) -> list[tuple[Storage, Result]]:
    """The results in a folder, at least one: the evaluation, then the benchmark.

    Args:
        folder: the output of ``maskmill evaluate`` or ``maskmill benchmark``, here or remote.

    Returns:
        Pairs of the folder, from which pictures can be read, and the result.

    Raises:
        MaskMillError: ``result_missing``, ``newer_version`` or ``result_damaged``, naming the file.
    """
    storage = open_storage(folder)
    found = [
        (storage, _parse(storage.uri_of(name), storage.read_bytes(name), kind))
        for name, kind in _FILES.items()
        if storage.exists(name)
    ]
    if not found:
        raise WrongUse(
            "result_missing",
            f"There is no {' or '.join(_FILES)} in {storage.uri}.",
            "Give the output folder of maskmill evaluate or maskmill benchmark, or run one of them first.",
        )
    return found


def _parse(place: str, data: bytes, kind: type[Evaluation] | type[Benchmark]) -> Result:
    try:
        # NaN and infinities are not JSON, but Python writes them; they mean the same as null.
        record = json.loads(data, parse_constant=lambda _: None)
        version = record.get("schema_version") if isinstance(record, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise WrongUse(
                "newer_version",
                f"{place} has schema version {version}; this MaskMill reads up to {SCHEMA_VERSION}.",
                "Make the report with the version of MaskMill that made the result, or a later one.",
            )
        return kind.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        reason = f"{field}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    except ValueError as error:
        reason = f"it is not JSON: {error}"
    raise Damaged(
        "result_damaged",
        f"{place} cannot be read as a result. {reason[:1].upper()}{reason[1:]}.",
        "Run the command that made it again, or leave this folder out.",
    )
