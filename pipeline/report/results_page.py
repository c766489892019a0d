"""The results page: ``maskmill report``.

A self-contained HTML file: charts are inline SVG, pictures are data URIs, and a content security policy
keeps the browser from loading anything else.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
from markupsafe import Markup

from models.errors import MaskMillError, WrongUse
from models.files import write_file
from pipeline.evaluation.results import (
    BenchmarkResult,
    EvaluationResult,
    ImageResult,
    Published,
    Result,
    Row,
    Section,
    Value,
    read_results,
)
from pipeline.files.images import ERROR_CODES, ImageError, decode
from pipeline.files.outputs import check_output_file
from pipeline.files.storage import Storage
from pipeline.metrics.names import metric_label, percent
from pipeline.report import charts, comparison
from pipeline.report.page import page_path, render, setting
from pipeline.report.pictures import picture_uri

#: Marks a report, so that only reports are overwritten.
MARK = '<meta name="generator" content="MaskMill report">'

_PROTOCOLS = {
    "seed": "the protocol of MaskCLIP's own repository",
    "unified": "the common protocol of MaskCLIP's successors",
    "custom": "its own protocol: not comparable with published figures",
}
# Up to this many classes, a confusion matrix is a table of numbers, above it a picture.
_TABLE_CLASSES = 30
_CONFUSIONS = 12
_LONGEST = 1200


def write_report(folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]) -> Path:
    """Write a page about one or several results.

    Args:
        folders: outputs of ``maskmill evaluate`` and ``maskmill benchmark``, local or remote. The others are
            compared with the first evaluation, and with the first benchmark of the same name.
        output: the HTML file to write; an older report is replaced atomically.

    Returns:
        The path of the page.

    Raises:
        MaskMillError: ``input_missing``, ``newer_version`` or ``file_damaged`` for a folder,
            ``output_exists`` if the output exists and is not a report, ``wrong_use`` if it is not local.
    """
    if not folders:
        raise WrongUse("wrong_use", "No result folder was given.", "Give one, or several to compare.")
    path = page_path(output)
    _check_replaceable(path)
    check_output_file(path)
    results = [pair for folder in folders for pair in read_results(folder)]
    runs = [_run(index, storage, result) for index, (storage, result) in enumerate(results)]
    only = results[0][1] if len(results) == 1 else None
    page = render(
        "results.html",
        mark=Markup(MARK),
        title=only.title if only else f"{len(runs)} results compared",
        runs=runs,
        single=only is not None,
        comparisons=_comparisons(runs),
        number=number,
        difference=difference,
        metric_name=metric_label,
        setting=setting,
    )
    write_file(path, page.encode())
    return path


def _check_replaceable(path: Path) -> None:
    if not path.exists():
        return
    if path.is_file():
        with path.open("rb") as file:
            if MARK.encode() in file.read(4096):
                return
    raise WrongUse(
        "output_exists",
        f"{path} exists and is not a report of MaskMill.",
        "Name another --output, or move it away.",
    )


# --- words and numbers ---


def number(value: float | None) -> str:
    """A score in percent; what is above 1 is no share of anything and stays as it is; a dash for None."""
    size = abs(value or 0.0)
    text = percent(value) if size <= 1 else f"{value:.1f}" if size < 1000 else f"{value:,.0f}"
    return text.replace("-", "−")


def difference(value: float) -> str:
    """A difference of scores in points, with its sign."""
    return number(value) if value < 0 else f"+{number(value)}" if value > 0 else "±0"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _date(created: str) -> str:
    """2026-11-21T10:00:00Z → 2026-11-21 10:00 UTC."""
    day, _, time = created.partition("T")
    return f"{day} {time[:5]}{' UTC' if time.endswith('Z') else ''}".strip()


def _notice(result: Result) -> str:
    """A warning about toy or random weights, or ""."""
    if result.toy:
        return (
            "Toy: measured with the small bundled CLIP, on the procedural toy world, or both. "
            "The numbers say nothing about photographs."
        )
    if isinstance(result, EvaluationResult) and str(result.model.weights.get("pretrained", "")).startswith(
        "random:"
    ):
        return "Random weights: these numbers mean nothing. They show that the pipeline runs."
    return ""


# --- one run ---


def _run(index: int, storage: Storage, result: Result) -> dict[str, Any]:
    common = {
        "anchor": f"run-{index + 1}",
        "result": result,
        "notice": _notice(result),
        "created": _date(result.created),
    }
    view = (
        _evaluation(storage, result) if isinstance(result, EvaluationResult) else _benchmark(storage, result)
    )
    return common | view | {"parts": _parts(result, view)}


def _parts(result: Result, view: dict[str, Any]) -> list[tuple[str, str]]:
    """Id and title of each part of the page, in order, for the links at the top."""
    if isinstance(result, EvaluationResult):
        parts = [
            ("published", "Published figures", result.published),
            ("gaps", "What is missing", view["gaps"]),
            ("classes", "Classes", True),
            ("confusion", "Confusion", result.classes),
            ("calibration", "Calibration", view["reliability"]),
            ("worst", "Worst images", view["worst"]),
            ("best", "Best images", view["best"]),
        ]
    else:
        titles = [(f"section-{i + 1}", section.title, True) for i, section in enumerate(result.sections)]
        parts = [
            ("claims", "Claims", result.claims),
            ("gaps", "What is missing", view["gaps"]),
            *titles,
            ("pictures", "Pictures", view["pictures"]),
        ]
    return [(part, words) for part, words, there in parts if there] + [("made", "How it was made")]


def _pairs(*pairs: tuple[str, Any]) -> list[tuple[str, str]]:
    return [(word, str(value)) for word, value in pairs if value not in (None, "")]


def _evaluation(storage: Storage, run: EvaluationResult) -> dict[str, Any]:
    confusion = np.array(run.confusion, np.int64).reshape(len(run.classes), len(run.classes) + 1)
    totals = confusion.sum(1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    weights, recipe, dataset = run.model.weights, run.model.recipe, run.dataset
    small = len(run.classes) <= _TABLE_CLASSES
    return {
        "facts": _pairs(
            ("dataset", f"{dataset.name}{f' ({dataset.split})' if dataset.split else ''}"),
            ("images measured", f"{run.images.evaluated:,}"),
            ("classes", len(run.classes)),
            ("model", weights.get("model")),
            ("weights", weights.get("pretrained")),
            ("recipe", recipe.get("name")),
            ("protocol", run.protocol),
            ("view of the table", "; ".join(run.view.says) if run.view else ""),
            ("measured", _date(run.created)),
        ),
        "protocol": _PROTOCOLS.get(run.protocol, ""),
        "gaps": _evaluation_gaps(run),
        "published": _published(run),
        "classes": sorted(run.classes, key=lambda c: (c.iou is None, -(c.iou or 0.0), c.id)),
        "edges": any(c.boundary_iou is not None for c in run.classes),
        "groups": any(c.group for c in run.classes),
        "shares": shares if small else None,
        "heat": charts.heat(shares) if small else None,
        "matrix": None
        if small
        else charts.matrix_picture(
            shares, f"Confusion matrix of {len(run.classes)} classes; rows are true classes"
        ),
        "confusions": _confusions(run, shares),
        "reliability": charts.reliability(run.calibration) if run.calibration else None,
        "worst": [_image(storage, image) for image in run.images.worst],
        "best": [_image(storage, image) for image in run.images.best],
        "provenance": _pairs(
            ("result folder", storage.uri),
            ("created", run.created),
            ("dataset fingerprint", dataset.fingerprint),
            *((f"weights: {key}", setting(value)) for key, value in weights.items()),
        ),
    }


def _evaluation_gaps(run: EvaluationResult) -> list[str]:
    """Sentences about what the numbers do not cover."""
    gaps = [f"{line[:1].upper()}{line[1:]}." for line in (run.compared.sentences() if run.compared else ())]
    if run.images.failed:
        gaps.append(f"Failed and left out: {_images(run.images.failed)}.")
    if run.images.missing:
        gaps.append(f"Without a prediction and left out: {_images(run.images.missing)}.")
    gaps.extend(f"Left out: {line}." for line in run.images.left_out)
    absent = [c.name for c in run.classes if c.iou is None]
    if absent:
        gaps.append(
            f"{len(absent)} of {len(run.classes)} classes occur neither in the truth nor in the prediction "
            f"and are left out of the means: {_some(absent, 12)}."
        )
    told = set()
    if run.calibration is None:
        gaps.append("Calibration was not measured: the predictions have no confidence.")
        told.add("ece")
    if all(c.boundary_iou is None for c in run.classes):
        gaps.append("Boundary IoU was not measured.")
        told.add("boundary_miou")
    gaps += [
        f"{metric_label(name)} could not be computed."
        for name, value in run.metrics.items()
        if value is None and name not in told
    ]
    return gaps


def _images(count: int) -> str:
    return f"{count:,} image{'' if count == 1 else 's'}"


def _published(run: EvaluationResult) -> dict[str, Any]:
    """Published scores: charts of those comparable with ours, and the others separately."""
    same = [p for p in run.published if p.protocol == run.protocol]
    others = [p for p in run.published if p.protocol != run.protocol]
    panels = []
    for metric in dict.fromkeys(p.metric for p in same):
        rows: list[tuple[float, Published | None]] = [(p.value, p) for p in same if p.metric == metric]
        ours = run.metrics.get(metric)
        if ours is not None:
            rows.append((ours, None))
        rows.sort(key=lambda row: -row[0])
        top = charts.nice_top(max(value for value, _ in rows))
        bars = [
            {
                "published": published,
                "value": value,
                "bar": _percent(value / top),
                "difference": None if published is None or ours is None else ours - value,
            }
            for value, published in rows
        ]
        panels.append({"metric": metric, "bars": bars, "top": top})
    return {"charts": panels, "others": others}


def _confusions(run: EvaluationResult, shares: np.ndarray) -> list[dict[str, Any]]:
    """The largest shares of true classes predicted as another class or as none."""
    wrong = shares.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSIONS]
    found = []
    for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True):
        if wrong[row, column] < 0.01:
            break
        taken = run.classes[column] if column < len(run.classes) else None
        found.append(
            {
                "truth": run.classes[row],
                "taken": taken,
                "share": f"{100 * wrong[row, column]:.0f} %",
                "bar": _percent(wrong[row, column]),
            }
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * min(max(share, 0.0), 1.0):.2f}%"


# --- pictures ---


def _image(storage: Storage, image: ImageResult) -> dict[str, Any]:
    name = unquote(image.name).rstrip("/").rsplit("/", 1)[-1]
    return {"name": name, "full": image.name, "miou": image.miou, **_picture(storage, image.picture)}


def _picture(storage: Storage, name: str | None) -> dict[str, Any]:
    """A picture of the result folder as a data URI, or the reason for its absence."""
    if not name:
        return {"uri": None, "reason": "no picture was kept"}
    place = PurePosixPath(name)
    # A result may come from someone else: show only files inside its folder.
    if place.is_absolute() or ".." in place.parts:
        return {"uri": None, "reason": f"{name} is outside the result folder"}
    try:
        pixels = decode(storage.read_bytes(name))
    except ImageError as error:
        return {"uri": None, "reason": f"{name}: {ERROR_CODES[error.code]}"}
    except (MaskMillError, OSError):
        return {"uri": None, "reason": f"{name} cannot be read"}
    uri, width, height = picture_uri(pixels, longest=_LONGEST)
    return {"uri": uri, "width": width, "height": height}


# --- a benchmark ---


def _benchmark(storage: Storage, run: BenchmarkResult) -> dict[str, Any]:
    hardware = run.hardware
    verdicts = [claim.shows for claim in run.claims]
    rows = [row for section in run.sections for row in section.rows]
    return {
        "facts": _pairs(
            ("benchmark", run.name),
            ("took", _duration(run.seconds)),
            ("processor", hardware.cpu),
            ("cores", hardware.cores),
            ("GPU", hardware.gpu or "none"),
            ("measured", _date(run.created)),
        ),
        "tally": {
            "shown": verdicts.count(True),
            "not shown": verdicts.count(False),
            "not measured": verdicts.count(None),
        },
        "measured": sum(map(_measured, rows)),
        "lines": sum(_measured(row) or row.missing is not None for row in rows),
        "gaps": _benchmark_gaps(run),
        "sections": [_section(section) for section in run.sections],
        "pictures": [
            {"caption": picture.caption, **_picture(storage, picture.file)} for picture in run.pictures
        ],
        "provenance": _pairs(("result folder", storage.uri), ("created", run.created)),
    }


def _benchmark_gaps(run: BenchmarkResult) -> list[str]:
    """What was not measured, and why: one sentence per section and reason."""
    gaps: dict[tuple[str, str], list[str]] = {}
    for section in run.sections:
        for row in section.rows:
            if row.missing is not None and not _measured(row):
                gaps.setdefault((section.title, row.missing), []).append(row.name)
    return [f"{title}: {_some(names, 6)} not measured: {reason}" for (title, reason), names in gaps.items()]


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _measured(row: Row) -> bool:
    """Whether the row has a score of ours. Rows with neither score nor reason are published methods."""
    return any(value.mean is not None for value in row.values.values())


def _section(section: Section) -> dict[str, Any]:
    metric = section.metrics[0]
    low, top = _range(section, metric)

    def place(value: float) -> float:
        return (value - low) / (top - low)

    rows = []
    for row in section.rows:
        value = row.values.get(metric)
        bar = whisker = None
        if value is not None and value.mean is not None:
            ends = sorted((place(value.mean), place(0.0)))
            bar = (_percent(ends[0]), _percent(ends[1] - ends[0]))
            if value.low is not None and value.high is not None:
                whisker = (_percent(place(value.low)), _percent(place(value.high) - place(value.low)))
        told = row.published.get(metric)
        rows.append(
            {
                "row": row,
                "label": _row_label(row),
                "measured": _measured(row),
                "bar": bar,
                "whisker": whisker,
                "tick": None if told is None else _percent(place(told)),
                "cells": [(row.values.get(name), row.published.get(name)) for name in section.metrics],
            }
        )
    return {
        "section": section,
        "metric": metric,
        "rows": rows,
        "charted": section.chart is not None and any(row["bar"] or row["tick"] for row in rows),
        "top": top,
        "published": [
            any(row.published.get(name) is not None for row in section.rows) for name in section.metrics
        ],
        "sources": list(dict.fromkeys(row.source for row in section.rows if row.source)),
        "intervals": any(v.low is not None for row in section.rows for v in row.values.values()),
        "curves": _curves(section, metric, low, top) if section.chart == "lines" else None,
        "panels": _panels(section) if section.chart == "bars" else [],
    }


def _panels(section: Section) -> list[dict[str, Any]]:
    """Bars by group, one panel per series and metric, all on one axis; empty if the rows have no series."""
    series: dict[str, list[Row]] = {}
    for row in section.rows:
        if row.series is None or row.x is None:
            return []
        series.setdefault(row.series, []).append(row)
    low, top = _range(section, *section.metrics)
    panels = []
    for name, rows in series.items():
        for metric in section.metrics:
            bars = []
            for row in sorted(rows, key=lambda row: row.x or 0):
                value = row.values.get(metric)
                mean = None if value is None else value.mean
                ends = None if mean is None else sorted(((mean - low) / (top - low), -low / (top - low)))
                bars.append(
                    {
                        "label": row.name.removeprefix(f"{name}, "),
                        "value": mean,
                        "left": ends and _percent(ends[0]),
                        "width": ends and _percent(ends[1] - ends[0]),
                    }
                )
            panels.append({"series": name, "metric": metric, "bars": bars, "top": top})
    return panels


def _row_label(row: Row) -> str:
    """Label of a row; for a point of a series, series and position, unless its name includes them."""
    if row.series is None or row.x is None or row.series in row.name:
        return row.name
    return f"{row.series} {row.x:g}"


def _range(section: Section, *metrics: str) -> tuple[float, float]:
    """Limits of the axis shared by all bars or curves of a section; includes 0."""
    pairs = [(row, metric) for row in section.rows for metric in metrics]
    values = [row.values[metric] for row, metric in pairs if metric in row.values]
    points = [x for v in values for x in (v.mean, v.low, v.high) if x is not None]
    points += [p for row, metric in pairs if (p := row.published.get(metric)) is not None]
    top, bottom = max(points, default=1.0), min(points, default=0.0)
    return (-charts.nice_top(-bottom) if bottom < 0 else 0.0), charts.nice_top(top)


def _curves(section: Section, metric: str, low: float, top: float) -> dict[str, Any] | None:
    """Small multiples and a table of curves by position; None if the section has no curve."""
    named = any(row.series is not None and row.x is not None for row in section.rows)
    series: dict[str, dict[float, Row]] = {}
    apart: list[Row] = []
    for row in section.rows:
        if row.x is not None and (row.series is not None or not named):
            series.setdefault(row.series or metric_label(metric), {})[row.x] = row
        else:
            apart.append(row)
    # A single point at a position of its own (clean images before corruption levels) is no curve.
    places = Counter(x for rows in series.values() for x in rows)
    for name, rows in [*series.items()]:
        if len(series) > 1 and len(rows) == 1 and places[next(iter(rows))] == 1:
            apart += series.pop(name).values()
    if not series:
        return None
    references: list[tuple[str, Value]] = [
        (row.name, value)
        for row in apart
        if (value := row.values.get(metric)) is not None and value.mean is not None
    ]
    points = {name: _points(rows, metric) for name, rows in series.items()}
    told = {
        name: [charts.Point(x, p) for x, row in rows.items() if (p := row.published.get(metric)) is not None]
        for name, rows in series.items()
    }
    xs = sorted({x for rows in series.values() for x in rows})
    levels = [value.mean for _, value in references if value.mean is not None]
    panels = [
        {
            "name": name,
            "chart": charts.curve(
                points[name],
                label=f"{metric_label(metric)} of {name}: "
                + ", ".join(f"{percent(p.y)} % at {p.x:g}" for p in points[name]),
                others=[other for key, other in points.items() if key != name],
                references=levels,
                published=told[name],
                xs=xs,
                top=top,
                bottom=low,
            ),
        }
        for name in series
        if points[name] or told[name]
    ]
    if not panels:
        return None
    table = [(name, [_table_cell(rows.get(x), metric) for x in xs]) for name, rows in series.items()]
    return {
        "panels": panels,
        "xs": xs,
        "table": table,
        "references": references,
        "several": len(series) > 1,
        "published": any(told.values()),
    }


def _table_cell(row: Row | None, metric: str) -> tuple[Row | None, Value | None, float | None]:
    """A row with our value and the published one, if they exist."""
    return (None, None, None) if row is None else (row, row.values.get(metric), row.published.get(metric))


def _points(rows: dict[float, Row], metric: str) -> list[charts.Point]:
    values = [(x, rows[x].values.get(metric)) for x in sorted(rows)]
    return [charts.Point(x, v.mean, v.low, v.high) for x, v in values if v is not None and v.mean is not None]


# --- several runs ---


def _comparisons(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Compare all evaluations, and benchmarks of the same name."""
    measured = [run for run in runs if isinstance(run["result"], EvaluationResult)]
    named: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        if isinstance(run["result"], BenchmarkResult):
            named.setdefault(run["result"].name, []).append(run)
    return {
        "evaluations": {"runs": measured, **comparison.evaluations([run["result"] for run in measured])}
        if len(measured) > 1
        else None,
        "benchmarks": [
            {"name": name, "runs": group, "sections": comparison.benchmarks([run["result"] for run in group])}
            for name, group in named.items()
            if len(group) > 1
        ],
    }
