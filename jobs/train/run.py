"""What all ``maskmill train`` commands share: one run, from the lease to the summary.

A run without workers trains in this process; with workers, or on a cluster, it uses Ray Train.
``jobs.train.maskclip_plus`` and ``jobs.train.clipseg`` define what is trained (``prepare``) and how the
result is written (``Prepared.finish``).
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from tyro.conf import Suppress

from jobs.console import TrainDisplay, duration, name_run, stderr_console, timed
from jobs.options import Address, Flag, Maybe, SystemMetrics, Tracking, Verbose
from models.errors import Damaged, FailedWork, MaskMillError, WrongUse
from pipeline.cluster.session import joins_cluster, make_variables
from pipeline.files.outputs import check_output_folder
from pipeline.files.recipes import Recipe
from pipeline.files.status import StatusFile, settle_status
from pipeline.files.storage import Storage, open_storage
from pipeline.report.training_page import PAGE
from pipeline.table.lease import RUN_ID_VARIABLE, Lease, end_orphans, refuse_other_holder
from pipeline.tracking.names import flatten, place_name, run_name
from pipeline.tracking.tracker import TrackedDataset, Tracker, open_tracker
from pipeline.training.loop.checkpoints import (
    CHECKPOINTS_DIR,
    SETTINGS_FILE,
    BrokenCheckpoint,
    CheckpointStore,
)

if TYPE_CHECKING:
    from pipeline.datasets.base import Dataset
    from pipeline.training.loop.checkpoints import Checkpoint
    from pipeline.training.loop.driver import Outcome
    from pipeline.training.loop.protocols import Samples, Task
    from pipeline.training.loop.resources import TrainingCompute
    from pipeline.training.loop.settings import LoopSettings

INTERRUPTED = 130
COPYING = "copying the model into MLflow"
_NEVER_LOGGED = "model_unsupported"
"""Error code of a model that MLflow cannot store, so that retrying is pointless."""
PACKAGES = (
    "maskmill",
    "torch",
    "torchvision",
    "timm",
    "open_clip_torch",
    "ray",
    "numpy",
    "opencv-python-headless",
)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Where a training run writes, executes and is tracked.

    Attributes:
        output: folder (or s3://… prefix, without a page) for the model, its checkpoints and its page; on a
            cluster all nodes must see it, and the training data.
        workers: training processes; default: one per GPU, or this process alone.
        overwrite: delete the run in --output and start over.
        register: register the model in MLflow under this name, as challenger; without it, no model is copied
            into MLflow.
        tags: of the run in MLflow; not an option.
    """

    output: str
    workers: Maybe[int] = None
    overwrite: Flag = False
    register: Maybe[str] = None
    tracking: Tracking = None
    system_metrics: SystemMetrics = False
    address: Address = None
    verbose: Verbose = False
    tags: Annotated[Mapping[str, str], Suppress] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A training run that is ready to start.

    Attributes:
        make_task: picklable factory of the task.
        samples: the training data.
        settings: the optimisation settings.
        identity: what else must stay the same when the run resumes.
        announcement: one line to print before it starts.
        params: for MLflow.
        dataset: for MLflow.
        finish: given the final checkpoint and facts about the training, writes the result into the output,
            overwriting, ``result_file`` last. Runs without Ray.
        write_pages: given the local folder of a finished run and the lines of its ``metrics.jsonl``, writes
            ``PAGE`` and its pictures there, ``PAGE`` last, and returns the files.
        commands: commands that use the result, by purpose.
        reads: some of the files that workers read, by which other nodes show that they see them all.
        log_model: copies the result into MLflow, given run id and registry name; None if it cannot be.
        fallback: error code after which the newest milestone still yields a result.
    """

    make_task: Callable[[], Task]
    samples: Samples
    settings: LoopSettings
    identity: Mapping[str, Any]
    announcement: str
    params: Mapping[str, Any]
    dataset: TrackedDataset
    finish: Callable[[Checkpoint, Mapping[str, Any]], Finished]
    write_pages: Callable[[Path, list[Mapping[str, Any]]], Sequence[str]]
    commands: Mapping[str, str]
    reads: Sequence[str] = ()
    log_model: Callable[[str, str], str] | None = None
    fallback: str = ""


@dataclass(frozen=True)
class Finished:
    """What a finished run produced.

    Attributes:
        lines: summary lines that say where each file is.
        metrics: for MLflow.
        artifacts: local files for MLflow.
    """

    lines: Sequence[str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    artifacts: Sequence[str] = ()


def run_training(
    kind: str,
    options: TrainOptions,
    prepare: Callable[[], Prepared],
    *,
    result_file: str,
    own_entries: Sequence[str],
    console: Console | None = None,
) -> int:
    """Train or resume, write the result, and print a summary.

    Args:
        kind: kind of training, for the name of the run.
        prepare: opens weights and data, so that mistakes show before Ray starts and before anything is
            written.
        result_file: the file that a finished run writes last.
        own_entries: what a run writes into its output, and what ``overwrite`` may delete.

    Returns:
        0; 130 if it was stopped on request and can be resumed; 1 if only the page of a finished run was
        missing and it cannot be written.

    Raises:
        MaskMillError: for everything that the user can fix.
    """
    console = console or stderr_console()
    if options.workers is not None and options.workers < 0:
        raise WrongUse(
            "wrong_use", f"--workers {options.workers} is not a number of processes.", "Give 0 or more."
        )
    check_output_folder(options.output)
    storage = open_storage(options.output)
    tracker = open_tracker(
        options.tracking, system_metrics=options.system_metrics, waiting=functools.partial(timed, console)
    )
    if options.register and not tracker.on:
        raise WrongUse(
            "wrong_use",
            f"A model cannot be registered as {options.register} while tracking is off.",
            "Leave --register out, or name an MLflow server: --tracking URI.",
        )
    on_cluster = joins_cluster(options.address)
    make_variables(verbose=options.verbose)  # before torch and the lease start threads
    _refuse_foreign(storage, result_file, own_entries)
    with timed(console, "reading weights and labels"):
        prepared = prepare()
    with Lease.acquire(storage, on_lost=_abandon, cluster=on_cluster) as lease:
        _refuse_foreign(storage, result_file, own_entries)
        if storage.exists(result_file) and not options.overwrite:
            done = _already_finished(kind, options, prepared, result_file, storage, tracker, console)
            settle_status(storage)
            return done
        fence = functools.partial(refuse_other_holder, storage, lease.run_id)
        say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
        with StatusFile(storage, f"train {kind}", lease.run_id, fence=fence, notice=say) as status:
            return _run(kind, options, prepared, storage, lease, own_entries, tracker, status, console)


def _refuse_foreign(storage: Storage, result_file: str, own_entries: Sequence[str]) -> None:
    """Refuse a folder that has entries with our names but no training run of ours."""
    ours = (result_file, f"{CHECKPOINTS_DIR}/{SETTINGS_FILE}")
    if any(storage.exists(entry) for entry in ours):
        return
    foreign = [entry for entry in own_entries if storage.exists(entry) or storage.list(entry)]
    if foreign:
        raise WrongUse(
            "output_not_ours",
            f"{storage.uri} has {', '.join(foreign)}, which no maskmill training has written.",
            "Name another --output.",
        )


def _already_finished(
    kind: str,
    options: TrainOptions,
    prepared: Prepared,
    result_file: str,
    storage: Storage,
    tracker: Tracker,
    console: Console,
) -> int:
    """Handle a run that has finished: add a missing page, register the model, or refuse other settings."""
    CheckpointStore(storage).claim(must_match(prepared))
    lines = [f"Nothing to do: the training in {storage.uri} is finished ({result_file})."]
    status = 0
    if storage.is_local and not storage.exists(PAGE):
        from pipeline.training.loop.driver import METRICS_FILE

        if storage.exists(METRICS_FILE):
            with timed(console, "writing the page"):
                pages, messages = write_pages(prepared, storage)
            lines = [
                f"The training in {storage.uri} is finished ({result_file}); its page was missing.",
                *messages,
            ]
            status = 0 if pages else 1
        else:
            lines.append(f"  no page        its curves are gone with {METRICS_FILE}; the model is intact")
    stopped = storage.read_json(result_file, {}).get("training", {}).get("stopped")
    if stopped:
        console.print("\n".join(lines), soft_wrap=True, highlight=False)
        raise FailedWork(
            str(stopped).partition(":")[0],
            f"The training in {storage.uri} was stopped ({stopped}); its result is from the last good step.",
            "Train anew with other settings: name another --output, or add --overwrite.",
        )
    if options.register and prepared.log_model is not None:
        with tracker:
            _begin_tracking(tracker, kind, options, prepared, storage, workers=None)
            with timed(console, COPYING):
                lines += log_model(prepared.log_model, tracker, options.register)
    else:
        lines.append("Name another --output for another run, or train anew with --overwrite.")
    console.print("\n".join(lines), soft_wrap=True, highlight=False)
    return status


def _run(
    kind: str,
    options: TrainOptions,
    prepared: Prepared,
    storage: Storage,
    lease: Lease,
    own_entries: Sequence[str],
    tracker: Tracker,
    status: StatusFile,
    console: Console,
) -> int:
    began = time.monotonic()
    with tracker:
        outcome, error = _train(
            kind, options, prepared, storage, lease, own_entries, tracker, status, console
        )
        if outcome is not None and not outcome.finished:
            tracker.close("KILLED")
            status.finish("stopped", outcome.message)
            console.print(
                f"{outcome.message[:1].upper()}{outcome.message[1:]}.", soft_wrap=True, highlight=False
            )
            return INTERRUPTED
        trained_s = time.monotonic() - began
        lines = _finish(prepared, outcome, error, options, storage, tracker, status, console)
        if error is not None:
            console.print("\n".join(lines), highlight=False, soft_wrap=True)
            raise error
    assert outcome is not None
    speed = f" ({outcome.samples_per_second:.1f} samples/s)" if outcome.samples_per_second else ""
    summary = [f"Trained {outcome.step:,} steps in {duration(trained_s)}{speed}"]
    iterations = prepared.settings.iterations
    status.update(done=outcome.step, total=iterations, unit="steps", mlflow_run=tracker.run_id)
    status.finish("ok", summary[0])
    if outcome.resumed:
        summary.append(f"  resumed from step {outcome.resumed:,}")
    if outcome.data_wait is not None and outcome.data_wait > 0.1:
        summary.append(f"  waited for samples {outcome.data_wait:.0%} of the time: more CPUs would help")
    if outcome.failed_samples:
        summary.append(f"  {outcome.failed_samples:,} samples could not be loaded and were left out")
    console.print("\n".join([*summary, *lines]), highlight=False, soft_wrap=True)
    return 0


def must_match(prepared: Prepared) -> dict[str, Any]:
    """What must stay the same when a run resumes, under the names that an error lists."""
    return prepared.settings.effective() | dict(prepared.identity)


def recipe_identity(recipe: Recipe) -> dict[str, str]:
    """The fields of a recipe that change the result, by dotted name, for ``Prepared.identity``.

    Without those of the loop, which ``must_match`` adds.
    """
    fields = recipe.effective()
    return flatten({name: value for name, value in fields.items() if not name.startswith("loop.")})


def _begin_tracking(
    tracker: Tracker,
    kind: str,
    options: TrainOptions,
    prepared: Prepared,
    storage: Storage,
    *,
    workers: int | None,
) -> None:
    recipe = str(prepared.params["recipe"]["name"])
    tracker.start(
        "train",
        run_name(
            "train",
            recipe if recipe.startswith(kind) else f"{kind} {recipe}",
            f"{place_name(prepared.dataset.name)}, to {place_name(storage.uri)}",
        ),
        params={**prepared.params, "workers": workers, "output": options.output},
        tags=options.tags,
        dataset=prepared.dataset,
    )


def _train(
    kind: str,
    options: TrainOptions,
    prepared: Prepared,
    storage: Storage,
    lease: Lease,
    own_entries: Sequence[str],
    tracker: Tracker,
    status: StatusFile,
    console: Console,
) -> tuple[Outcome | None, MaskMillError | None]:
    """Run the loop; returns its outcome, or the error after which there is still a result."""
    from pipeline.cluster.metrics import TrainingMetrics
    from pipeline.cluster.session import joins_cluster

    name_run(console, lease.run_id)
    display = TrainDisplay(console, status)
    with display.live():
        display.stage("starting")
        if joins_cluster(options.address):  # whose nodes may take their time
            status.begin()
        with _compute(options, lease, display) as compute:
            from pipeline.training.loop.driver import train

            if compute.workers:
                _refuse_unshared(prepared, storage, lease)
            if options.overwrite:
                # Only now that weights, labels and Ray are known to be available.
                for entry in own_entries:
                    storage.delete(entry)
            _begin_tracking(tracker, kind, options, prepared, storage, workers=compute.workers)
            display.say(prepared.announcement)
            display.begin(prepared.settings.iterations, "starting the workers")

            status.begin()
            metrics = TrainingMetrics(f"train {kind}", lease.run_id) if compute.workers else None

            def report(line: dict[str, Any]) -> None:
                display.update(line)
                if metrics is not None:
                    metrics.update(line)
                status.update(mlflow_run=tracker.run_id)
                tracker.log_metrics(
                    {key: value for key, value in line.items() if key != "step"}, step=line["step"]
                )

            try:
                outcome = train(
                    prepared.make_task,
                    prepared.samples,
                    prepared.settings,
                    output=options.output,
                    compute=compute,
                    report=report,
                    notice=display.say,
                    identity=prepared.identity,
                    run_id=lease.run_id,
                )
            except MaskMillError as error:
                if error.code != prepared.fallback:
                    raise
                return None, error
            if compute.workers:
                display.stage("stopping Ray")
    return outcome, None


@contextlib.contextmanager
def _compute(options: TrainOptions, lease: Lease, display: TrainDisplay) -> Iterator[TrainingCompute]:
    """Plan the run's compute; start or join Ray only if there are workers."""
    from pipeline.cluster.session import ray_session
    from pipeline.training.loop.resources import plan_in_process, plan_training

    here = None if joins_cluster(options.address) else plan_in_process(options.workers)
    if here is not None:
        os.environ[RUN_ID_VARIABLE] = lease.run_id  # marks the loaders, in case this process is killed
        yield here
        return
    with ray_session(
        lease.run_id,
        address=options.address,
        verbose=options.verbose,
        notice=display.say,
        plan=functools.partial(plan_training, workers=options.workers),
    ) as compute:
        yield compute


