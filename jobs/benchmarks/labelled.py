"""Rows that are measured by labelling a dataset: open it, label, compare, resume when interrupted."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.tables import (
    RANDOM_WEIGHTS,
    Request,
    needs_root,
    of_other_images,
    open_root,
    random_weights,
    why_not_measured,
)
from jobs.evaluate.compare import evaluate
from jobs.evaluate.protocol import protocol_recipe
from models.errors import MaskMillError, WrongUse
from pipeline.datasets.base import Dataset
from pipeline.datasets.protocols import get_protocol
from pipeline.datasets.registry import DATASETS
from pipeline.evaluation.images import read_images
from pipeline.evaluation.results import EVALUATION_FILE, ROWS, EvaluationResult, read_results
from pipeline.files.storage import open_storage
from pipeline.labelling.recipes import LabelRecipe, recipe_from_dict
from pipeline.metrics.paired import miou_interval


def open_limited(name: str, request: Request, *, draw: bool = False) -> tuple[Dataset | None, str | None]:
    """The dataset with at most as many images as asked for, or what is missing.

    Args:
        name: of the dataset.
        request: what was asked for.
        draw: take a random share, the same every time, instead of the first images.
    """
    if name not in request.roots:
        return None, f"needs {needs_root(name)}"
    try:
        dataset = open_root(request, name)
    except MaskMillError as error:
        return None, why_not_measured(error)
    if request.limit and request.limit < len(dataset.samples):
        chosen = np.arange(request.limit)
        if draw:
            everything = np.random.default_rng(0).permutation(len(dataset.samples))
            chosen = np.sort(everything[: request.limit])
        dataset = dataclasses.replace(dataset, samples=[dataset.samples[at] for at in chosen])
    return dataset, None


def measure(
    dataset: Dataset | None,
    recipe: LabelRecipe | None,
    request: Request,
    *,
    file_name: str,
    protocol: Any,
    missing: str | None,
    labels: str | None = None,
    zero_shot: str | None = None,
    metrics: Sequence[str] = ("miou", "pixel_accuracy"),
) -> tuple[dict[str, list[float]], str | None]:
    """The figures of a row, or the reason for having none. Reuses the result of an earlier run."""
    if dataset is None:
        return {}, missing
    folder = request.folder / ROWS / file_name
    try:
        if labels is None and (folder / EVALUATION_FILE).exists():
            record = _earlier(folder, dataset, recipe, protocol)
        else:
            request.console.print(f"[bold]{file_name}[/bold]")
            record = evaluate(
                dataset,
                request.console,
                labels=labels,
                recipe=recipe,
                protocol=protocol if labels is None else None,
                zero_shot=zero_shot,
                output=folder,
                overwrite=labels is not None,
                boundary=False,
                pictures=0,
                workers=0,
            )[1]
    except MaskMillError as error:
        return {}, why_not_measured(error)
    images = record.images
    if images.missing or images.failed:
        lost = images.missing + images.failed
        return {}, f"{lost:,} of {record.dataset.images:,} images have no labels in the table"
    if labels is not None and protocol is not None and record.protocol != protocol:
        return {}, f"the labels follow protocol {record.protocol}, this table {protocol}"
    found = {metric: record.metrics.get(metric) for metric in metrics}
    return {metric: [value] for metric, value in found.items() if value is not None}, None


def interval_of_images(request: Request, file_name: str) -> tuple[float | None, float | None]:
    """The 95 % interval of a measured row's mean IoU, from a bootstrap over its images."""
    folder = request.folder / ROWS / file_name
    ((_, record),) = read_results(folder)
    assert isinstance(record, EvaluationResult)
    counts = read_images(open_storage(folder), record)
    if counts is None:
        return None, None
    return miou_interval(
        counts.truth, counts.predicted, counts.correct, resamples=1000, seed=0, confidence=0.95
    )


def _earlier(
    folder: Path, dataset: Dataset, recipe: LabelRecipe | None, protocol: str | None
) -> EvaluationResult:
    """Read a result from an earlier, interrupted run of the same benchmark.

    Raises:
        MaskMillError: ``output_differs`` if it has other images, another recipe or other weights.
    """
    from models.clip.weights import find_weights

    ((_, record),) = read_results(folder)
    assert isinstance(record, EvaluationResult)
    differs = ""
    if record.dataset.fingerprint != dataset.fingerprint():
        differs = f"on other images ({record.dataset.images:,} then, {len(dataset.samples):,} now)"
    elif recipe is not None:
        if protocol in ("seed", "unified"):
            recipe = protocol_recipe(recipe, get_protocol(dataset.name, protocol))
        fingerprint = find_weights(recipe.model, recipe.pretrained).fingerprint
        changed = recipe.differences(recipe_from_dict(record.model.recipe))
        if changed:
            differs = f"with another recipe ({'; '.join(changed)})"
        elif record.model.weights["fingerprint"] != fingerprint:
            differs = "with other weights"
    if differs:
        raise WrongUse(
            "output_differs", f"{folder} was measured {differs}.", "Name another --output, or delete it."
        )
    return record


def note(dataset: Dataset | None, request: Request) -> str:
    """Caveats for comparing a section with the published figures."""
    notes = []
    if random_weights(request.settings):
        notes.append(RANDOM_WEIGHTS)
    if dataset is not None:
        other = of_other_images(dataset, DATASETS[dataset.name].default_split)
        notes.append(other or f"{len(dataset.samples):,} images.")
        notes += [f"Not taken: {entry}." for entry in dataset.left_out]
    return " ".join(notes)
