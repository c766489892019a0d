"""Shared by the rows of CLIPSeg's tables: open datasets, loaded models, results of earlier runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.benchmarks.clipseg.breakdowns import Parts, parts_of
from jobs.benchmarks.clipseg.models import RowModels, clip_settings
from jobs.benchmarks.resume import measure_once, shown_progress
from jobs.benchmarks.tables import (
    RANDOM_WEIGHTS,
    Request,
    check_rows,
    needs_root,
    of_other_images,
    open_root,
    random_weights,
)
from jobs.console import Progress
from models.errors import WrongUse, did_you_mean
from pipeline.datasets.base import shown
from pipeline.datasets.cocojson import open_coco_root
from pipeline.datasets.generalised import MatchedPrompt, generalised_prompts, match_prompts
from pipeline.datasets.lvis import NAME as LVIS
from pipeline.datasets.oneshot import BENCHMARKS, class_areas
from pipeline.evaluation.published import PublishedTable, Row
from pipeline.metrics.breakdown import (
    Breakdowns,
    break_down,
    breakdowns_from_json,
    breakdowns_to_json,
    merge_breakdowns,
)
from pipeline.metrics.names import STANDARD

if TYPE_CHECKING:
    from models.clipseg.decoder import ClipSeg
    from pipeline.evaluation.prompts.protocols import Read

SIDE = 352
"""Side of the network's input in the paper (``models.clipseg.decoder.IMAGE_SIZE``)."""
METHODS = ("CLIPSeg", "CLIP-Deconv", "ViTSeg")
"""Methods that can be measured here; the others have published figures only."""
NOT_RUN = ("CLIPSeg (PC+), independent re-run",)
COCO_JSON = "coco-json"

_ROOTS: Mapping[str, tuple[str, ...]] = {
    "phrasecut": ("phrasecut",),
    "pascal5i": ("voc21",),
    "coco20i": ("cocoobject81",),
    "voc21": ("voc21",),
    "lvis": ("lvis", COCO_JSON),
}
_MASKS_AT_ONCE = 32
_UNION = (
    "The true mask of a prompt is the union of all its classes; the paper's reader took one class at a time, "
    "on a crop around it."
)
_PARTLY_ANNOTATED = (
    "Images in which LVIS has not marked one of the prompt's classes exhaustively are left out; other "
    "objects that LVIS has not marked count as wrong."
)

Values = dict[str, float]


@dataclass(frozen=True)
class Figures:
    """A row's figures: ``values`` by metric, ``parts`` by breakdown and group."""

    values: Values = field(default_factory=dict)
    parts: Parts = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Counted:
    """Figures of one model run.

    Attributes:
        values: by metric of ``pipeline.metrics.foreground.summarise``; a suffix marks the standard
            convention.
        breakdowns: counts per group.
        threshold: the one used for the foreground IoU.
    """

    values: Values
    breakdowns: Breakdowns
    threshold: float


