"""A result folder (``evaluation.json`` or ``benchmark.json``) as parameters, metrics and files of a run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pipeline.evaluation.results import (
    PICTURES,
    BenchmarkResult,
    ClassResult,
    EvaluationResult,
    Row,
    Section,
    Value,
    read_results,
)
from pipeline.files.storage import Storage
from pipeline.metrics.names import PER_CLASS, metric_label, percent
from pipeline.report.charts import save_confusion
from pipeline.tracking.names import key_part, key_parts
from pipeline.tracking.tracker import TrackedDataset, Tracker

KEPT_SUFFIXES = frozenset({".html", ".csv", ".md", ".png", ".jpg", ".jpeg", ".svg"})
"""Files at the top of a result folder that are attached; the folder may hold tables of any size as well."""
NOTE_TAG = "mlflow.note.content"


def log_result(tracker: Tracker, folder: str | os.PathLike[str]) -> None:
    """Record everything in a result folder in a run that has been started.

    Args:
        tracker: of the run.
        folder: local or remote, with ``evaluation.json`` or ``benchmark.json``.

    Raises:
        MaskMillError: as ``read_results``.
    """
    found = read_results(folder)
    storage = found[0][0]
    with TemporaryDirectory() as temporary:
        for _, record in found:
            if isinstance(record, EvaluationResult):
                _log_evaluation(tracker, record, Path(temporary))
            else:
                _log_benchmark(tracker, record, Path(temporary))
        copied = Path(temporary) / "result"
        for name in [f"{record.kind}.json" for _, record in found] + _extras(storage):
            target = copied / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(name))
        tracker.log_artifact(copied)


def evaluation_metrics(result: EvaluationResult) -> dict[str, float | None]:
    """All measurements of an evaluation: ``miou``, ``iou/CLASS``, ``boundary_iou/CLASS``, …"""
    classes = result.classes
    names = key_parts([entry.name for entry in classes])
    metrics: dict[str, float | None] = dict(result.metrics)
    metrics |= {f"images_{key}": getattr(result.images, key) for key in ("evaluated", "failed", "missing")}
    for measure in PER_CLASS:
        metrics |= {
            f"{measure}/{name}": getattr(entry, measure) for name, entry in zip(names, classes, strict=True)
        }
    return metrics


def _log_evaluation(tracker: Tracker, result: EvaluationResult, temporary: Path) -> None:
    dataset, classes = result.dataset, result.classes
    names = [entry.name for entry in classes]
    tracker.log_params(
        {
            "recipe": result.model.recipe,
            "weights": result.model.weights,
            "ontology": {"classes": names},
            "protocol": result.protocol,
        }
    )
    tracker.log_dataset(
        TrackedDataset(
            dataset.name,
            dataset.fingerprint or "",
            profile={"split": dataset.split, "images": dataset.images},
        )
    )
    tracker.log_metrics(evaluation_metrics(result))
    confusion = np.array(result.confusion, dtype=np.int64).reshape(len(names), len(names) + 1)
    rows = _class_rows(classes, confusion)
    tracker.log_artifact(_write_csv(temporary / "per_class.csv", rows))
    picture = temporary / "confusion.png"
    save_confusion(picture, confusion, names, title=result.title)
    tracker.log_artifact(picture)
    lines = [
        f"**{result.title}** (protocol {result.protocol}{_toy(result.model.toy)})",
        "",
        *_markdown(
            ("metric", "value"),
            (
                (metric_label(key), f"{percent(value)} %")
                for key, value in result.metrics.items()
                if value is not None
            ),
        ),
    ]
    if result.published:
        lines += ["", *_markdown(("published", "metric", "value", "protocol", "source"), _published(result))]
    lines += ["", f"`{result.command}`"]
    tracker.set_tags(
        {NOTE_TAG: "\n".join(lines), "protocol": result.protocol, "toy": _word(result.model.toy)}
    )


def _log_benchmark(tracker: Tracker, result: BenchmarkResult, temporary: Path) -> None:
    tracker.log_params({"benchmark": result.name, "hardware": result.hardware.model_dump()})
    tracker.log_metrics({"seconds": result.seconds})
    rows: list[dict[str, Any]] = []
    for section in result.sections:
        place = key_part(section.name)
        entries = section.rows
        series = [entry.series if entry.series is not None else entry.name for entry in entries]
        unique = list(dict.fromkeys(series))
        parts = dict(zip(unique, key_parts(unique), strict=True))
        for entry, line in zip(entries, series, strict=True):
            step, part = _step(entry.x), parts[line]
            if entry.x is not None and step is None:
                part = f"{part} {key_part(str(entry.x))}"
            values = {}
            for metric, value in entry.values.items():
                values[f"{place}/{part}/{key_part(metric)}"] = value.mean
                rows.append(_benchmark_row(section, entry, metric, value))
            for metric in entry.published.keys() - entry.values.keys():
                rows.append(_benchmark_row(section, entry, metric, Value(mean=None)))
            tracker.log_metrics(values, step or 0)
    tracker.log_artifact(_write_csv(temporary / "rows.csv", rows))
    verdicts = [claim.shows for claim in result.claims]
    tracker.log_metrics(
        {
            "claims_shown": verdicts.count(True),
            "claims_not_shown": verdicts.count(False),
            "claims_undecided": verdicts.count(None),
        }
    )
    lines = [f"**{result.title}**{' (toy scale)' if result.toy else ''}"]
    if result.claims:
        shown = {True: "yes", False: "no", None: "undecided"}
        lines += [
            "",
            *_markdown(
                ("claim", "shows", "detail", "source"),
                ((c.claim, shown[c.shows], c.detail, c.source) for c in result.claims),
            ),
        ]
    lines += ["", f"`{result.command}`"]
    tracker.set_tags({NOTE_TAG: "\n".join(lines), "toy": _word(result.toy)})


def _extras(storage: Storage) -> list[str]:
    top = [name for name in storage.list() if PurePosixPath(name).suffix.lower() in KEPT_SUFFIXES]
    return [*top, *storage.list(PICTURES, recursive=True)]


def _class_rows(classes: Sequence[ClassResult], confusion: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for entry, counts in zip(classes, confusion, strict=True):
        wrong = counts.copy()
        wrong[entry.id] = 0
        worst = int(wrong.argmax())
        known = wrong.any()
        others = [other.name for other in classes] + ["no class"]
        rows.append(
            {
                **entry.model_dump(include={"id", "name", "group", "pixels", *PER_CLASS}),
                "most_confused_with": others[worst] if known else None,
                "share_confused": float(wrong[worst] / counts.sum()) if known else None,
            }
        )
    return rows


def _benchmark_row(section: Section, entry: Row, metric: str, value: Value) -> dict[str, Any]:
    return {
        "section": section.name,
        "row": entry.name,
        "series": entry.series,
        "x": entry.x,
        "metric": metric,
        "mean": value.mean,
        "low": value.low,
        "high": value.high,
        "runs": json.dumps(value.runs) if value.runs else None,
        "published": entry.published.get(metric),
        "source": entry.source,
        "missing": entry.missing,
    }


def _step(x: float | None) -> int | None:
    """A position on a chart's axis as a step of MLflow, which are whole numbers."""
    return int(x) if x is not None and x.is_integer() else None


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _published(result: EvaluationResult) -> Iterable[tuple[str | None, ...]]:
    for entry in result.published:
        value = f"{percent(entry.value)} %"
        yield entry.method, metric_label(entry.metric), value, entry.protocol, entry.source


def _markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}"]
    for row in rows:
        cells = (" ".join(str(cell).split()).replace("|", "\\|") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _toy(toy: bool) -> str:
    return ", a toy" if toy else ""


def _word(value: bool) -> str:
    return str(value).lower()
