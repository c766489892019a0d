"""CLIPSeg's Table 2: how visual prompts change CLIP's probability of the marked object."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.benchmarks.clipseg.models import clip_settings, settings_clip
from jobs.benchmarks.resume import measure_parts_once
from jobs.benchmarks.rows import interval, row
from jobs.benchmarks.tables import (
    RANDOM_WEIGHTS,
    Request,
    check_rows,
    needs_root,
    open_root,
    random_weights,
    why_not_measured,
)
from jobs.console import Progress
from models.errors import MaskMillError, WrongUse
from pipeline.datasets.registry import DATASETS
from pipeline.evaluation.published import PublishedTable, load_published
from pipeline.evaluation.results import Row, Section

if TYPE_CHECKING:
    from models.clip.loading import Clip

SEED = 0
"""Seed for the order of the images."""
UNFIT = ("phrasecut", *(name for name, info in DATASETS.items() if info.needs_ontology))
"""Datasets not accepted: phrase masks, and formats that need a separate ontology."""
_METRICS = ("delta_probability", "probability")


@dataclass(frozen=True)
class _Found:
    """Probabilities of the objects by strategy, or what is missing, and a note."""

    probabilities: Mapping[str, Sequence[float]]
    missing: str | None
    note: str


def prompt_strategies(request: Request) -> Iterator[Section]:
    """Table 2 on each given dataset; without any, a section that lists the paper's LVIS as missing."""
    _check(request)
    check_rows(request, [line.method for line in load_published("clipseg_visual_prompts").rows])
    return _sections(request, clip_settings(request.settings))


def _sections(request: Request, settings: Mapping[str, Any]) -> Iterator[Section]:
    table = load_published("clipseg_visual_prompts")
    loaded: list[Clip] = []

    def clip() -> Clip:
        if not loaded:
            loaded.append(settings_clip(settings))
        return loaded[0]

    for name in dict.fromkeys([*request.datasets, *request.roots]) or ["lvis"]:
        found = _measure(name, request, settings, table, clip)
        yield Section(
            name=f"{name}-visual-prompts",
            title=f"{DATASETS[name].description}: what visual prompts change in CLIP's probability of the "
            "object",
            note=" ".join(filter(None, [found.note, *table.notes])),
            chart="bars",
            metrics=tuple(_METRICS),
            rows=tuple(_rows(found, table)),
        )


def _rows(found: _Found, table: PublishedTable) -> list[Row]:
    from pipeline.evaluation.prompts.strategies import UNMODIFIED

    base = np.array(found.probabilities.get(UNMODIFIED, ()))
    rows = [_row(UNMODIFIED, {"probability": base})] if len(base) else []
    for line in table.rows:
        probability = np.array(found.probabilities.get(line.method, ()))
        measured = len(probability) > 0
        (value,) = line.values
        rows.append(
            _row(
                line.method,
                {"delta_probability": probability - base, "probability": probability} if measured else {},
                published={"delta_probability": round(value / 100, 6)} if value is not None else {},
                source=str(table.source_of(line)),
                missing=None if measured else found.missing or "not asked for",
            )
        )
    return rows


def _row(name: str, values: Mapping[str, np.ndarray], **told: Any) -> Row:
    """A row whose interval is taken over the objects; it does not keep the figures per object."""
    found = {metric: interval(figures.tolist()) for metric, figures in values.items()}
    shown = {metric: over.model_copy(update={"runs": (over.mean,)}) for metric, over in found.items()}
    return row(name, {}, **told).model_copy(update={"values": shown})


def _measure(
    name: str,
    request: Request,
    settings: Mapping[str, Any],
    table: PublishedTable,
    clip: Callable[[], Clip],
) -> _Found:
    from pipeline.evaluation.prompts.strategies import (
        LEAST_NAMES,
        LEAST_SHARE,
        SAMPLES,
        UNMODIFIED,
        draw_objects,
        object_probabilities,
    )

    methods = [line.method for line in table.rows]
    wanted = [method for method in methods if not request.rows or any(row in method for row in request.rows)]
    if not wanted:
        return _Found({}, None, "")
    count = min(request.limit or SAMPLES, SAMPLES)
    try:
        dataset = open_root(request, name)
        model = clip()

        def run(progress: Progress, absent: Sequence[str]) -> dict[str, dict[str, Any]]:
            objects = draw_objects(dataset, count, seed=SEED)
            strategies = [method for method in absent if method != UNMODIFIED]
            probabilities = object_probabilities(
                model, objects, strategies, progress=lambda done: progress(done, count)
            )
            return {method: {"probabilities": values} for method, values in probabilities.items()}

        parts = measure_parts_once(
            request.folder,
            request.console,
            f"{name} visual prompts",
            [UNMODIFIED, *wanted],
            {
                "images": dataset.fingerprint(),
                "weights": model.fingerprint,
                "precision": settings["precision"],
                "objects": count,
            },
            "objects",
            run,
        )
        found = {method: part["probabilities"] for method, part in parts.items()}
    except MaskMillError as error:
        if error.code == "dataset_missing" and name not in request.roots:
            return _Found({}, f"needs {needs_root(name)}, or any dataset with masks of several things", "")
        return _Found({}, why_not_measured(error), "")
    drawn = len(found[UNMODIFIED])
    if not drawn:
        return _Found(
            {},
            f"no image shows at least {LEAST_NAMES} things, one of them on at least {LEAST_SHARE:.0%} of it",
            "",
        )
    notes = [f"Ours: {drawn:,} objects of {dataset.split}, with the 95 % interval over them."]
    if request.limit:
        notes.append(f"--limit {request.limit:,} counts objects here, not images.")
    if name != "lvis" or drawn < SAMPLES:
        notes.append("Other images than the paper's: not comparable with the published figures.")
    if random_weights(settings):
        notes.append(RANDOM_WEIGHTS)
    return _Found(found, None, " ".join(notes))


def _check(request: Request) -> None:
    """Refuse options and datasets that this table does not have.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    for flag, given in (("--weights", request.weights), ("--labels", request.labels)):
        if given:
            raise WrongUse(
                "wrong_use",
                f"{flag}: visual prompts are evaluated on CLIP itself, the same for all rows.",
                "Choose the CLIP with --set model=NAME --set pretrained=TAG-OR-FILE.",
            )
    for name in (*request.datasets, *request.roots):
        if name not in DATASETS or name in UNFIT:
            known = ", ".join(known for known in DATASETS if known not in UNFIT)
            raise WrongUse(
                "wrong_use",
                f"{name!r} is not a dataset with masks of classes.",
                f"Use one of {known}.",
            )


TABLES: Mapping[str, tuple[str, Callable[[Request], Iterator[Section]]]] = {
    "prompt-strategies": (
        "CLIPSeg: what visual prompts do to CLIP's answer",
        prompt_strategies,
    ),
}