def _refuse_unshared(prepared: Prepared, storage: Storage, lease: Lease) -> None:
    """Refuse to train on nodes that do not see the data, or the output.

    Raises:
        MaskMillError: ``disk_not_shared``.
    """
    from pipeline.cluster.disks import Landmarks, require_shared

    where = (
        "Put it into an object store (s3://…) or on a disk that all nodes share, or train without a cluster."
    )
    require_shared(Landmarks.of(prepared.reads), "The training data is", where)
    require_shared(Landmarks.of((), output=storage, run_id=lease.run_id), "The output is", where)


def places_read(tables: Iterable[str | None], truth: Dataset | None = None) -> list[str]:
    """``Prepared.reads`` of a training on label tables, of which some may be None, and on a dataset."""
    from pipeline.cluster.disks import files_of_table
    from pipeline.table.labels import table_files

    places = [
        place for table in tables if table for place in files_of_table(*table_files(table), images=True)
    ]
    samples = () if truth is None else truth.samples
    return places + [place for sample in samples for place in (sample.image, sample.truth) if place]


def _finish(
    prepared: Prepared,
    outcome: Outcome | None,
    error: MaskMillError | None,
    options: TrainOptions,
    storage: Storage,
    tracker: Tracker,
    status: StatusFile,
    console: Console,
) -> Sequence[str]:
    """Write the result from the last checkpoint, or after ``error`` from the last milestone."""
    store = CheckpointStore(storage)
    facts: dict[str, Any]
    if outcome is not None:
        checkpoint = _read(store, outcome.step)
        facts = {
            "iterations": outcome.step,
            "seconds": round(outcome.seconds, 1),
            "samples_per_second": outcome.samples_per_second,
            "data_wait": outcome.data_wait,
            "failed_samples": outcome.failed_samples,
            "stopped": None,
        }
    else:
        assert error is not None
        milestones = [step for step in prepared.make_task().milestones() if step in store.steps()]
        if not milestones:
            raise error
        try:
            checkpoint = store.read(max(milestones))
        except BrokenCheckpoint:
            raise error from None
        facts = {"iterations": checkpoint.step, "stopped": f"{error.code}: {error.message}"}
    with timed(console, "writing the model", status):
        finished = prepared.finish(checkpoint, facts)
    with timed(console, "writing the page", status):
        pages, messages = write_pages(prepared, storage, overwritten=options.overwrite)
    tracker.log_metrics({f"final/{key}": value for key, value in finished.metrics.items()}, checkpoint.step)
    for path in (*pages, *finished.artifacts):
        tracker.log_artifact(path)
    lines = [*finished.lines, *messages]
    if prepared.log_model is not None and options.register and tracker.on:
        with timed(console, COPYING):
            lines += log_model(prepared.log_model, tracker, options.register)
    width = max(len(purpose) for purpose in prepared.commands) + 2
    return [*lines, *(f"{purpose + ':':{width}}{command}" for purpose, command in prepared.commands.items())]


def write_pages(
    prepared: Prepared, storage: Storage, *, overwritten: bool = False
) -> tuple[Sequence[str], list[str]]:
    """Write the page; returns its files and summary lines. A failing page must not cost the user a model."""
    if not storage.is_local:
        return [], ["  no page        a page is only written to a local folder"]
    from pipeline.training.loop.driver import METRICS_FILE

    try:
        lines = [json.loads(line) for line in storage.read_bytes(METRICS_FILE).decode().splitlines()]
        pages = prepared.write_pages(Path(storage.path()), lines)
    except Exception as error:  # images, tables and disks may raise anything
        reason = error.message if isinstance(error, MaskMillError) else f"{type(error).__name__}: {error}"
        same = "The same command without --overwrite" if overwritten else "The same command"
        return [], [f"  no page        {reason}", f"                 {same} writes it without training."]
    return pages, [f"  {'picture' if path.endswith('.png') else 'page':14} {path}" for path in pages]


def _read(store: CheckpointStore, step: int) -> Checkpoint:
    try:
        return store.read(step)
    except BrokenCheckpoint as damage:
        raise Damaged(
            "file_damaged",
            f"The last checkpoint, {store.uri_of(step)}, cannot be used: {damage}",
            "Delete its folder and run the same command again: training resumes from the one before it.",
        ) from damage