class Bench:
    """Opens the datasets and models of a table's rows, and measures them.

    Raises:
        MaskMillError: ``wrong_use`` for weights of an unknown row, an unknown setting, or an image size
            outside 32 to 2048.
    """

    def __init__(self, request: Request, table: PublishedTable) -> None:
        self.request = request
        self.table = table
        known = [line.title for line in table.rows if can_run(line)]
        unknown = [name for name in request.weights if name not in known]
        if unknown:
            raise WrongUse(
                "wrong_use",
                f"--weights: the table has no row {unknown[0]!r} that is measured here.",
                f"{did_you_mean(unknown[0], known)}Its rows: {'; '.join(known)}.",
            )
        check_rows(request, known)
        wrong = [side for side in request.image_sizes if not 32 <= side <= 2048]
        if wrong:
            raise WrongUse(
                "wrong_use",
                f"--image-size {wrong[0]} is out of range.",
                "Use 32 to 2048 pixels; the paper's is 352.",
            )
        self.settings = clip_settings(request.settings)
        self._models = RowModels(request.weights, self.settings)
        self._datasets: dict[str, Any] = {}
        self._areas: dict[str, np.ndarray] = {}

    def lacking(self, setting: str, line: Row) -> str | None:
        """What the user must still provide before the row can be measured."""
        title, names = line.title, root_names(setting)
        parts = []
        if not any(name in self.request.roots for name in names):
            parts.append(f"{needs_root(names[0])}{_split_hint(setting)}")
        if title not in self.request.weights:
            parts.append(f"its weights: --weights '{title}=PATH'{_weights_hint(setting, line)}")
        return f"needs {'; and '.join(parts)}" if parts else None

    def dataset(self, setting: str) -> Any:
        """The opened dataset of a setting."""
        name = setting.partition("/")[0]
        if name not in self._datasets:
            given = next(root for root in root_names(setting) if root in self.request.roots)
            if given == COCO_JSON:
                # Every category is a class; the prompts select among them instead of an ontology.
                root, _, split = self.request.roots[given].partition("#")
                where = {"split": split} if split else {}
                self._datasets[name] = open_coco_root(root, ontology=None, **where)
            else:
                usual = BENCHMARKS[name].split if name in BENCHMARKS else None
                self._datasets[name] = open_root(self.request, given, usual_split=usual)
        return self._datasets[name]

    def areas(self, setting: str) -> np.ndarray:
        """Pixels per image and class, from which episodes are drawn."""
        name = setting.partition("/")[0]
        if name not in self._areas:
            dataset = self.dataset(setting)
            parts = []
            with shown_progress(self.request.console, f"{name}: what each image shows", "masks") as progress:
                for start in range(0, len(dataset.samples), _MASKS_AT_ONCE):
                    some = dataset.samples[start : start + _MASKS_AT_ONCE]
                    parts.append(class_areas(dataclasses.replace(dataset, samples=some)))
                    progress(start + len(some), len(dataset.samples))
            self._areas[name] = np.concatenate(parts)
        return self._areas[name]

    def generalised(self, setting: str) -> tuple[MatchedPrompt, ...]:
        """The setting's prompts, matched to the dataset's classes."""
        kind = setting.partition("/")[2]
        asked = [prompt for prompt in generalised_prompts() if prompt.kind == kind]
        return match_prompts(asked, self.dataset(setting).class_names)

    def model(self, line: Row, **numbers: str) -> ClipSeg:
        """See ``RowModels.load``."""
        return self._models.load(line, **numbers)

    def foreground(
        self,
        setting: str,
        line: Row,
        queries: Sequence[Read],
        unit: str,
        *,
        fold: int | None = None,
        side: int = SIDE,
    ) -> Counted:
        """Figures of a model over queries, under CLIPSeg's convention and the standard one."""
        from pipeline.evaluation.prompts.protocols import answers, total
        from pipeline.metrics.foreground import CLIPSEG, summarise
        from pipeline.metrics.foreground import STANDARD as STANDARD_CONVENTION

        model = self.model(line, **({} if fold is None else {"fold": str(fold)}))
        threshold = line.threshold if isinstance(line.threshold, float) else None

        def run(progress: Progress) -> dict[str, Any]:
            found = answers(model, queries, progress=progress)
            statistics = total(found)
            ours = summarise(statistics, CLIPSEG, threshold=threshold)
            standard = summarise(statistics, STANDARD_CONVENTION, threshold=threshold)
            parts = break_down((answer.statistics, answer.groups) for answer in found)
            return (
                ours
                | {f"{metric}_{STANDARD}": value for metric, value in standard.items()}
                | {"breakdowns": breakdowns_to_json(parts)}
            )

        name = f"{setting} {line.title}" + ("" if fold is None else f" fold {fold}")
        found = self.measured(
            name,
            {
                "images": self.dataset(setting).fingerprint(),
                "weights": model.fingerprint,
                "threshold": threshold,
            },
            unit,
            run,
            side=side,
        )
        breakdowns = breakdowns_from_json(found.pop("breakdowns", {}))
        return Counted(found, breakdowns, found["iou_fg_threshold"])

    def figures(
        self, setting: str, runs: Sequence[Counted], *, renamed: Mapping[str, str] | None = None
    ) -> Figures:
        """A row's figures over its folds: mean metrics, and groups merged across folds.

        Args:
            setting: the one whose metrics are reported.
            runs: one per fold, at least one, all at the same threshold.
            renamed: the real metric of each column that the table mislabels.
        """
        values = {}
        for column in self.table.metrics(setting):
            metric = (renamed or {}).get(column, column)
            for suffix in ("", f"_{STANDARD}"):
                values[column + suffix] = float(np.mean([run.values[metric + suffix] for run in runs]))
        parts = merge_breakdowns(run.breakdowns for run in runs)
        return Figures(values, parts_of(parts, runs[0].threshold))

    def measured(
        self,
        name: str,
        identity: Mapping[str, Any],
        unit: str,
        run: Callable[[Progress], dict[str, Any]],
        *,
        side: int = SIDE,
    ) -> dict[str, Any]:
        """``measure_once``, with limit, precision and image size added to the identity."""
        identity = {**identity, "limit": self.request.limit, "precision": str(self.settings["precision"])}
        if side != SIDE:
            name = f"{name} at {side} pixels"
        return measure_once(self.request.folder, self.request.console, name, identity, unit, run)

    def note(self, setting: str) -> str:
        """Caveats for comparing a section with the published figures."""
        name = setting.partition("/")[0]
        parts = []
        dataset = self._datasets.get(name)
        if dataset is not None:
            if dataset.name == COCO_JSON:
                parts.append(f"On {dataset.split} with {len(dataset.class_names):,} classes, not on LVIS.")
            else:
                proper = BENCHMARKS[name].split if name in BENCHMARKS else dataset.split
                parts.append(of_other_images(dataset, proper))
            parts += [f"Not taken: {entry}." for entry in dataset.left_out]
            if self.request.limit:
                unit = "episodes of each fold" if name in BENCHMARKS else "images"
                parts.append(f"Only {self.request.limit:,} {unit}: not comparable with published figures.")
            if random_weights(self.settings):
                parts.append(RANDOM_WEIGHTS)
            placeholder = _placeholder(setting)
            shared = [title for title, path in self.request.weights.items() if placeholder not in path]
            if placeholder and shared:
                parts.append(
                    f"Measured with one model throughout, which may have been trained on the classes asked "
                    f"for: {'; '.join(shared)}."
                )
            if name == "lvis":
                parts.append(_UNION)
                if dataset.name == LVIS:
                    parts.append(_PARTLY_ANNOTATED)
                parts += [
                    f"Classes of {match.prompt.text!r} that the data lack: {shown(match.lacking)}."
                    for match in self.generalised(setting)
                    if match.lacking
                ]
        return " ".join(filter(None, [*parts, *self.table.notes]))


def can_run(line: Row) -> bool:
    """Whether the row can be measured here."""
    return line.method.startswith(METHODS) and line.method not in NOT_RUN


def root_names(setting: str) -> tuple[str, ...]:
    """Datasets on which a setting can be measured, the benchmark's own first."""
    return _ROOTS[setting.partition("/")[0]]


def _placeholder(setting: str) -> str:
    """The placeholder for a setting's models in a weights path; empty if it has only one model."""
    return "{unseen}" if setting.startswith("voc21/") else "{fold}" if _folds(setting) else ""


def _folds(setting: str) -> bool:
    return setting.partition("/")[0] in BENCHMARKS


def _split_hint(setting: str) -> str:
    if setting == "coco20i":
        return f" (split {BENCHMARKS['coco20i'].split}; another as DIR#SPLIT)"
    return f", or any COCO instances file: --root {COCO_JSON}=DIR" if setting.startswith("lvis/") else ""


def _weights_hint(setting: str, line: Row) -> str:
    if _folds(setting):
        return ", with {fold} in PATH for the model of each fold"
    if setting.startswith("voc21/"):
        return ", with {unseen} in PATH for the models trained without 10 and without 4 classes"
    if line.method.endswith("no CLIP pre-training"):
        return ", and its CLIP: --set pretrained=random:SEED"
    return ""
