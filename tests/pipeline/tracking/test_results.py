from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.evaluation.results import EvaluationResult
from pipeline.tracking.results import evaluation_metrics, log_result
from pipeline.tracking.tracker import open_tracker

HOSTILE = ["traffic light", "a/b", "a:b", "$x^2$", "猫", "..", "Cat", "cat", "x" * 300, "<b>", "a,b | c", "#"]


def evaluation(names: list[str], seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    count = len(names)
    confusion = rng.integers(0, 40, (count, count + 1)) + 900 * np.eye(count, count + 1, dtype=int)
    confusion[-1] = 0  # a class that the truth does not have
    classes = []
    for index, name in enumerate(names):
        hit, true, found = confusion[index, index], confusion[index].sum(), confusion[:, index].sum()
        classes.append(
            {
                "id": index,
                "name": name,
                "color": "#4caf50",
                "group": None,
                "pixels": int(true),
                "iou": float(hit / (true + found - hit)) if true else None,
                "boundary_iou": None,
                "accuracy": float(hit / true) if true else None,
                "precision": float(hit / found) if found else None,
            }
        )
    return {
        "schema_version": 1,
        "kind": "evaluation",
        "title": "maskclip on $odd$ names (val)",
        "created": "2026-11-21T10:00:00Z",
        "command": "maskmill evaluate --images photos",
        "protocol": "seed",
        "dataset": {"name": "odd", "split": "val", "images": 12, "fingerprint": "ab" * 32},
        "model": {
            "recipe": {"name": "maskclip", "head": "maskclip", "scale": [2048, 512], "hash": "r"},
            "weights": {"model": "toyclip", "pretrained": "bundled", "fingerprint": "w" * 64},
            "toy": True,
        },
        "classes": classes,
        "confusion": confusion.tolist(),
        "calibration": None,
        "metrics": {"miou": 0.51, "pixel_accuracy": 0.7, "ece": None},
        "images": {"evaluated": 12, "failed": 1, "missing": 2, "worst": [], "best": []},
        "published": [
            {"method": "MaskCLIP", "metric": "miou", "value": 0.495, "source": "Table 1", "protocol": "seed"}
        ],
    }


def benchmark() -> dict[str, Any]:
    def row(name: str, mean: float | None, **more: Any) -> dict[str, Any]:
        values = {"miou": {"mean": mean, "low": 0.1, "high": 0.2, "runs": [0.1, 0.2]}} if mean else {}
        return {
            "name": name,
            "series": None,
            "x": None,
            "values": values,
            "published": {},
            "source": None,
        } | {
            "missing": None,
            **more,
        }

    return {
        "schema_version": 1,
        "kind": "benchmark",
        "name": "toyworld",
        "title": "Toy world",
        "created": "2026-11-21T10:00:00Z",
        "command": "maskmill benchmark toyworld",
        "hardware": {"cpu": "x", "cores": 2, "gpu": None},
        "seconds": 12.5,
        "toy": True,
        "sections": [
            {
                "name": "maskclip",
                "title": "t",
                "note": "n",
                "chart": "bars",
                "metrics": ["miou"],
                "rows": [
                    row("unmodified CLIP", 0.13, published={"miou": 0.2}, source="Table 2"),
                    row("MaskCLIP, KS/PD", 0.44),
                    row("Context", None, published={"miou": 0.21}, missing="give --root"),
                ],
            },
            {
                "name": "corruption",
                "title": "t",
                "note": "n",
                "chart": "lines",
                "metrics": ["miou"],
                "rows": [row("noise", 0.5 - x / 20, series="gaussian_noise", x=x) for x in range(1, 6)]
                + [row("size", 0.3, series="scale", x=0.5), row("size", 0.4, series="scale", x=1.5)],
            },
        ],
        "claims": [
            {"claim": "A beats B", "source": "s", "shows": True, "detail": "+0.31"},
            {"claim": "C beats D", "source": "s", "shows": False, "detail": "-0.01"},
        ],
        "pictures": [],
    }


@pytest.mark.slow
def test_an_evaluation_is_filed_whole(
    sqlite: str, stored: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    record = evaluation(HOSTILE)
    folder = tmp_path / "out"
    (folder / "pictures").mkdir(parents=True)
    (folder / "labels").mkdir()
    (folder / "evaluation.json").write_text(json.dumps(record))
    (folder / "report.html").write_text("<p>report</p>")
    (folder / "labels" / "part-0.parquet").write_bytes(b"large")
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "worst-1.png")
    with open_tracker(sqlite) as tracker:
        tracker.start("evaluate", "odd")
        log_result(tracker, folder)
    run = stored(sqlite, "maskmill-evaluate")
    assert run["files"] == [
        "confusion.png",
        "per_class.csv",
        "result/evaluation.json",
        "result/pictures/worst-1.png",
        "result/report.html",
    ]
    assert run["metrics"]["miou"] == 0.51 and run["metrics"]["images_missing"] == 2
    assert "ece" not in run["metrics"]
    for measure in ("iou", "accuracy", "precision"):
        logged = [value for key, value in run["metrics"].items() if key.startswith(f"{measure}/")]
        expected = [entry[measure] for entry in record["classes"] if entry[measure] is not None]
        assert sorted(logged) == sorted(expected)
    assert run["metrics"]["iou/traffic light"] == record["classes"][0]["iou"]
    assert (run["params"]["recipe.images.scale"], run["params"]["weights.fingerprint"]) == (
        "[2048, 512]",
        "w" * 64,
    )
    assert json.loads(run["params"]["ontology.classes"]) == HOSTILE
    assert [dataset.name for dataset in run["datasets"]] == ["odd"]
    assert "| MaskCLIP | mIoU | 49.5 % | seed | Table 1 |" in run["tags"]["mlflow.note.content"]
    assert run["tags"]["toy"] == "true"

    local = run["client"].download_artifacts(run["id"], "", str(tmp_path / "got"))
    with open(Path(local) / "per_class.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == HOSTILE
    for index, counts in enumerate(record["confusion"][:-1]):
        others = {name: count for name, count in enumerate(counts) if name != index}
        worst = max(others.values())
        assert float(rows[index]["share_confused"]) == pytest.approx(worst / sum(counts))
        assert others[[*HOSTILE, "no class"].index(rows[index]["most_confused_with"])] == worst
    assert rows[-1]["iou"] == rows[-1]["most_confused_with"] == ""
    assert json.loads((Path(local) / "result" / "evaluation.json").read_text()) == record


def test_a_benchmark_is_filed_whole(
    sqlite: str, stored: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "benchmark.json").write_text(json.dumps(benchmark()))
    with open_tracker(sqlite) as tracker:
        tracker.start("benchmark", "toyworld")
        log_result(tracker, tmp_path)
    run = stored(sqlite, "maskmill-benchmark")
    assert run["metrics"] == {
        "seconds": 12.5,
        "maskclip/unmodified CLIP/miou": 0.13,
        "maskclip/MaskCLIP_ KS_PD/miou": 0.44,
        "corruption/gaussian_noise/miou": 0.25,
        "corruption/scale 0.5/miou": 0.3,
        "corruption/scale 1.5/miou": 0.4,
        "claims_shown": 1,
        "claims_not_shown": 1,
        "claims_undecided": 0,
    }
    assert sorted(run["history"]["corruption/gaussian_noise/miou"]) == [
        (x, pytest.approx(0.5 - x / 20)) for x in range(1, 6)
    ]
    local = run["client"].download_artifacts(run["id"], "rows.csv", str(tmp_path))
    with open(local, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    missing = next(row for row in rows if row["row"] == "Context")
    assert (missing["mean"], missing["published"], missing["missing"]) == ("", "0.21", "give --root")
    assert "| C beats D | no | -0.01 | s |" in run["tags"]["mlflow.note.content"]


def test_a_folder_without_a_result_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError) as caught:
        log_result(open_tracker("off"), tmp_path)
    assert caught.value.code == "input_missing"


def test_metric_names_are_as_many_as_values() -> None:
    record = evaluation([f"class {index % 3}" for index in range(171)])
    metrics = evaluation_metrics(EvaluationResult.model_validate(record))
    assert len(metrics) == 3 + 3 + 4 * 171
