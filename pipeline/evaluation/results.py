"""Result folders: what an evaluation or a benchmark leaves behind, as JSON and pictures.

``evaluation.json`` and ``benchmark.json`` are written and read by the models of this module. Shares are in
[0, 1], counts are integers, and what does not exist is null. A result may come from another machine or
another year, so a file is checked whole before anything is drawn from it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    NonNegativeInt,
    field_validator,
    model_validator,
)

from models.errors import MaskMillError, WrongUse
from pipeline.files.outputs import check_output_folder
from pipeline.files.records import find_record, now
from pipeline.files.redaction import command_line, redact_tree
from pipeline.files.storage import Storage, canonical_uri, is_remote, open_storage
from pipeline.labelling.recipes import recipe_from_dict
from pipeline.metrics.calibration import binned
from pipeline.metrics.names import PER_CLASS
from pipeline.metrics.statistics import summarise, summarise_classes

if TYPE_CHECKING:
    from pipeline.evaluation.classes import ClassMatch
    from pipeline.evaluation.tables import Evaluation, ImageScore
    from pipeline.table.views import View

SCHEMA_VERSION = 1
EVALUATION_FILE, BENCHMARK_FILE = "evaluation.json", "benchmark.json"
IMAGES_FILE = "images.parquet"
"""Counts of every image; see ``pipeline.evaluation.images``."""
REPORT_FILE = "report.html"
PICTURES, ROWS, SCENES = "pictures", "rows", "scenes"
_MARKER = ".maskmill-result"


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[float | None, BeforeValidator(_finite)]
"""NaN and infinities are not JSON, but Python writes them; they mean the same as null."""
Count = NonNegativeInt


class _Record(BaseModel):
    # Fields that a later version adds do not make a file unreadable.
    model_config = ConfigDict(frozen=True, extra="ignore")


class MeasuredDataset(_Record):
    """What was measured on.

    Attributes:
        name: of the dataset.
        split: the part of it.
        images: how many it has.
        fingerprint: of its names; see ``pipeline.datasets.base.Dataset.fingerprint``.
        content: of the images that were compared and their truth, whatever their order and folder; see
            ``pipeline.evaluation.images.set_digest``. None in results of older versions.
        has_truth: False if the "truth" is the labels of a teacher: the figures are then agreement with it.
    """

    name: str
    split: str | None = None
    images: Count | None = None
    fingerprint: str | None = None
    content: str | None = None
    has_truth: bool = True


class MeasuredModel(_Record):
    """What was measured: every field of the recipe, the weights, and whether they are a toy's."""

    recipe: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    toy: bool = False

    @field_validator("recipe")
    @classmethod
    def _as_written_today(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        # Older versions wrote all fields flat: a comparison would call each of them changed.
        try:
            known = recipe_from_dict(recipe)
        except MaskMillError:
            return recipe  # with fields of a version that is not this one
        return known.to_dict() | {key: recipe[key] for key in ("hash",) if key in recipe}


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
    """How many images were measured, what was left out and why, and the extremes."""

    evaluated: Count
    failed: Count = 0
    missing: Count = 0
    left_out: tuple[str, ...] = ()
    worst: tuple[ImageResult, ...] = ()
    best: tuple[ImageResult, ...] = ()


class Published(_Record):
    """A figure of a paper. It may be put beside ours only if the protocol is the same."""

    method: str
    metric: str
    value: FiniteFloat
    source: str
    protocol: str | None = None


class ComparedClass(_Record):
    """A measured class, and the classes of labels and truth that it is made of."""

    name: str
    labels: tuple[str, ...]
    truth: tuple[str, ...]


class Compared(_Record):
    """What labels and truth have in common, if they have different classes; see ``ClassMatch``."""

    classes: tuple[ComparedClass, ...]
    only_labels: tuple[str, ...] = ()
    only_truth: tuple[str, ...] = ()
    others: Literal["background", "ignored"]

    @classmethod
    def of(cls, match: ClassMatch) -> Compared:
        """The record of a match."""
        return cls(
            classes=tuple(
                ComparedClass(name=one.name, labels=one.labels, truth=one.truth) for one in match.classes
            ),
            only_labels=match.only_labels,
            only_truth=match.only_truth,
            others=match.others,
        )

    def sentences(self) -> list[str]:
        """What was compared, in words."""
        said = [f"measured are the {len(self.classes)} classes that labels and truth have in common"]
        said += [
            f"class {one.name} is {' and '.join(one.labels)} of the labels, "
            f"{' and '.join(one.truth)} of the truth"
            for one in self.classes
            if one.labels != one.truth
        ]
        fates = {
            "background": ("count as background", "count as background"),
            "ignored": ("are ignored", "count as no class, which is wrong where a class was measured"),
        }[self.others]
        for whose, names, fate in (
            ("truth", self.only_truth, fates[0]),
            ("labels", self.only_labels, fates[1]),
        ):
            if names:
                more = f", and {len(names) - 20} more" if len(names) > 20 else ""
                said.append(f"only in the {whose}: {', '.join(names[:20])}{more}; they {fate}")
        return said


class Labelling(_Record):
    """The work of labelling the images, if that was a part of the evaluation.

    Attributes:
        images: how many.
        seconds: of the model alone, summed over all workers; without reading, decoding and writing.
    """

    images: Annotated[int, Field(ge=1)]
    seconds: Annotated[FiniteFloat, Field(ge=0)]


class SeenThrough(_Record):
    """The view of the table: its fields, and what it does in words."""

    settings: dict[str, Any] = {}
    says: tuple[str, ...] = ()


class EvaluationResult(_Record):
    """``evaluation.json``.

    ``view`` says through which view of the table it was measured (``pipeline.table.views``), and ``compared``
    which classes, if labels and truth have different ones; None if neither was so. Figures of two results can
    be compared if ``dataset.content`` and ``conditions`` are the same; older versions did not record them.
    """

    schema_version: int = SCHEMA_VERSION
    kind: Literal["evaluation"] = "evaluation"
    title: str
    created: str
    command: str
    protocol: str
    dataset: MeasuredDataset
    model: MeasuredModel
    classes: tuple[ClassResult, ...]
    confusion: tuple[tuple[Count, ...], ...]
    calibration: tuple[tuple[Count, Count, Count], ...] | None = None
    metrics: dict[str, Number]
    images: Images
    published: tuple[Published, ...] = ()
    view: SeenThrough | None = None
    compared: Compared | None = None
    conditions: str | None = None
    labelling: Labelling | None = None

    @model_validator(mode="after")
    def _shapes_agree(self) -> EvaluationResult:
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
    runs: tuple[FiniteFloat, ...] = ()


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


class BenchmarkResult(_Record):
    """``benchmark.json``."""

    schema_version: int = SCHEMA_VERSION
    kind: Literal["benchmark"] = "benchmark"
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


Result = EvaluationResult | BenchmarkResult


def evaluation_result(
    evaluation: Evaluation,
    *,
    title: str,
    protocol: str,
    dataset: MeasuredDataset,
    model: MeasuredModel,
    names: Sequence[str],
    colors: np.ndarray,
    groups: Sequence[str | None],
    published: Sequence[Published],
    worst: Sequence[ImageResult],
    best: Sequence[ImageResult],
    left_out: Sequence[str] = (),
    view: View | None = None,
    compared: Compared | None = None,
    conditions: str | None = None,
    labelling: Labelling | None = None,
) -> EvaluationResult:
    """The figures of an evaluation, with what was measured.

    Args:
        evaluation: the statistics.
        title: one line that says what was measured.
        protocol: ``seed``, ``unified`` or ``custom``; figures of different ones must not be compared.
        dataset: what was measured on.
        model: what was measured.
        names: C class names.
        colors: (C, 3) uint8.
        groups: per class ``seen``, ``unseen`` or None.
        published: figures of papers to compare with.
        worst: the images with the lowest scores.
        best: the images with the highest scores.
        left_out: what was not compared, a sentence each.
        view: through which the table was seen.
        compared: the classes that were measured, if labels and truth have different ones.
        conditions: see ``conditions_digest``.
        labelling: what labelling took, if it was done here.
    """
    statistics = evaluation.statistics
    by_class = summarise_classes(statistics)
    return EvaluationResult(
        title=title,
        created=now(),
        command=command_line(),
        protocol=protocol,
        dataset=dataset,
        model=model,
        classes=tuple(
            ClassResult(
                id=index,
                name=title,
                color="#{:02x}{:02x}{:02x}".format(*colors[index]),
                group=groups[index],
                pixels=int(by_class["pixels"][index]),
                **{name: float(by_class[name][index]) for name in PER_CLASS},
            )
            for index, title in enumerate(names)
        ),
        confusion=statistics.confusion.tolist(),
        calibration=binned(statistics.calibration).tolist() if statistics.calibration.any() else None,
        metrics=dict(summarise(statistics, groups if any(groups) else None)),
        images=Images(
            evaluated=len(evaluation.images),
            failed=evaluation.failed.total(),
            missing=len(evaluation.missing),
            left_out=tuple(left_out),
            worst=tuple(worst),
            best=tuple(best),
        ),
        published=tuple(published),
        view=None if view is None else SeenThrough(settings=view.to_dict(), says=tuple(view.described())),
        compared=compared,
        conditions=conditions,
        labelling=labelling,
    )


def conditions_digest(
    protocol: str,
    names: Sequence[str],
    *,
    ignore_index: int,
    background_below: float = 0.0,
    corruption: str = "",
    view: View | None = None,
    compared: Compared | None = None,
) -> str:
    """SHA-256 (hex) of all that must agree, besides images and truth, for figures to be comparable.

    Args:
        protocol: ``seed``, ``unified`` or ``custom``.
        names: C class names.
        ignore_index: id of pixels that are left out.
        background_below: pixels with less confidence count as class 0.
        corruption: what was done to the images first.
        view: through which the labels were seen.
        compared: the classes that were measured, if labels and truth have different ones. What the labels
            call them does not matter.
    """
    match = None
    if compared is not None:
        classes = [[one.name, one.truth] for one in compared.classes]
        match = [classes, compared.only_truth, compared.others]
    parts = [
        protocol, list(names), ignore_index, background_below, corruption,
        None if view is None else view.to_dict(), match,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def write_result(folder: Path, result: Result) -> Path:
    """Write ``evaluation.json`` or ``benchmark.json``, without passwords and keys within addresses."""
    name = EVALUATION_FILE if result.kind == "evaluation" else BENCHMARK_FILE
    open_storage(folder).write_json(name, redact_tree(result.model_dump(mode="json")))
    return folder / name


def read_results(folder: str | os.PathLike[str]) -> list[tuple[Storage, Result]]:
    """The results in a folder, at least one: the evaluation, then the benchmark.

    Args:
        folder: the output of ``maskmill evaluate`` or ``maskmill benchmark``, here or remote.

    Returns:
        Pairs of the folder, from which pictures can be read, and the result.

    Raises:
        MaskMillError: ``input_missing``, ``newer_version`` or ``file_damaged``, naming the file.
    """
    storage = open_storage(folder)
    kinds: dict[str, type[EvaluationResult | BenchmarkResult]] = {
        EVALUATION_FILE: EvaluationResult,
        BENCHMARK_FILE: BenchmarkResult,
    }
    found: list[tuple[Storage, Result]] = []
    for name, kind in kinds.items():
        remedy = "Run the command that made it again, or leave this folder out."
        result = find_record(kind, storage, name, SCHEMA_VERSION, remedy=remedy)
        if result is not None:
            found.append((storage, result))
    if not found:
        raise WrongUse(
            "input_missing",
            f"There is no {' or '.join(kinds)} in {storage.uri}.",
            "Give the output folder of maskmill evaluate or maskmill benchmark, or run one of them first.",
        )
    return found


def extremes(images: Sequence[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """The images with the lowest and with the highest mean IoU; no image is in both lists."""
    scored = sorted((image for image in images if image.miou is not None), key=lambda image: image.miou or 0)
    count = min(count, len(scored) // 2)
    return scored[:count], scored[::-1][:count]


def new_folder(output: str | Path | None, name: str, *, overwrite: bool) -> Path:
    """The folder for a result: the one asked for, or one of its own below ``results/``.

    Raises:
        MaskMillError: ``wrong_use`` for an address; ``output_exists`` if the folder holds a result already;
            ``output_not_ours`` if it holds anything else, or is none.
    """
    if output is not None and is_remote(canonical_uri(output)):
        raise WrongUse(
            "wrong_use",
            f"{output} is not on this machine, and a result is a local folder.",
            "Name a local --output; label tables may be anywhere (maskmill label, then evaluate --labels).",
        )
    folder = Path(output) if output else Path("results") / f"{time.strftime('%Y%m%dT%H%M%S')}-{name}"
    check_output_folder(folder)
    held = [file for file in (EVALUATION_FILE, BENCHMARK_FILE) if (folder / file).exists()]
    if held and not overwrite:
        raise WrongUse(
            "output_exists",
            f"{folder} holds a result already ({held[0]}).",
            "Name another --output, or say --overwrite.",
        )
    if folder.is_dir() and any(folder.iterdir()) and not held and not (folder / _MARKER).exists():
        raise WrongUse(
            "output_not_ours", f"{folder} holds other files.", "Name an empty or a new folder as --output."
        )
    return folder


def claim_folder(folder: Path, *, overwrite: bool) -> None:
    """Make the folder and mark it as a result's; with ``overwrite`` take away what an earlier one left."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _MARKER).write_text("The folder of a MaskMill result.\n")
    if overwrite:
        for name in (PICTURES, ROWS, SCENES):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name in (EVALUATION_FILE, BENCHMARK_FILE, IMAGES_FILE, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)


def hardware() -> Hardware:
    """What this machine computes with."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capabilities = torch.cpu.get_capabilities()
    return Hardware(
        cpu=capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        cores=cores,
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )
