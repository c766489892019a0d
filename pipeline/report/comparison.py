"""Comparison of results: scores side by side, with differences only between comparable results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.results import BenchmarkResult, EvaluationResult, Row, Section
from pipeline.metrics.names import less_is_better
from pipeline.report.page import setting, setting_rows


@dataclass(frozen=True)
class Cell:
    """A value, its difference from the first run's, and whether that is an improvement.

    Both are None without a value to compare with; ``better`` is also None if nothing changed.
    """

    value: float | None
    difference: float | None = None
    better: bool | None = None


def cell(metric: str, value: float | None, first: float | None) -> Cell:
    """Compare a value with that of the first run."""
    if value is None or first is None:
        return Cell(value)
    difference = value - first
    if difference == 0:
        return Cell(value, difference)
    return Cell(value, difference, (difference < 0) == less_is_better(metric))


def obstacles(first: EvaluationResult, other: EvaluationResult) -> list[str]:
    """Why two evaluations are not comparable; empty if they are."""
    pairs = {
        "protocol": (first.protocol, other.protocol),
        "dataset": (first.dataset.name, other.dataset.name),
        "split": (first.dataset.split, other.dataset.split),
        "classes": ([c.name for c in first.classes], [c.name for c in other.classes]),
    }
    found = [
        f"another {word}" if word != "classes" else "other classes"
        for word, (a, b) in pairs.items()
        if a != b
    ]
    if not found and first.dataset.fingerprint != other.dataset.fingerprint:
        found = ["other images or truth (the fingerprints of the dataset differ)"]
    return found


def evaluations(runs: Sequence[EvaluationResult]) -> dict[str, Any]:
    """Compare the first evaluation with each of the others.

    Returns:
        ``metrics``: names, in order of appearance. ``rows``: per run, its ``obstacles`` and one of ``cells``
        per metric. ``changes``: per comparable later run, its index ``run`` and the ``classes`` whose IoU
        changed most. ``settings``: fields of recipe and weights that differ, with the value in each run.
    """
    first, *others = runs
    metrics = list(dict.fromkeys(name for run in runs for name in run.metrics))
    why = [[], *(obstacles(first, other) for other in others)]
    rows = [
        {
            "obstacles": why[index],
            "cells": [
                Cell(run.metrics.get(name))
                if index == 0 or why[index]
                else cell(name, run.metrics.get(name), first.metrics.get(name))
                for name in metrics
            ],
        }
        for index, run in enumerate(runs)
    ]
    changes = [
        {"run": index, "classes": _changed_classes(first, run)}
        for index, run in enumerate(runs)
        if index and not why[index]
    ]
    return {"metrics": metrics, "rows": rows, "changes": changes, "settings": _settings(runs)}


def _changed_classes(
    first: EvaluationResult, other: EvaluationResult, *, count: int = 8
) -> list[dict[str, Any]]:
    """The classes whose IoU rose most, then those whose IoU fell most, at most ``count`` of each."""
    pairs: list[dict[str, Any]] = [
        {"name": b.name, "color": b.color, "first": a.iou, "cell": cell("iou", b.iou, a.iou)}
        for a, b in zip(first.classes, other.classes, strict=True)
    ]
    moved = sorted((p for p in pairs if p["cell"].better is not None), key=lambda p: -p["cell"].difference)
    gains, losses = [p for p in moved if p["cell"].better], [p for p in moved if not p["cell"].better]
    return gains[:count] + losses[-count:]


def _settings(runs: Sequence[EvaluationResult]) -> list[tuple[str, list[str]]]:
    # Hashes and fingerprints differ whenever anything else does, so they explain nothing.
    silent = {"hash", "fingerprint"}
    fields = [
        {
            f"{part} {name}": value
            for part in ("recipe", "weights")
            for name, value in setting_rows(getattr(run.model, part))
            if name.rpartition(".")[2] not in silent
        }
        for run in runs
    ]
    names = dict.fromkeys(
        name for some in fields for name in some if name.replace(" ", ".").rpartition(".")[2] not in silent
    )
    table = [(name, [some.get(name, setting(None)) for some in fields]) for name in names]
    return [(name, values) for name, values in table if len(set(values)) > 1]


def benchmarks(runs: Sequence[BenchmarkResult]) -> list[dict[str, Any]]:
    """Sections that the first run of a benchmark shares with another run, row by row.

    Returns:
        Per section, its ``title``, the charted ``metric`` and ``rows``: ``label`` and, per run, ``cells``.
    """
    first, *others = runs
    shared = []
    for section in first.sections:
        metric = section.metrics[0]
        tables = [_values(section, metric), *(_values(_same(section, other), metric) for other in others)]
        if not any(tables[0].keys() & table.keys() for table in tables[1:]):
            continue
        keys = dict.fromkeys(key for table in tables for key in table)
        rows = [
            {
                "label": " ".join(
                    str(f"{part:g}" if isinstance(part, float) else part) for part in key if part is not None
                ),
                "cells": [
                    Cell(table.get(key))
                    if table is tables[0]
                    else cell(metric, table.get(key), tables[0].get(key))
                    for table in tables
                ],
            }
            for key in keys
        ]
        shared.append({"title": section.title, "metric": metric, "rows": rows})
    return shared


def _same(section: Section, run: BenchmarkResult) -> Section | None:
    return next((other for other in run.sections if other.name == section.name), None)


def _values(section: Section | None, metric: str) -> dict[tuple[str | None, float | None], float]:
    if section is None:
        return {}
    found = {}
    for row in section.rows:
        value = row.values.get(metric)
        if value is not None and value.mean is not None:
            found[_key(row)] = value.mean
    return found


def _key(row: Row) -> tuple[str | None, float | None]:
    # A point of a curve is identified by its curve and position, whatever its name.
    return (row.series, row.x) if row.series is not None else (row.name, row.x)
