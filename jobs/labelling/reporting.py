"""What a labelling run tells: on the terminal, in MLflow, and to who watches it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from jobs.console import LabelDisplay
from jobs.labelling.estimate import Estimate
from pipeline.cluster.metrics import LabellingMetrics
from pipeline.cluster.nodes import live_nodes
from pipeline.corpus.corpus import Corpus
from pipeline.files.redaction import without_signature
from pipeline.files.status import StatusFile
from pipeline.files.storage import Storage
from pipeline.labelling.recipes import LabelRecipe
from pipeline.ontology.ontology import Ontology
from pipeline.table.committed import LABELS_DIR
from pipeline.table.increment import Choice
from pipeline.table.labels import DATASET_FILE, OK
from pipeline.table.record import TableRecord
from pipeline.tracking.names import place_name, recipe_name, record_params, run_name
from pipeline.tracking.progress import ProgressLog
from pipeline.tracking.tracker import TrackedDataset, Tracker

if TYPE_CHECKING:
    from pipeline.cluster.progress import Progress
    from pipeline.cluster.resources import Compute


def announcement(recipe: LabelRecipe, ontology: Ontology, output: str, total: int, choice: Choice) -> str:
    """What the run is going to do; ``total`` images are in its corpus."""
    count, again = choice.count, choice.again
    images = "image" if total == 1 else "images"
    what = f"{count:,} {images}" if count == total else f"{count - again:,} new of {total:,} {images}"
    if again:
        what = f"{again:,} images again" + (f" and {count - again:,} new ones" if count > again else "")
    toy = " (a toy: it knows the toy world only)" if recipe.model == "toyclip" else ""
    return f"Labelling {what} with {ontology.num_classes} classes, {recipe.model}{toy} → {output}"


def workers(compute: Compute) -> str:
    """What labels, in words."""
    at_once = f", {compute.calls} images at a time" if compute.calls > 1 else ""
    return f"{compute.actors} CLIP worker(s) on {'GPU' if compute.gpus else 'CPU'}{at_once}"


def progress_reports(
    display: LabelDisplay,
    tracker: Tracker,
    status: StatusFile,
    run_id: str,
    count: int,
    compute: Compute,
    *,
    joined: bool,
) -> Callable[[Progress], None]:
    """A function that shows progress wherever it is shown, and records it.

    Args:
        display: on the terminal.
        tracker: in MLflow.
        status: for ``maskmill status``.
        run_id: names the run in the metrics for Prometheus.
        count: number of images to label.
        compute: the workers.
        joined: the run is on a cluster, whose machines are counted in the estimate.
    """
    log = ProgressLog(tracker)
    metrics = LabellingMetrics(run_id, count, compute.actors * compute.calls)
    estimate = Estimate(count, display.say, (lambda: len(live_nodes())) if joined else None)

    def report(progress: Progress) -> None:
        display.update(progress)
        log.update(progress)
        metrics.update(progress)
        estimate.update(progress)
        status.update(mlflow_run=tracker.run_id)

    return report


def busy_share(progress: Progress, compute: Compute) -> float:
    """Share of the time after start-up that the actors spent labelling; 0 if the run is too short to tell."""
    flowing = (progress.last_s or 0.0) - (progress.first_s or 0.0)
    return min(1.0, progress.label_s / (compute.actors * compute.calls * flowing)) if flowing > 1 else 0.0


def begin_tracking(
    tracker: Tracker,
    source: str,
    recipe: LabelRecipe,
    ontology: Ontology,
    output: str,
    tags: Mapping[str, str],
    *,
    corpus: Corpus,
    count: int,
) -> None:
    """Start the run in MLflow; ``count`` images are to be labelled."""
    source = without_signature(source)
    tracker.start(
        "label",
        run_name("label", recipe_name(recipe.to_dict()), place_name(source)),
        params={
            "recipe": recipe.to_dict() | {"hash": recipe.hash},
            "ontology": {"hash": ontology.hash, "classes": list(ontology.names)},
            "output": output,
        },
        tags=tags,
        dataset=TrackedDataset(
            source,
            corpus.digest(),
            source=source,
            profile={"images": corpus.num_rows, "new": count},
            context="labelling",
        ),
    )


def end_tracking(
    tracker: Tracker,
    record: TableRecord,
    outcome: Counter[str],
    progress: Progress,
    *,
    startup_s: float,
    busy: float,
) -> None:
    """Log the figures of a finished run.

    Args:
        tracker: the run in MLflow.
        record: of the table, with its counts.
        outcome: images of this run by status.
        progress: the last that the flow told.
        startup_s: seconds until the first image was labelled.
        busy: from ``busy_share``.
    """
    counts = record.counts
    tracker.log_params(record_params(record) | {"precision": record.precision})
    tracker.log_metrics(
        {
            "images_done": outcome.total(),
            "images_failed": outcome.total() - outcome[OK],
            "images_in_table": counts["images"],
            "images_per_second": progress.rate,
            "startup_seconds": startup_s,
            "workers_busy": busy,
            "mean_quality": counts["mean_quality"],
            "ignored_pixels": counts["ignored_pixels"] / counts["pixels"] if counts["pixels"] else None,
        },
        step=progress.done,
    )


def too_many_failed(outcome: Counter[str], max_failure_rate: float) -> str:
    """What to say if more images failed than may; else empty."""
    share = (outcome.total() - outcome[OK]) / max(outcome.total(), 1)
    if share <= max_failure_rate:
        return ""
    return f"{share:.1%} of the images failed, more than --max-failure-rate {max_failure_rate:.1%}."


def failures_by_code(outcome: Counter[str]) -> dict[str, int]:
    """How many images failed, by code."""
    return {code: count for code, count in sorted(outcome.items()) if code != OK}


def summary(storage: Storage, output: str, outcome: Counter[str], *, kept: int, busy: float) -> list[str]:
    """What came of a run, and what to do with it.

    Args:
        storage: the output.
        output: as the user named it.
        outcome: images of this run by status.
        kept: number of images that could not be read again, and kept their old labels.
        busy: from ``busy_share``.
    """
    lines = []
    if kept:
        lines.append(f"  {kept:,} could not be read this time; their old labels were kept")
    if busy:
        lines.append(f"  CLIP workers busy {busy:.0%} of the time")
    failures = failures_by_code(outcome)
    if failures:
        codes = ", ".join(f"{count:,} {code}" for code, count in failures.items())
        failed = sum(failures.values())
        lines.append(f"  {failed:,} failed: {codes} (rows with a status; `maskmill show` lists them)")
    coco = f"{output.rstrip('/')}-coco"
    return [
        *lines,
        f"  label table  {storage.uri}/{LABELS_DIR}/*.parquet",
        f"  its record   {storage.uri}/{DATASET_FILE}",
        f"Look at it:    maskmill show {shlex.quote(output)}",
        f"Export it:     maskmill export {shlex.quote(output)} --format coco --output {shlex.quote(coco)}",
    ]
