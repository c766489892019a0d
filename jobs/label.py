"""``maskmill label``: images and class names → a label table."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow as pa
from rich.console import Console

from jobs.console import LabelDisplay, duration, name_run, stderr_console, stop_at_once, timed
from jobs.estimate import Estimate
from jobs.options import (
    FLAT,
    Address,
    Flag,
    LabellingModel,
    Maybe,
    SystemMetrics,
    Tracking,
    Verbose,
    exactly_one,
    refuse_less_than_one,
    refuse_missing_file,
)
from models.errors import FailedWork, WrongUse
from pipeline.cluster.disks import Landmarks, require_shared
from pipeline.cluster.metrics import LabellingMetrics
from pipeline.cluster.nodes import live_nodes
from pipeline.cluster.session import joins_cluster, make_variables, ray_session, worker_precision
from pipeline.cluster.signals import signals_held
from pipeline.corpus.corpus import ADDRESS, Corpus
from pipeline.corpus.manifest import build_corpus
from pipeline.corpus.selection import some_of
from pipeline.corpus.spill import PARTITION
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.outputs import check_output_folder
from pipeline.files.records import now
from pipeline.files.redaction import without_signature
from pipeline.files.status import StatusFile, settle_status
from pipeline.files.storage import Storage, is_remote, open_storage
from pipeline.files.versions import versions
from pipeline.labelling.recipes import LabelRecipe, change_recipe, table_recipe, templates_for
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology, parse_classes
from pipeline.table.committed import CHECKPOINT_DIR, LABELS_DIR, RELABELLED_DIR, Replaced
from pipeline.table.increment import Choice, Table, choose, open_table, record_counts
from pipeline.table.labels import DATASET_FILE, OK, Counts
from pipeline.table.lease import Lease, refuse_other_holder
from pipeline.table.record import TableRecord, find_table_record, write_table_record
from pipeline.table.statistics import QualityScore
from pipeline.tracking.names import place_name, recipe_name, record_params, run_name
from pipeline.tracking.progress import ProgressLog
from pipeline.tracking.tracker import OFF, TrackedDataset, Tracker, open_tracker

if TYPE_CHECKING:
    from pipeline.cluster.progress import Progress
    from pipeline.cluster.resources import Compute
    from pipeline.labelling.labeller import PreparedLabeller
    from pipeline.labelling.rounds import Rounds

OWN_ENTRIES = (DATASET_FILE, LABELS_DIR, RELABELLED_DIR, CHECKPOINT_DIR, "manifest")
"""What a run writes to its output and ``overwrite`` may delete; older versions also wrote the last two."""
PACKAGES = (
    "maskmill",
    "torch",
    "open_clip_torch",
    "ray",
    "pyarrow",
    "pillow",
    "opencv-python-headless",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class Label:
    """Label images with class names: images in, a label table (Parquet) out.

    Run the same command again to resume after a crash or to label new images.

    Attributes:
        images: folder, glob ("photos/*.jpg"), list file (.txt, one path or URI per line; .csv, .jsonl,
            .parquet), COCO's .json, .tar archives (WebDataset), or Parquet files with images.
        manifest: manifest in Parquet (columns id, uri), instead of --images; maskmill manifest makes one.
        limit: for a try: only the first N images. Run again without it for the others.
        sample: for a try: only N images at random; a larger sample holds a smaller one.
        output: folder (or s3://… prefix) for the label table.
        classes: class names, separated by commas: "cat, dog, grass". Everything else becomes "background".
        ontology: YAML file of classes, or a built-in name (voc21, context59, …), instead of --classes.
        background: give every pixel one of the named classes.
        min_confidence: pixels below this confidence (0 to 1) become "ignore" (255).
        max_failure_rate: exit with 1 if a larger share of the images of this run fails.
        changed: also label again the images that have changed under their names since they were labelled.
        retry_failed: label again the images that failed, and only these; codes choose some ("--retry-failed
            not_found unavailable").
        overwrite: delete a table that is already in --output and start over.
    """

    images: Maybe[str] = None
    manifest: Maybe[str] = None
    limit: Maybe[int] = None
    sample: Maybe[int] = None
    output: str
    classes: Maybe[str] = None
    ontology: Maybe[str] = None
    by: Annotated[LabellingModel, FLAT] = field(default_factory=LabellingModel)
    background: Flag = True
    min_confidence: Maybe[float] = None
    max_failure_rate: float = 0.05
    changed: Flag = False
    retry_failed: Maybe[tuple[str, ...]] = None
    overwrite: Flag = False
    tracking: Tracking = None
    system_metrics: SystemMetrics = False
    address: Address = None
    verbose: Verbose = False

    def run(self, console: Console | None = None) -> int:
        """Label the images that have no row yet; see ``label_images``."""
        source = exactly_one("--images", self.images, "--manifest", self.manifest, command="label")
        shares = {"--min-confidence": self.min_confidence, "--max-failure-rate": self.max_failure_rate}
        for option, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise WrongUse(
                    "wrong_use", f"{option} {share} is not between 0 and 1.", "Give a share, such as 0.05."
                )
        refuse_less_than_one(limit=self.limit, sample=self.sample)
        if self.overwrite and (self.changed or self.retry_failed is not None):
            raise WrongUse(
                "wrong_use",
                "--overwrite starts over; --changed and --retry-failed go on with a table.",
                "Leave one of them out.",
            )
        recipe, own = self.by.load()
        if self.min_confidence is not None:
            recipe = change_recipe(recipe, {"min_confidence": self.min_confidence})
        job = LabelJob(
            source=source,
            limit=self.limit,
            sample=self.sample,
            ontology=self._ontology(recipe, own),
            recipe=recipe,
            output=self.output,
            overwrite=self.overwrite,
            changed=self.changed,
            retry_failed=self.retry_failed,
            max_failure_rate=self.max_failure_rate,
            address=self.address,
            verbose=self.verbose,
            tracking=self.tracking,
            system_metrics=self.system_metrics,
        )
        return label_images(job, console)

    def _ontology(self, recipe: LabelRecipe, own: Ontology | None) -> Ontology:
        """The requested classes, else those of the model."""
        if own is not None and self.classes is None and self.ontology is None:
            return own
        exactly_one("--classes", self.classes, "--ontology", self.ontology, command="label")
        if self.classes is not None:
            background = "default" if self.background else None
            return parse_classes(self.classes, background=background, templates=templates_for(recipe, own))
        assert self.ontology is not None
        ontology = load_ontology(self.ontology)
        return ontology if self.background else Ontology.from_dict(ontology.to_dict() | {"background": None})


@dataclass(frozen=True, kw_only=True)
class LabelJob:
    """The input of a labelling run.

    Attributes:
        source: folder, glob, list file or manifest of the images.
        limit: only so many of them, from the first.
        sample: only so many of them, at random.
        ontology: the classes.
        recipe: every setting that changes the labels.
        output: folder or object-store prefix for the table.
        overwrite: first delete an existing table.
        changed: also label the images that have changed since they were labelled.
        retry_failed: label only images that failed: those with one of these codes, or all if there is none.
        max_failure_rate: share of failed images of the run above which the run counts as failed.
        address: of a Ray cluster; None joins the one in RAY_ADDRESS, or starts a local one.
        verbose: show Ray's own messages.
        tracking: MLflow URI, None for the default, ``off`` for none.
        system_metrics: also track the load of this machine.
        tags: of the run in MLflow.
    """

    source: str
    ontology: Ontology
    recipe: LabelRecipe
    output: str
    overwrite: bool = False
    changed: bool = False
    retry_failed: tuple[str, ...] | None = None
    max_failure_rate: float = 0.05
    address: str | None = None
    verbose: bool = False
    tracking: str | None = OFF
    system_metrics: bool = False
    limit: int | None = None
    sample: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)


def label_images(
    job: LabelJob, console: Console | None = None, *, done: Callable[[Progress], object] = lambda _: None
) -> int:
    """Label the images that have no row yet, and print a summary.

    Args:
        job: what to label.
        console: to print to; default: standard error.
        done: called once, if there was anything to label, with what the run took.

    Returns:
        0, or 1 if more than ``max_failure_rate`` of the images of this run failed.

    Raises:
        MaskMillError: for anything the user can fix.
    """
    console = console or stderr_console()
    began = time.monotonic()
    refuse_missing_file(job.recipe.pretrained)
    check_output_folder(job.output)
    make_variables(verbose=job.verbose)  # before the lease starts threads
    storage = open_storage(job.output)
    tracker = open_tracker(
        job.tracking, system_metrics=job.system_metrics, waiting=functools.partial(timed, console)
    )
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    corpus = some_of(build_corpus(job.source, notice=say, limit=job.limit), job.sample)
    with Lease.acquire(
        storage, on_lost=stop_at_once, cluster=joins_cluster(job.address), notice=say
    ) as lease:
        fence = functools.partial(refuse_other_holder, storage, lease.run_id)
        recorded = recorded_table(storage, job)
        if recorded is not None:
            job = replace(job, recipe=job.recipe.adopt(table_recipe(recorded)))
        replaces = job.overwrite and storage.exists(DATASET_FILE)
        table = Table() if replaces or recorded is None else open_table(storage, recorded, fence, say)
        choice = _choose(job, corpus, storage, table, console)
        if choice.count == 0:
            if table.counts is None:  # a run was killed before it could count
                record_counts(storage, table, Counts(), Replaced())
            settle_status(storage)
            say(f"{choice.nothing}\nLook at them: maskmill show {job.output}")
            return 0
        _refuse_unreachable(next(choice.rounds(1)).todo)
        name_run(console, lease.run_id)
        say(_announcement(job, corpus.num_rows, choice))
        with StatusFile(storage, "label", lease.run_id, fence=fence, notice=say) as status:
            display = LabelDisplay(choice.count, console, status)
            with tracker:
                with display.live(), _started(job, lease, recorded, display, status) as (prepared, compute):
                    if job.recipe.maskclip.classes.uncalibrated:
                        display.stage("measuring the scores of each class")
                        job, prepared = _calibrated(job, corpus, prepared, compute, display)
                    # Track only runs that got this far: earlier failures leave nothing.
                    _begin_tracking(tracker, job, corpus, choice.count)
                    if replaces:
                        for entry in OWN_ENTRIES:
                            storage.delete(entry)
                    if recorded is None:
                        write_table_record(storage, _new_record(job, prepared))
                    display.stage(f"starting {_workers(compute)}")
                    startup_s = time.monotonic() - began
                    slots = compute.actors * compute.calls
                    metrics = LabellingMetrics(lease.run_id, choice.count, slots)
                    nodes = (lambda: len(live_nodes())) if joins_cluster(job.address) else None
                    estimate = Estimate(choice.count, display.say, nodes)
                    report = _reporting(display, tracker, status, metrics, estimate)
                    score = recorded.quality if recorded else "classes"
                    rounds = _rounds(job, corpus, storage, lease.run_id, table, score, fence, display.say)
                    progress = rounds.label(choice, prepared, compute, report)
                    startup_s += progress.first_s or 0.0
                    display.stage("stopping Ray")
                with timed(console, "counting what is new", status):
                    record = rounds.commit()
                    outcome, kept = rounds.outcome, rounds.kept
                done(progress)
                took = time.monotonic() - began
                busy = _busy(progress, compute)
                _end_tracking(tracker, record, outcome, progress, startup_s=startup_s, busy=busy)
            rate = progress.rate
            speed = f" ({rate:.1f} images/s after {duration(startup_s)} of start-up)" if rate else ""
            lines = [f"Labelled {outcome[OK]:,} images in {duration(took)}{speed}"]
            too_many = _too_many(job, outcome)
            status.update(
                done=outcome.total(),
                total=choice.count,
                unit="images",
                per_second=rate,
                failures={code: count for code, count in outcome.items() if code != OK},
                mlflow_run=tracker.run_id,
            )
            status.finish("failed" if too_many else "ok", too_many or lines[0])
    if kept:
        lines.append(f"  {kept.total():,} could not be read this time; their old labels were kept")
    if busy:
        lines.append(f"  CLIP workers busy {busy:.0%} of the time")
    _summary(job, storage, outcome, lines, console)
    if too_many:
        console.print(too_many, style="bold red", soft_wrap=True, highlight=False)
        return 1
    return 0


def _too_many(job: LabelJob, outcome: Counter[str]) -> str:
    """What to say if more images failed than may; else empty."""
    share = (outcome.total() - outcome[OK]) / max(outcome.total(), 1)
    if share <= job.max_failure_rate:
        return ""
    return f"{share:.1%} of the images failed, more than --max-failure-rate {job.max_failure_rate:.1%}."


def recorded_table(storage: Storage, job: LabelJob) -> TableRecord | None:
    """The record of an existing table that this run extends; None for a new table.

    Raises:
        MaskMillError: ``output_differs`` or ``output_not_ours`` if the run cannot add to it.
    """
    recorded = find_table_record(storage)
    if recorded is not None and job.overwrite:
        return None
    if recorded is None:
        if storage.list(LABELS_DIR, recursive=True):
            raise WrongUse(
                "output_not_ours",
                f"{storage.uri} has files in {LABELS_DIR}/ but no {DATASET_FILE} that says what they are.",
                f"Name another --output, or put {DATASET_FILE} back if this is a label table.",
            )
        return None
    changed = job.recipe.differences(table_recipe(recorded))
    if recorded.ontology.hash != job.ontology.hash:
        changed.append("the classes (ontology) differ")
    if changed:
        raise WrongUse(
            "output_differs",
            f"{storage.uri} was labelled differently: {'; '.join(changed)}.",
            "One table holds one kind of label. Name another --output, go back to the recorded recipe and "
            "classes, or delete the old table and start over with --overwrite.",
        )
    return recorded


def _choose(job: LabelJob, corpus: Corpus, storage: Storage, table: Table, console: Console) -> Choice:
    if not (job.changed and table.index):
        return choose(corpus, storage, table, retry_failed=job.retry_failed)
    with console.status("looking for changed images") as status:
        choice = choose(
            corpus,
            storage,
            table,
            retry_failed=job.retry_failed,
            changed=True,
            progress=lambda done: status.update(f"compared {done:,} images"),
        )
    if choice.lost:
        console.print(choice.lost, soft_wrap=True, highlight=False)
    return choice


def _refuse_unreachable(todo: pa.Table) -> None:
    """Ask for one remote image: what would fail for all of them is told before Ray starts.

    Of a web address nothing follows for the others.

    Raises:
        MaskMillError: ``storage_unreachable``.
    """
    (first,) = todo.slice(0, 1).to_pylist()
    address = first.get(ADDRESS) or first["uri"]
    if not is_remote(address) or address.startswith(("http://", "https://")):
        return
    try:
        fetch(address, length=1)
    except ImageError as error:
        if error.code == "unavailable" or "credentials" in error.message:
            raise FailedWork(
                "storage_unreachable",
                f"{first['uri']} cannot be read: {error.message}",
                "Check the network, the endpoint (for S3: AWS_ENDPOINT_URL) and the credentials.",
            ) from error


def _announcement(job: LabelJob, total: int, choice: Choice) -> str:
    count, again = choice.count, choice.again
    images = "image" if total == 1 else "images"
    what = f"{count:,} {images}" if count == total else f"{count - again:,} new of {total:,} {images}"
    if again:
        what = f"{again:,} images again" + (f" and {count - again:,} new ones" if count > again else "")
    toy = " (a toy: it knows the toy world only)" if job.recipe.model == "toyclip" else ""
    return f"Labelling {what} with {job.ontology.num_classes} classes, {job.recipe.model}{toy} → {job.output}"


@contextlib.contextmanager
def _started(
    job: LabelJob, lease: Lease, recorded: TableRecord | None, display: LabelDisplay, status: StatusFile
) -> Iterator[tuple[PreparedLabeller, Compute]]:
    """Start Ray while a thread embeds the class names. Missing weights fail before anything starts."""
    precision = table_recipe(recorded).precision if recorded else job.recipe.precision
    # On a cluster, "auto" depends on the machines that do the work.
    asks_cluster = precision == "auto" and joins_cluster(job.address)
    with contextlib.ExitStack() as stack:
        thread = ThreadPoolExecutor(1, "embedding")
        stack.callback(thread.shutdown, wait=False)  # do not wait for it after Ctrl-C
        preparing: Future[PreparedLabeller] | None = None

        def begin() -> None:
            nonlocal preparing
            display.stage("reading weights")
            if not asks_cluster:
                preparing = _begin_preparing(thread, job, precision, recorded)
            display.stage("embedding class names, starting Ray")
            status.begin()

        if not job.verbose:
            # Ray prints there that a process died; the run goes on, or ends with words of its own.
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        compute = stack.enter_context(
            ray_session(
                lease.run_id, address=job.address, verbose=job.verbose, notice=display.say, begin=begin
            )
        )
        if preparing is None:
            preparing = _begin_preparing(thread, job, worker_precision(compute), recorded)
        prepared = preparing.result()
        _refuse_others_beside(job, prepared, recorded)
        require_shared(
            Landmarks.copies(prepared.files),
            "The weights of the model are",
            "Put the model into an object store, or a copy of it on each node in the same place.",
        )
        yield prepared, compute


def _begin_preparing(
    thread: ThreadPoolExecutor, job: LabelJob, precision: str, recorded: TableRecord | None
) -> Future[PreparedLabeller]:
    """Start a thread that finds the weights and embeds the class names; return once the weights are found.

    Raises:
        MaskMillError: as ``pipeline.labelling.prepare.prepare_labeller`` up to finding the weights;
            ``output_differs`` if they are not those of the table. The future raises later errors.
    """
    known: Future[None] = Future()

    def check(fingerprint: str) -> None:
        theirs = recorded.weights["fingerprint"] if recorded else fingerprint
        if theirs != fingerprint:
            raise WrongUse(
                "output_differs",
                f"{job.output} was labelled with other weights of {job.recipe.model} ({theirs[:12]}, now "
                f"{fingerprint[:12]}).",
                "Give the same weights, or name another --output.",
            )
        known.set_result(None)

    def prepare() -> PreparedLabeller:
        from pipeline.labelling.prepare import prepare_labeller

        recipe = job.recipe
        if recipe.maskclip.classes.uncalibrated:
            from pipeline.labelling.calibrating import plain_scores

            recipe = plain_scores(recipe)
        return prepare_labeller(recipe, job.ontology, precision=precision, check_weights=check)

    preparing = thread.submit(prepare)
    first: list[Future[Any]] = [known, preparing]
    wait(first, return_when=FIRST_COMPLETED)
    if preparing.done():
        preparing.result()
    return preparing


def _refuse_others_beside(job: LabelJob, prepared: PreparedLabeller, recorded: TableRecord | None) -> None:
    """Refuse a memory or a helper that has changed since the table was begun.

    Raises:
        MaskMillError: ``output_differs``.
    """
    for name in ("memory", "helper"):
        if recorded is not None and recorded.weights.get(name) != prepared.weights.get(name):
            raise WrongUse(
                "output_differs",
                f"{job.output} was labelled when the recipe's {name} was another than now.",
                "Name another --output, or start over with --overwrite.",
            )


def _calibrated(
    job: LabelJob, corpus: Corpus, plain: PreparedLabeller, compute: Compute, display: LabelDisplay
) -> tuple[LabelJob, PreparedLabeller]:
    """Measure the classes' scores on a sample of the corpus; the job and the Labeller with what was found."""
    with signals_held():
        from pipeline.labelling.calibrating import calibrated, count_corpus
        from pipeline.labelling.prepare import prepare_labeller
    workers = max(1, compute.actors * compute.calls)
    counted = count_corpus(job.recipe, corpus, plain, workers=workers, notice=display.say)
    job = replace(job, recipe=calibrated(job.recipe, counted))
    return job, prepare_labeller(job.recipe, job.ontology, precision=plain.precision)


def _workers(compute: Compute) -> str:
    at_once = f", {compute.calls} images at a time" if compute.calls > 1 else ""
    return f"{compute.actors} CLIP worker(s) on {'GPU' if compute.gpus else 'CPU'}{at_once}"


def _rounds(
    job: LabelJob,
    corpus: Corpus,
    storage: Storage,
    run_id: str,
    table: Table,
    score: QualityScore,
    fence: Callable[[], None],
    say: Callable[[str], None],
) -> Rounds:
    with signals_held():
        from pipeline.labelling.rounds import Rounds
    return Rounds(
        storage=storage,
        run_id=run_id,
        table=table,
        recipe=job.recipe,
        ontology=job.ontology,
        score=score,
        # By what the table will hold: a run may have little left to do of much.
        large=corpus.num_rows >= PARTITION,
        joined=joins_cluster(job.address),
        fence=fence,
        notice=say,
    )


def _busy(progress: Progress, compute: Compute) -> float:
    """Share of the time after start-up that the actors spent labelling; 0 if the run is too short to tell."""
    flowing = (progress.last_s or 0.0) - (progress.first_s or 0.0)
    return min(1.0, progress.label_s / (compute.actors * compute.calls * flowing)) if flowing > 1 else 0.0


def _new_record(job: LabelJob, prepared: PreparedLabeller) -> TableRecord:
    """The first ``dataset.json`` of a new table."""
    recipe = job.recipe.replace(precision=prepared.precision)
    return TableRecord(
        created=now(),
        ontology=job.ontology,
        recipe=recipe.to_dict() | {"hash": recipe.hash},
        weights=prepared.weights,
        precision=prepared.precision,
        versions=versions(PACKAGES),
    )


def _reporting(
    display: LabelDisplay,
    tracker: Tracker,
    status: StatusFile,
    metrics: LabellingMetrics,
    estimate: Estimate,
) -> Callable[[Progress], None]:
    """Show progress, and record it."""
    log = ProgressLog(tracker)

    def report(progress: Progress) -> None:
        display.update(progress)
        log.update(progress)
        metrics.update(progress)
        estimate.update(progress)
        status.update(mlflow_run=tracker.run_id)

    return report


def _begin_tracking(tracker: Tracker, job: LabelJob, corpus: Corpus, todo: int) -> None:
    source = without_signature(job.source)
    tracker.start(
        "label",
        run_name("label", recipe_name(job.recipe.to_dict()), place_name(source)),
        params={
            "recipe": job.recipe.to_dict() | {"hash": job.recipe.hash},
            "ontology": {"hash": job.ontology.hash, "classes": list(job.ontology.names)},
            "output": job.output,
        },
        tags=job.tags,
        dataset=TrackedDataset(
            source,
            corpus.digest(),
            source=source,
            profile={"images": corpus.num_rows, "new": todo},
            context="labelling",
        ),
    )


def _end_tracking(
    tracker: Tracker,
    record: TableRecord,
    outcome: Counter[str],
    progress: Progress,
    *,
    startup_s: float,
    busy: float,
) -> None:
    counts = record.counts
    tracker.log_params(record_params(record) | {"precision": record.precision})
    tracker.log_metrics(
        {
            "images_done": outcome.total(),
            "images_failed": outcome.total() - outcome["ok"],
            "images_in_table": counts["images"],
            "images_per_second": progress.rate,
            "startup_seconds": startup_s,
            "workers_busy": busy,
            "mean_quality": counts["mean_quality"],
            "ignored_pixels": counts["ignored_pixels"] / counts["pixels"] if counts["pixels"] else None,
        },
        step=progress.done,
    )


def _summary(
    job: LabelJob, storage: Storage, outcome: Counter[str], lines: list[str], console: Console
) -> None:
    failed = outcome.total() - outcome["ok"]
    if failed:
        codes = ", ".join(f"{count:,} {code}" for code, count in sorted(outcome.items()) if code != "ok")
        lines.append(f"  {failed:,} failed: {codes} (rows with a status; `maskmill show` lists them)")
    coco = f"{job.output.rstrip('/')}-coco"
    lines += [
        f"  label table  {storage.uri}/{LABELS_DIR}/*.parquet",
        f"  its record   {storage.uri}/{DATASET_FILE}",
        f"Look at it:    maskmill show {shlex.quote(job.output)}",
        f"Export it:     maskmill export {shlex.quote(job.output)} --format coco "
        f"--output {shlex.quote(coco)}",
    ]
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