def log_model(log_model: Callable[[str, str], str], tracker: Tracker, register_as: str) -> list[str]:
    """Copy the model into MLflow if it answers: a dead server must not cost the user a trained model."""
    run_id = tracker.wait_for_run(30)
    again = f"; once it is back: the same command with --register {shlex.quote(register_as)}"
    if run_id is None:
        return [f"  not in MLflow  the server does not answer{again}"]
    try:
        return [f"  MLflow model   {log_model(run_id, register_as)}"]
    except MaskMillError as error:
        hint = f" {error.remedy}" if error.code == _NEVER_LOGGED else again
        return [f"  not in MLflow  {error.message}{hint}"]
    except Exception as error:  # MLflow's stores may raise anything
        text = str(error).splitlines()[0][:200] if str(error) else ""
        return [f"  not in MLflow  {type(error).__name__}: {text}{again}"]


def _abandon(reason: str) -> None:
    """Exit at once, because another run owns the output now and its checkpoints must not be touched."""
    print(f"{reason} Stopping.", file=sys.stderr, flush=True)
    # A signal would request a checkpoint. Ray's processes here end with us, or the new owner ends them;
    # workers on a cluster end with their driver.
    end_orphans(os.environ.get(RUN_ID_VARIABLE, ""))
    os._exit(1)
