"""Figures of a run for Prometheus: every node of Ray exports what its processes have recorded.

The driver records them, from the figures that the workers report with each finished part, so that workers
do nothing more. Ray puts ``ray_`` before each name and ``_total`` behind that of a counter;
``jobs/deploy/grafana/maskmill.json`` shows them. A run without Ray, such as a training in the driver's own
process, has none.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.cluster.progress import Progress

EVERY_S = 5.0
"""Seconds that gauges cover."""


@dataclass(frozen=True)
class Measure:
    """A metric.

    Attributes:
        kind: of the metric.
        about: what it says, and its unit.
        tags: beside ``job`` and ``run``.
    """

    kind: Literal["counter", "gauge"]
    about: str
    tags: tuple[str, ...] = ()


LABELLING: Mapping[str, Measure] = {
    "maskmill_images": Measure("counter", "Rows written, by status", ("status",)),
    "maskmill_images_left": Measure("gauge", "Images without a row"),
    "maskmill_images_per_second": Measure("gauge", "Rows written per second lately"),
    "maskmill_stage_seconds": Measure(
        "counter",
        "Seconds of all workers by stage: fetch (waiting for bytes), decode, model, encode, write",
        ("stage",),
    ),
    "maskmill_workers_busy": Measure("gauge", "Share of the time that the model works, 0 to 1"),
    "maskmill_batch_size": Measure("gauge", "Images a call of the model lately"),
}
TRAINING: Mapping[str, Measure] = {
    "maskmill_training_step": Measure("gauge", "Updates done"),
    "maskmill_training_samples_per_second": Measure("gauge", "Samples per second of all workers"),
    "maskmill_training_loss": Measure("gauge", "Mean loss since the line of figures before"),
    "maskmill_training_data_wait": Measure("gauge", "Share of the time that it waits for samples, 0 to 1"),
}
MEASURES: Mapping[str, Measure] = {**LABELLING, **TRAINING}


def exported_name(name: str) -> str:
    """The name under which Prometheus sees a metric."""
    return f"ray_{name}{'_total' if MEASURES[name].kind == 'counter' else ''}"


class _Metrics:
    """Ray's metrics by name, for one run. Ray must have been started."""

    def __init__(self, job: str, run_id: str, measures: Mapping[str, Measure]) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"job": job, "run": run_id}
        kinds = {"counter": Counter, "gauge": Gauge}
        self._metrics: dict[str, Any] = {}
        for name, measure in measures.items():
            metric = kinds[measure.kind](name, measure.about, tag_keys=(*tags, *measure.tags))
            self._metrics[name] = metric.set_default_tags(tags)

    def add(self, name: str, value: float, **tags: str) -> None:
        """Increase a counter; Ray refuses an increase by 0."""
        if value > 0:
            self._metrics[name].inc(value, tags)

    def set(self, name: str, value: float | None) -> None:
        """Set a gauge, if there is a value."""
        if value is not None:
            self._metrics[name].set(value)


class LabellingMetrics:
    """Records the progress of a labelling run.

    Args:
        run_id: of the run.
        total: images to label.
        slots: calls of the model that run at once.
        clock: tells the time in seconds.
    """

    def __init__(
        self, run_id: str, total: int, slots: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._metrics = _Metrics("label", run_id, LABELLING)
        self._total = total
        self._slots = slots
        self._clock = clock
        self._last = self._gauged = Progress()
        self._gauged_at = clock()

    def update(self, progress: Progress) -> None:
        """Record what is new since the previous call."""
        new, old = _totals(progress), _totals(self._last)
        for (name, tag, value), count in new.items():
            self._metrics.add(name, count - old.get((name, tag, value), 0.0), **{tag: value})
        self._last = progress
        self._metrics.set("maskmill_images_left", max(0, self._total - progress.done))
        now = self._clock()
        if now - self._gauged_at < EVERY_S:
            return
        took, before = now - self._gauged_at, self._gauged
        done, calls = progress.done - before.done, progress.batches - before.batches
        self._metrics.set("maskmill_images_per_second", max(0, done) / took)
        busy = (progress.label_s - before.label_s) / (took * self._slots)
        self._metrics.set("maskmill_workers_busy", min(1.0, busy))
        self._metrics.set("maskmill_batch_size", done / calls if calls > 0 and done > 0 else None)
        self._gauged, self._gauged_at = progress, now


def _totals(progress: Progress) -> dict[tuple[str, str, str], float]:
    """The values of the counters, by metric, name of the tag and its value."""
    seconds = {
        "fetch": progress.fetch_s,
        "decode": progress.decode_s - progress.fetch_s,
        "model": progress.label_s,
        "encode": progress.encode_s - progress.write_s,
        "write": progress.write_s,
    }
    failed = sum(progress.failures.values())
    counts = {"ok": progress.done - failed, **progress.failures}
    return {("maskmill_stage_seconds", "stage", stage): value for stage, value in seconds.items()} | {
        ("maskmill_images", "status", status): count for status, count in counts.items()
    }


class TrainingMetrics:
    """Records the figures of a training.

    Args:
        job: such as ``train maskclip-plus``.
        run_id: of the run.
    """

    def __init__(self, job: str, run_id: str) -> None:
        self._metrics = _Metrics(job, run_id, TRAINING)

    def update(self, line: Mapping[str, Any]) -> None:
        """Record a line of ``metrics.jsonl``."""
        for name in ("step", "samples_per_second", "loss", "data_wait"):
            self._metrics.set(f"maskmill_training_{name}", line.get(name))
