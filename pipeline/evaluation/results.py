"""Result folders: what an evaluation or a benchmark leaves behind, as JSON and pictures.

``evaluation.json`` and ``benchmark.json`` are read by the report page and by tracking. Shares are in [0, 1],
counts are integers, and what does not exist is null.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from models.errors import WrongUse
from pipeline.evaluation.tables import Evaluation, ImageScore
from pipeline.files.redaction import command_line as command
from pipeline.files.redaction import redact_tree
from pipeline.files.storage import canonical_uri, is_remote
from pipeline.metrics.calibration import binned
from pipeline.metrics.statistics import summarise, summarise_classes

SCHEMA_VERSION = 1
EVALUATION_FILE, BENCHMARK_FILE = "evaluation.json", "benchmark.json"
REPORT_FILE = "report.html"
PICTURES, ROWS, SCENES = "pictures", "rows", "scenes"
_MARKER = ".maskmill-result"


def evaluation_record(
    evaluation: Evaluation,
    *,
    title: str,
    protocol: str,
    dataset: dict[str, Any],
    model: dict[str, Any],
    names: Sequence[str],
    colors: np.ndarray,
    groups: Sequence[str | None],
    published: Sequence[dict[str, Any]],
    worst: Sequence[dict[str, Any]],
    best: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The content of ``evaluation.json``.

    Args:
        evaluation: the statistics.
        title: one line that says what was measured.
        protocol: ``seed``, ``unified`` or ``custom``; figures of different ones must not be compared.
        dataset: name, split, images, fingerprint.
        model: recipe, weights, whether it is the toy.
        names: C class names.
        colors: (C, 3) uint8.
        groups: per class ``seen``, ``unseen`` or None.
        published: figures to be put beside.
        worst: entries of the worst images: name, miou, picture.
        best: entries of the best images.
    """
    statistics = evaluation.statistics
    by_class = summarise_classes(statistics)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "evaluation",
        "title": title,
        "created": now(),
        "command": command(),
        "protocol": protocol,
        "dataset": dataset,
        "model": model,
        "classes": [
            {
                "id": index,
                "name": name,
                "color": "#{:02x}{:02x}{:02x}".format(*colors[index]),
                "group": groups[index],
                "pixels": int(by_class["pixels"][index]),
            }
            | {
                metric: _number(by_class[metric][index])
                for metric in ("iou", "boundary_iou", "accuracy", "precision")
            }
            for index, name in enumerate(names)
        ],
        "confusion": statistics.confusion.tolist(),
        "calibration": binned(statistics.calibration).tolist() if statistics.calibration.any() else None,
        "metrics": {
            key: _number(value)
            for key, value in summarise(statistics, groups if any(groups) else None).items()
        },
        "images": {
            "evaluated": len(evaluation.images),
            "failed": evaluation.failed.total(),
            "missing": len(evaluation.missing),
            "worst": list(worst),
            "best": list(best),
        },
        "published": list(published),
    }


def extremes(images: Sequence[ImageScore], count: int) -> tuple[list[ImageScore], list[ImageScore]]:
    """The images with the lowest and with the highest mean IoU; no image is in both lists."""
    scored = sorted((image for image in images if image.miou is not None), key=lambda image: image.miou or 0)
    count = min(count, len(scored) // 2)
    return scored[:count], scored[::-1][:count]


def write_result(folder: Path, record: dict[str, Any]) -> Path:
    """Write ``evaluation.json`` or ``benchmark.json``, by the record's kind; whole or not at all.

    Passwords and keys within addresses are left out.
    """
    target = folder / (EVALUATION_FILE if record["kind"] == "evaluation" else BENCHMARK_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(redact_tree(record), indent=1, allow_nan=False) + "\n")
    os.replace(temporary, target)
    return target


def new_folder(output: str | Path | None, name: str, *, overwrite: bool) -> Path:
    """The folder for a result: the one asked for, or one of its own below ``results/``.

    Raises:
        MaskMillError: ``wrong_use`` for an address; ``output_exists`` if the folder holds a result
            already; ``output_not_ours`` if it holds anything else.
    """
    if output is not None and is_remote(canonical_uri(output)):
        raise WrongUse(
            "wrong_use",
            f"{output} is not on this machine, and a result is a local folder.",
            "Name a local --output; label tables may be anywhere (maskmill label, then evaluate --labels).",
        )
    folder = Path(output) if output else Path("results") / f"{time.strftime('%Y%m%dT%H%M%S')}-{name}"
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
        for name in (EVALUATION_FILE, BENCHMARK_FILE, REPORT_FILE):
            (folder / name).unlink(missing_ok=True)


def hardware() -> dict[str, Any]:
    """What this machine computes with."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "cores": cores,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def now() -> str:
    """The time in UTC, ISO 8601."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
