"""Figures for Prometheus, scraped from a real Ray, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.metrics import MEASURES, LabellingMetrics, TrainingMetrics, exported_name
from pipeline.cluster.progress import Progress
from pipeline.cluster.session import ray_session

DASHBOARD = Path(__file__).resolve().parents[3] / "jobs/deploy/grafana/maskmill.json"
_SAMPLE = re.compile(r"(ray_maskmill_\w+)\{(.*)\} (\S+)")


def scraped(port: int) -> dict[tuple[str, str, str], float]:
    """The samples of MaskMill at a node, by name, run, and status or stage."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in _SAMPLE.findall(text):
        tags = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        found[name, tags["run"], tags.get("status") or tags.get("stage") or ""] = float(value)
    return found


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_s_figures_are_scraped_from_its_node() -> None:
    now = 0.0
    first = Progress().plus(
        done=6, failures={"not_found": 2}, at_s=1.0, decode_s=3.0, fetch_s=1.0, label_s=8.0,
        encode_s=2.0, write_s=0.5, batches=2.0,
    )  # fmt: skip
    second = first.plus(done=4, failures={}, at_s=9.0, decode_s=1.0, label_s=2.0, encode_s=1.0, batches=0.5)
    told = {
        ("maskmill_images", "ok"): 8, ("maskmill_images", "not_found"): 2,
        ("maskmill_images_left", ""): 20,
        ("maskmill_images_per_second", ""): 1.0,
        ("maskmill_stage_seconds", "fetch"): 1.0, ("maskmill_stage_seconds", "decode"): 3.0,
        ("maskmill_stage_seconds", "model"): 10.0, ("maskmill_stage_seconds", "encode"): 2.5,
        ("maskmill_stage_seconds", "write"): 0.5,
        ("maskmill_workers_busy", ""): 0.5,
        ("maskmill_batch_size", ""): 4.0,
    }  # fmt: skip
    expected = {(exported_name(name), "run-a", tag): value for (name, tag), value in told.items()}
    expected |= {
        (exported_name(f"maskmill_training_{name}"), "run-b", ""): value
        for name, value in {"step": 20, "loss": 0.5, "data_wait": 0.25}.items()
    }
    with ray_session("0123abcd", address=None, verbose=False):
        import ray

        labelling = LabellingMetrics("run-a", 30, 2, clock=lambda: now)
        labelling.update(first)
        now = 10.0
        labelling.update(second)
        training = TrainingMetrics("train clipseg", "run-b")
        training.update({"step": 20, "loss": 0.5, "samples_per_second": None, "data_wait": 0.25})
        (node,) = ray.nodes()
        found: dict[tuple[str, str, str], float] = {}
        deadline = time.monotonic() + 90
        # They do not all appear at once.
        while found != pytest.approx(expected) and time.monotonic() < deadline:
            time.sleep(0.5)
            found = scraped(node["MetricsExportPort"])
    assert found == pytest.approx(expected)


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for panel in dashboard["panels"] for part in (panel, *panel.get("panels", ()))]


def test_the_dashboard_asks_for_metrics_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    shown = panels(dashboard)
    ids = [panel["id"] for panel in shown]
    assert len(ids) == len(set(ids))
    variables = {entry["name"]: entry for entry in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    source = {"type": "prometheus", "uid": "${datasource}"}
    queries = [variables["run"]["definition"]]
    for panel in shown:
        if panel["type"] != "row":
            assert panel["datasource"] == source and panel["targets"], panel["title"]
            queries += [target["expr"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert asked == {exported_name(name) for name in MEASURES}
    tags = {"job", "run", *(tag for measure in MEASURES.values() for tag in measure.tags)}
    for query in queries[1:]:
        assert set(re.findall(r"(\w+)=~?\"", query)) <= tags
        assert set(re.findall(r"by \((\w+)\)", query)) <= tags


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels(json.loads(DASHBOARD.read_text())):
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
