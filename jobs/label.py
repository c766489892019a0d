"""``maskmill label``: images and class names → a label table.

The story of a run is ``label_images``; its details are in ``jobs/labelling/``.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import pyarrow as pa
from rich.console import Console

from jobs.console import LabelDisplay, duration, name_run, stderr_console, stop_at_once, timed
from jobs.labelling.options import LabelOptions
from jobs.labelling.recorded import new_record, recorded_table
from jobs.labelling.reporting import (
    announcement,
    begin_tracking,
    busy_share,
    end_tracking,
    failures_by_code,
    progress_reports,
    summary,
    too_many_failed,
    workers,
)
from jobs.labelling.starting import calibrated, started
from jobs.options import (
    FLAT,
    Flag,
    LabellingModel,
    Maybe,
    exactly_one,
    refuse_less_than_one,
    refuse_missing_file,
)
from models.errors import FailedWork, WrongUse
from pipeline.cluster.session import joins_cluster, make_variables
from pipeline.cluster.signals import signals_held
from pipeline.corpus.corpus import ADDRESS, Corpus
from pipeline.corpus.manifest import build_corpus
from pipeline.corpus.selection import some_of
from pipeline.corpus.spill import PARTITION
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError
from pipeline.files.outputs import check_output_folder
from pipeline.files.status import StatusFile, settle_status
from pipeline.files.storage import Storage, is_remote, open_storage
from pipeline.labelling.recipes import LabelRecipe, change_recipe, table_recipe, templates_for
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology, parse_classes
from pipeline.table.committed import CHECKPOINT_DIR, LABELS_DIR, RELABELLED_DIR, Replaced
from pipeline.table.increment import Choice, Table, choose, open_table, record_counts
from pipeline.table.labels import DATASET_FILE, OK, Counts
from pipeline.table.lease import Lease, refuse_other_holder
from pipeline.table.record import write_table_record
from pipeline.tracking.tracker import open_tracker

if TYPE_CHECKING:
    from pipeline.cluster.progress import Progress

OWN_ENTRIES = (DATASET_FILE, LABELS_DIR, RELABELLED_DIR, CHECKPOINT_DIR, "manifest")
"""What a run writes to its output and ``overwrite`` may delete; older versions also wrote the last two."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Label images with class names: images in, a label table (Parquet) out.

    Run the same command again to resume after a crash or to label new images.

    Attributes:
        images: folder, glob ("photos/*.jpg"), list file (.txt, one path or URI per line; .csv, .jsonl,
            .parquet), COCO's .json, .tar archives (WebDataset), or Parquet files with images.
        manifest: manifest in Parquet (columns id, uri), instead of --images; maskmill manifest makes one.
        classes: class names, separated by commas: "cat, dog, grass". Everything else becomes "background".
        ontology: YAML file of classes, or a built-in name (voc21, context59, …), instead of --classes.
        background: give every pixel one of the named classes.
        min_confidence: pixels below this confidence (0 to 1) become "ignore" (255).
    """

    images: Maybe[str] = None
    manifest: Maybe[str] = None
    classes: Maybe[str] = None
    ontology: Maybe[str] = None
    background: Flag = True
    min_confidence: Maybe[float] = None
    by: Annotated[LabellingModel, FLAT] = field(default_factory=LabellingModel)
    options: Annotated[LabelOptions, FLAT]

    def run(self, console: Console | None = None) -> int:
        """Label the images that have no row yet; see ``label_images``."""
        options = self.options
        source = exactly_one("--images", self.images, "--manifest", self.manifest, command="label")
        shares = {"--min-confidence": self.min_confidence, "--max-failure-rate": options.max_failure_rate}
        for option, share in shares.items():
            if share is not None and not 0 <= share <= 1:
                raise WrongUse(
                    "wrong_use", f"{option} {share} is not between 0 and 1.", "Give a share, such as 0.05."
                )
        refuse_less_than_one(limit=options.limit, sample=options.sample)
        if options.overwrite and (options.changed or options.retry_failed is not None):
            raise WrongUse(
                "wrong_use",
                "--overwrite starts over; --changed and --retry-failed continue a table.",
                "Leave one of them out.",
            )
        recipe, own = self.by.load()
        if self.min_confidence is not None:
            recipe = change_recipe(recipe, {"min_confidence": self.min_confidence})
        return label_images(source, recipe, self._ontology(recipe, own), options, console=console)

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


def label_images(
    source: str,
    recipe: LabelRecipe,
    ontology: Ontology,
    options: LabelOptions,
    *,
    console: Console | None = None,
    done: Callable[[Progress], object] = lambda _: None,
) -> int:
    """Label the images that have no row yet, and print a summary.

    Args:
        source: folder, glob, list file or manifest of the images.
        recipe: every setting that changes the labels.
        ontology: the classes.
        options: where the table is written, which images are labelled, and how the run is run and tracked.
        console: to print to; default: standard error.
        done: called once, if there was anything to label, with what the run took.

    Returns:
        0, or 1 if more than ``max_failure_rate`` of the images of this run failed.

    Raises:
        MaskMillError: for anything the user can fix.
    """
    console = console or stderr_console()
    began = time.monotonic()
    output, joined = options.output, joins_cluster(options.address)
    refuse_missing_file(recipe.pretrained)
    check_output_folder(output)
    make_variables(verbose=options.verbose)  # before the lease starts threads
    storage = open_storage(output)
    tracker = open_tracker(
        options.tracking, system_metrics=options.system_metrics, waiting=functools.partial(timed, console)
    )
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    corpus = some_of(build_corpus(source, notice=say, limit=options.limit), options.sample)
    with Lease.acquire(storage, on_lost=stop_at_once, cluster=joined, notice=say) as lease:
        fence = functools.partial(refuse_other_holder, storage, lease.run_id)
        recorded = recorded_table(storage, recipe, ontology, overwrite=options.overwrite)
        if recorded is not None:
            recipe = recipe.adopt(table_recipe(recorded))
        replaces = options.overwrite and storage.exists(DATASET_FILE)
        table = Table() if replaces or recorded is None else open_table(storage, recorded, fence, say)
        choice = _choose(options, corpus, storage, table, console)
        if choice.count == 0:
            if table.counts is None:  # a run was killed before it could count
                record_counts(storage, table, Counts(), Replaced())
            settle_status(storage)
            say(f"{choice.nothing}\nLook at them: maskmill show {output}")
            return 0
        _refuse_unreachable(next(choice.rounds(1)).todo)
        name_run(console, lease.run_id)
        say(announcement(recipe, ontology, output, corpus.num_rows, choice))
        with StatusFile(storage, "label", lease.run_id, fence=fence, notice=say) as status:
            display = LabelDisplay(choice.count, console, status)
            beginning = started(recipe, ontology, options, recorded, lease.run_id, display, status)
            with tracker:
                with display.live(), beginning as (prepared, compute):
                    if recipe.maskclip.classes.uncalibrated:
                        display.stage("measuring the scores of each class")
                        recipe, prepared = calibrated(recipe, ontology, corpus, prepared, compute, display)
                    # Track only runs that got this far: earlier failures leave nothing.
                    begin_tracking(
                        tracker, source, recipe, ontology, output, options.tags,
                        corpus=corpus, count=choice.count,
                    )  # fmt: skip
                    if replaces:
                        for entry in OWN_ENTRIES:
                            storage.delete(entry)
                    if recorded is None:
                        write_table_record(storage, new_record(recipe, ontology, prepared))
                    display.stage(f"starting {workers(compute)}")
                    startup_s = time.monotonic() - began
                    report = progress_reports(
                        display, tracker, status, lease.run_id, choice.count, compute, joined=joined
                    )
                    with signals_held():
                        from pipeline.labelling.rounds import Rounds
                    rounds = Rounds(
                        storage=storage,
                        run_id=lease.run_id,
                        table=table,
                        recipe=recipe,
                        ontology=ontology,
                        score=recorded.quality if recorded else "classes",
                        # By what the table will hold: a run may have little left to do of much.
                        large=corpus.num_rows >= PARTITION,
                        joined=joined,
                        fence=fence,
                        notice=display.say,
                    )
                    progress = rounds.label(choice, prepared, compute, report)
                    startup_s += progress.first_s or 0.0
                    display.stage("stopping Ray")
                with timed(console, "counting what is new", status):
                    record = rounds.commit()
                    outcome = rounds.outcome
                done(progress)
                took, busy = time.monotonic() - began, busy_share(progress, compute)
                end_tracking(tracker, record, outcome, progress, startup_s=startup_s, busy=busy)
            rate = progress.rate
            speed = f" ({rate:.1f} images/s after {duration(startup_s)} of start-up)" if rate else ""
            labelled = f"Labelled {outcome[OK]:,} images in {duration(took)}{speed}"
            too_many = too_many_failed(outcome, options.max_failure_rate)
            status.update(
                done=outcome.total(),
                total=choice.count,
                unit="images",
                per_second=rate,
                failures=failures_by_code(outcome),
                mlflow_run=tracker.run_id,
            )
            status.finish("failed" if too_many else "ok", too_many or labelled)
    say("\n".join([labelled, *summary(storage, output, outcome, kept=rounds.kept.total(), busy=busy)]))
    if too_many:
        console.print(too_many, style="bold red", soft_wrap=True, highlight=False)
        return 1
    return 0


def _choose(
    options: LabelOptions, corpus: Corpus, storage: Storage, table: Table, console: Console
) -> Choice:
    if not (options.changed and table.index):
        return choose(corpus, storage, table, retry_failed=options.retry_failed)
    with console.status("looking for changed images") as status:
        choice = choose(
            corpus,
            storage,
            table,
            retry_failed=options.retry_failed,
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
