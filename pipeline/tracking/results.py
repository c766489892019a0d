"""A result folder (``evaluation.json`` or ``benchmark.json``) as parameters, metrics and files of a run."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from models.errors import WrongUse
from pipeline.files.storage import Storage, open_storage
from pipeline.metrics.names import PER_CLASS, metric_label
from pipeline.report.charts import save_confusion
from pipeline.tracking.names import key_part, key_parts
from pipeline.tracking.tracker import TrackedDataset, Tracker

EVALUATION, BENCHMARK = "evaluation.json", "benchmark.json"
PICTURES = "pictures"
KEPT_SUFFIXES = frozenset({".html", ".csv", ".md", ".png", ".jpg", ".jpeg", ".svg"})
"""Files at the top of a result folder that are attached; the folder may hold tables of any size as well."""
NOTE_TAG = "mlflow.note.content"


def log_result(tracker: Tracker, folder: str | os.PathLike[str]) -> None:
    """Record everything in a result folder in a run that has been started.

    Args:
        tracker: of the run.
        folder: local or remote, with ``evaluation.json`` or ``benchmark.json``.

    Raises:
        WrongUse: ``result_missing`` if it holds neither.
    """
    storage = open_storage(folder)
    found = [name for name in (EVALUATION, BENCHMARK) if storage.exists(name)]
    if not found:
        raise WrongUse(
            "result_missing",
            f"{storage.uri} has neither {EVALUATION} nor {BENCHMARK}.",
            "Name the --output of maskmill evaluate or maskmill benchmark.",
        )
    with TemporaryDirectory() as temporary:
        for name in found:
            _LOGGERS[name](tracker, storage.read_json(name), Path(temporary))
        result = Path(temporary) / "result"
        for name in [*found, *_extras(storage)]:
            target = result / PurePosixPath(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(storage.read_bytes(name))
        tracker.log_artifact(result)


def evaluation_metrics(record: Mapping[str, Any]) -> dict[str, float | None]:
    """All measurements of an evaluation: ``miou``, ``iou/CLASS``, ``boundary_iou/CLASS``, …"""
    classes = record["classes"]
    names = key_parts([entry["name"] for entry in classes])
    metrics: dict[str, float | None] = dict(record["metrics"])
    metrics |= {f"images_{key}": record["images"][key] for key in ("evaluated", "failed", "missing")}
    for measure in PER_CLASS:
        metrics |= {f"{measure}/{name}": entry[measure] for name, entry in zip(names, classes, strict=True)}
    return metrics


def _log_evaluation(tracker: Tracker, record: Mapping[str, Any], temporary: Path) -> None:
    dataset, classes = record["dataset"], record["classes"]
    names = [entry["name"] for entry in classes]
    tracker.log_params(
        {
            "recipe": record["model"]["recipe"],
            "weights": record["model"]["weights"],
            "ontology": {"classes": names},
            "protocol": record["protocol"],
        }
    )
    tracker.log_dataset(
        TrackedDataset(
            dataset["name"],
            dataset["fingerprint"],
            profile={"split": dataset["split"], "images": dataset["images"]},
        )
    )
    tracker.log_metrics(evaluation_metrics(record))
    confusion = np.array(record["confusion"], dtype=np.int64).reshape(len(names), len(names) + 1)
    rows = _class_rows(classes, confusion)
    tracker.log_artifact(_write_csv(temporary / "per_class.csv", rows))
    picture = temporary / "confusion.png"
    save_confusion(picture, confusion, names, title=record["title"])
    tracker.log_artifact(picture)
    lines = [
        f"**{record['title']}** (protocol {record['protocol']}{_toy(record['model']['toy'])})",
        "",
        *_markdown(
            ("metric", "value"),
            (
                (metric_label(key), f"{value:.4f}")
                for key, value in record["metrics"].items()
                if value is not None
            ),
        ),
    ]
    if record["published"]:
        lines += ["", *_markdown(("published", "metric", "value", "protocol", "source"), _published(record))]
    lines += ["", f"`{record['command']}`"]
    tracker.set_tags(
        {NOTE_TAG: "\n".join(lines), "protocol": record["protocol"], "toy": _word(record["model"]["toy"])}
    )


def _log_benchmark(tracker: Tracker, record: Mapping[str, Any], temporary: Path) -> None:
    tracker.log_params({"benchmark": record["name"], "hardware": record["hardware"]})
    tracker.log_metrics({"seconds": record["seconds"]})
    rows: list[dict[str, Any]] = []
    for section in record["sections"]:
        place = key_part(section["name"])
        entries = section["rows"]
        series = [entry["series"] if entry["series"] is not None else entry["name"] for entry in entries]
        unique = list(dict.fromkeys(series))
        parts = dict(zip(unique, key_parts(unique), strict=True))
        for entry, line in zip(entries, series, strict=True):
            step, part = _step(entry["x"]), parts[line]
            if entry["x"] is not None and step is None:
                part = f"{part} {key_part(str(entry['x']))}"
            values = {}
            for metric, value in entry["values"].items():
                values[f"{place}/{part}/{key_part(metric)}"] = value["mean"]
                rows.append(_benchmark_row(section, entry, metric, value))
            for metric in entry["published"].keys() - entry["values"].keys():
                rows.append(_benchmark_row(section, entry, metric, {}))
            tracker.log_metrics(values, step or 0)
    tracker.log_artifact(_write_csv(temporary / "rows.csv", rows))
    verdicts = [claim["shows"] for claim in record["claims"]]
    tracker.log_metrics(
        {
            "claims_shown": verdicts.count(True),
            "claims_not_shown": verdicts.count(False),
            "claims_undecided": verdicts.count(None),
        }
    )
    lines = [f"**{record['title']}**{' (toy scale)' if record['toy'] else ''}"]
    if record["claims"]:
        shown = {True: "yes", False: "no", None: "undecided"}
        lines += [
            "",
            *_markdown(
                ("claim", "shows", "detail", "source"),
                ((c["claim"], shown[c["shows"]], c["detail"], c["source"]) for c in record["claims"]),
            ),
        ]
    lines += ["", f"`{record['command']}`"]
    tracker.set_tags({NOTE_TAG: "\n".join(lines), "toy": _word(record["toy"])})


_LOGGERS: Mapping[str, Callable[[Tracker, Mapping[str, Any], Path], None]] = {
    EVALUATION: _log_evaluation,
    BENCHMARK: _log_benchmark,
}


def _extras(storage: Storage) -> list[str]:
    top = [name for name in storage.list() if PurePosixPath(name).suffix.lower() in KEPT_SUFFIXES]
    return [*top, *storage.list(PICTURES, recursive=True)]


def _class_rows(classes: Sequence[Mapping[str, Any]], confusion: np.ndarray) -> list[dict[str, Any]]:
    rows = []
    for entry, counts in zip(classes, confusion, strict=True):
        wrong = counts.copy()
        wrong[entry["id"]] = 0
        worst = int(wrong.argmax())
        known = wrong.any()
        others = [other["name"] for other in classes] + ["no class"]
        rows.append(
            {
                **{key: entry[key] for key in ("id", "name", "group", "pixels", *PER_CLASS)},
                "most_confused_with": others[worst] if known else None,
                "share_confused": float(wrong[worst] / counts.sum()) if known else None,
            }
        )
    return rows


def _benchmark_row(
    section: Mapping[str, Any], entry: Mapping[str, Any], metric: str, value: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "section": section["name"],
        "row": entry["name"],
        "series": entry["series"],
        "x": entry["x"],
        "metric": metric,
        **{key: value.get(key) for key in ("mean", "low", "high")},
        "runs": json.dumps(value["runs"]) if value.get("runs") else None,
        "published": entry["published"].get(metric),
        "source": entry["source"],
        "missing": entry["missing"],
    }


def _step(x: Any) -> int | None:
    """A position on a chart's axis as a step of MLflow, which are whole numbers."""
    return int(x) if isinstance(x, (int, float)) and float(x).is_integer() else None


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["empty"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def _published(record: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    for entry in record["published"]:
        value = f"{entry['value']:.4f}"
        yield entry["method"], metric_label(entry["metric"]), value, entry["protocol"], entry["source"]


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
