"""``maskmill retrain``: images that have arrived → labels, a candidate, a verdict, perhaps a new champion."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.console import duration, name_run, stderr_console, stop_at_once
from jobs.options import NO_HINT, Flag, Maybe, Verbose
from jobs.retrain.work import Work, decision_of, step_names, tell
from models.errors import FailedWork, MaskMillError, WrongUse, did_you_mean
from pipeline.cluster.session import joins_cluster
from pipeline.cluster.signals import interrupt
from pipeline.corpus.manifest import build_manifest
from pipeline.datasets.base import Dataset
from pipeline.files.outputs import check_output_folder
from pipeline.files.recipes import changed_fields
from pipeline.files.records import now
from pipeline.files.redaction import redact
from pipeline.files.status import StatusFile
from pipeline.files.storage import Storage, open_storage
from pipeline.retraining.config import (
    EXAMPLE_FILE,
    Retraining,
    open_evaluation,
    read_config,
    tracking_uri,
    write_example,
)
from pipeline.retraining.intake import (
    EXCLUDED_FILE,
    HELD_FILE,
    HELD_TABLE,
    NO_IMAGES,
    TABLE,
    Intake,
    begins,
    choose,
    clock,
    evaluation_ids,
    ids_of,
    joined,
    known_in,
    read_images,
    refuse_signed,
    taken_in,
    without,
    write_images,
)
from pipeline.retraining.record import (
    RECORD_FILE,
    RetrainedModel,
    RetrainingRecord,
    create_retraining,
    note_webhook,
    read_retraining,
)
from pipeline.retraining.state import Runner, StepState, Tick, lost_output, read_ticks
from pipeline.table.lease import Lease, refuse_other_holder

PROMOTED, REFUSED = 0, 3
OWN_ENTRIES = (TABLE, "tables", HELD_TABLE, "heldout-truth", "runs", "ledger", "corpus.parquet")
"""What a retraining writes into its output."""


@dataclass(frozen=True, kw_only=True)
class Retrain:
    """Retrain on what is new: label it, train, measure candidate and champion, promote the better one.

    Run it from a scheduler; an interrupted run resumes where it stopped. Exits with 0 if a candidate was
    promoted or nothing is new, 3 if one was refused, 1 if a step failed.

    Attributes:
        config: the configuration, a YAML file; --init writes one that explains every field.
        init: write a configuration to fill in, and do nothing else.
        abandon: give up an unfinished tick; the next one takes its images again.
        step: do this step alone, once those before it are done: intake, label, verify, train, evaluate, gate,
            register, promote or report; "train NAME" and so on if there are several models.
        accept_refusal: exit with 0 if a candidate was refused, for a scheduler that takes every other status
            for a failure and tries again.
        verbose: also show what the jobs and Ray say.
    """

    config: Annotated[Positional[str], arg(metavar="CONFIG"), NO_HINT] = EXAMPLE_FILE
    init: Flag = False
    abandon: Flag = False
    step: Annotated[Maybe[str], arg(metavar="NAME")] = None
    accept_refusal: Flag = False
    verbose: Verbose = False

    def run(self, console: Console | None = None) -> int:
        """Do one tick, or resume one.

        Returns:
            0 promoted, nothing new, or the step is done; 3 refused, unless that is accepted.

        Raises:
            MaskMillError: for anything the user can fix.
        """
        console = console or stderr_console()
        if self.init:
            file = write_example(self.config)
            console.print(
                f"Written: {file}. Fill it in, and run maskmill retrain {shlex.quote(str(file))}",
                soft_wrap=True,
                highlight=False,
            )
            return 0
        if self.abandon and self.step is not None:
            raise WrongUse("wrong_use", "--abandon and --step exclude each other.", "Give one of them.")
        config = read_config(self.config)
        status = retrain(
            config,
            console,
            file=os.path.abspath(self.config),
            verbose=self.verbose,
            abandon=self.abandon,
            step=self.step,
        )
        return PROMOTED if self.accept_refusal and status == REFUSED else status


def retrain(
    config: Retraining,
    console: Console,
    *,
    file: str | None = None,
    verbose: bool = False,
    abandon: bool = False,
    step: str | None = None,
) -> int:
    """Do one tick of a retraining, or resume one; see ``Retrain``.

    Args:
        file: of the configuration, for commands that are shown.
    """
    only = None if step is None else _step_named(config, step)
    say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
    check_output_folder(config.output)
    storage = open_storage(config.output)
    dataset = open_evaluation(config)
    with Lease.acquire(
        storage, on_lost=stop_at_once, cluster=joins_cluster(config.address), notice=say
    ) as lease:
        record = note_webhook(storage, _record_of(config, storage), config.webhook_env)
        ticks = list(read_ticks(storage))
        unfinished = ticks[-1] if ticks and ticks[-1].outcome is None else None
        fence = functools.partial(refuse_other_holder, storage, lease.run_id)
        if abandon:
            return _abandon(storage, unfinished, fence, say)
        loop = _Loop(config, dataset, storage, lease, record, ticks, console, say, file, verbose)
        if unfinished is not None:
            at = only or (unfinished.at.name if unfinished.at else "intake")
            say(f"Going on with tick {unfinished.run}, at step {at}.")
            return loop.tick(unfinished, None, only)
        if only not in (None, "intake"):
            raise WrongUse(
                "wrong_use",
                f"There is no unfinished tick whose step {only} could be done.",
                "Begin one with --step intake, or with maskmill retrain alone.",
            )
        found, why = loop.look()
        if found is None:
            say(f"Nothing to do for {config.name}: {why}.")
            return 0
        create_retraining(storage, record)
        number = f"{int(ticks[-1].run) + 1 if ticks else 1:04}"
        return loop.tick(Tick(run=number, created=now()), found, only)


def _step_named(config: Retraining, name: str) -> str:
    """The step that is meant: of a single model, the kind is enough.

    Raises:
        WrongUse: there is no such step.
    """
    names = step_names(config)
    short = f"{name} {config.models[0].folder}"
    if len(config.models) == 1 and name not in names and short in names:
        return short
    if name not in names:
        raise WrongUse(
            "wrong_use",
            f"There is no step {name}. {did_you_mean(name, names)}".rstrip(),
            f"Steps: {', '.join(names)}.",
        )
    return name


def _record_of(config: Retraining, storage: Storage) -> RetrainingRecord:
    """The record of the output, or the one to write if it is a new one.

    Raises:
        MaskMillError: ``output_differs``, ``output_not_ours``; as ``read_retraining``.
    """
    fixed = config.fixed()
    if not storage.exists(RECORD_FILE):
        foreign = [entry for entry in OWN_ENTRIES if storage.exists(entry)]
        if foreign:
            raise WrongUse(
                "output_not_ours",
                f"{storage.uri} has {', '.join(foreign)}, and no {RECORD_FILE} that says whose they are.",
                "Name another output.",
            )
        return RetrainingRecord(
            id=uuid.uuid4().hex,
            name=config.name,
            created=now(),
            models=tuple(
                RetrainedModel(name=config.registered(model), kind=model.kind) for model in config.models
            ),
            tracking=redact(tracking_uri(config)),
            fixed=fixed,
        )
    record = read_retraining(storage)
    differing = changed_fields(record.fixed, fixed)
    if differing:
        raise WrongUse(
            "output_differs",
            f"{storage.uri} was begun otherwise: {'; '.join(differing)}.",
            "Name another output; or go back to what it was begun with: its tables and ledger mean that.",
        )
    return record


def _abandon(
    storage: Storage, unfinished: Tick | None, fence: Callable[[], None], say: Callable[[str], None]
) -> int:
    if unfinished is None:
        say("There is no unfinished tick.")
        return 0
    concluded = [step.name for step in unfinished.steps if step.name.startswith("promote ") and step.outputs]
    if concluded:
        raise WrongUse(
            "wrong_use",
            f"Tick {unfinished.run} has its verdict already: {', '.join(concluded)} is done.",
            "Run it again without --abandon: little is left to do. To undo a promotion: maskmill rollback.",
        )
    Runner(storage, unfinished, fence=fence).write(outcome="abandoned", finished=now())
    say(f"Tick {unfinished.run} is given up; its images are new again.")
    return 0


class _Loop:
    """One run of a retraining, under its lease."""

    def __init__(
        self,
        config: Retraining,
        dataset: Dataset | None,
        storage: Storage,
        lease: Lease,
        record: RetrainingRecord,
        ticks: Sequence[Tick],
        console: Console,
        say: Callable[[str], None],
        file: str | None,
        verbose: bool,
    ) -> None:
        self._file = file
        self._config = config
        self._dataset = dataset
        self._storage = storage
        self._lease = lease
        self._record = record
        self._ticks = ticks
        self._console = console
        self._say = say
        self._verbose = verbose
        self._out_of_time = threading.Event()
        self._names: Sequence[str] = ()
        self._status: StatusFile

    # --- what is new ---

    def look(self, begun: str | None = None) -> tuple[Intake | None, str]:
        """What a tick would take in, or None and why there is none.

        Args:
            begun: number of a tick in progress: its own images count as new, and nothing has to be due.
        """
        config, storage = self._config, self._storage
        ticks = [tick for tick in self._ticks if tick.run != begun]
        manifest = build_manifest(config.images, notice=self._say)
        refuse_signed(manifest)
        held = ids_of(taken_in(storage, ticks, HELD_FILE))
        excluded = ids_of(read_images(storage, EXCLUDED_FILE))
        new = manifest
        for ids in (ids_of(taken_in(storage, ticks)), held, evaluation_ids(self._dataset), excluded):
            new = without(new, ids)
        last = next((tick.finished for tick in reversed(ticks) if tick.outcome != "abandoned"), None)
        starts, why = begins(new.num_rows, last, config.when, at=clock())
        if not starts and begun is None:
            return None, why
        found = choose(
            new,
            budget=config.when.budget.images,
            hold_out=config.evaluation.hold_out,
            held_before=len(held),
            known=known_in(storage, self._dataset),
        )
        starts, why = begins(found.new.num_rows + found.waiting, last, config.when, at=clock())
        if begun is not None or (starts and found.new.num_rows):
            return found, ""
        if found.excluded.num_rows:  # they need not be read again
            known = joined([read_images(storage, EXCLUDED_FILE), found.excluded])
            write_images(storage, EXCLUDED_FILE, known)
        return None, "; ".join([why or "too few new images to train on", *found.lines])

    # --- a tick ---

    def tick(self, tick: Tick, found: Intake | None, only: str | None = None) -> int:
        """Do a tick, or what is left of one, or one step of it; returns the exit status."""
        from jobs.retrain.steps import open_run, steps_of

        fence = functools.partial(refuse_other_holder, self._storage, self._lease.run_id)
        runner = Runner(self._storage, tick, fence=fence, began=self._began, ended=self._ended)
        work = Work(
            self._config,
            self._dataset,
            self._record,
            self._storage,
            self._lease,
            runner,
            self._console,
            self._say,
            lambda: found or self.look(tick.run)[0] or Intake(NO_IMAGES, NO_IMAGES, NO_IMAGES),
            self._file,
            self._verbose,
        )
        began = time.monotonic()
        run_id = self._lease.run_id
        with StatusFile(self._storage, "retrain", run_id, fence=fence, notice=self._say) as self._status:
            self._status.begin()
            name_run(self._console, run_id)
            try:
                with self._within_hours():
                    runner.write()
                    with self._quiet(work, "begin"):
                        open_run(work)
                    steps = steps_of(work)
                    self._names = [step.name for step in steps]
                    runner.run(steps, only=only, around=functools.partial(self._quiet, work))
            except Exception as error:
                if not lost_output(error):
                    self._tell_failure(work, error)
                raise
            left = runner.tick.at
            if left is not None:
                self._status.finish("ok", f"tick {tick.run}: step {only} is done")
                self._say(f"Step {only} is done. Next: --step {shlex.quote(left.name)}")
                return PROMOTED
            kinds = [runner.outputs(f"promote {model.folder}")["kind"] for model in self._config.models]
            refused = "refused" in kinds
            runner.write(outcome="refused" if refused else "promoted", finished=now())
            self._status.finish("ok", f"tick {tick.run}: {', '.join(kinds)}")
        self._conclude(work, time.monotonic() - began)
        return REFUSED if refused else PROMOTED

    def _tell_failure(self, work: Work, error: Exception) -> None:
        at = work.runner.tick.at
        step = at.name if at is not None else "its beginning"
        self._say(f"Tick {work.run} stopped at {step}; the same command resumes there.")
        code = error.code if isinstance(error, MaskMillError) else type(error).__name__
        tell(work, "failed", step=step, error=code, message=str(error))

    @contextlib.contextmanager
    def _within_hours(self) -> Iterator[None]:
        """Stop after the hours of the budget, as Ctrl-C does."""
        hours = self._config.when.budget.hours
        if hours is None:
            yield
            return

        def stop() -> None:
            self._out_of_time.set()
            interrupt()

        timer = threading.Timer(hours * 3600, stop)
        timer.daemon = True
        timer.start()
        try:
            yield
        except KeyboardInterrupt:
            if not self._out_of_time.is_set():
                raise
            raise FailedWork(
                "budget_spent",
                f"The {hours:g} hours of when.budget.hours are over.",
                "The next run resumes where this one stopped; give it more hours if it never gets there.",
            ) from None
        finally:
            timer.cancel()

    @contextlib.contextmanager
    def _quiet(self, work: Work, name: str) -> Iterator[None]:
        """Keep what the jobs say in a file of the tick; with verbose, show it."""
        if self._verbose:
            yield
            return
        said = io.StringIO()
        shown, work.console = work.console, Console(file=said, width=110, no_color=True)
        try:
            with (
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(said),
                self._console.status(f"{name} …"),
            ):
                yield
        finally:
            work.console = shown
            text = redact(said.getvalue(), assignments=False)
            if text.strip():
                with contextlib.suppress(Exception):  # it must not hide what happened
                    attempt = work.runner.tick.step(name).attempts
                    file = work.here(f"logs/{name.replace(' ', '-')}-{attempt}.txt")
                    self._storage.write_bytes(file, text.encode())

    def _began(self, step: StepState) -> None:
        at, total = self._names.index(step.name), len(self._names)
        self._status.update(stage=step.name, done=at, total=total, unit="steps")
        if not self._console.is_terminal:
            self._say(f"{time.strftime('%H:%M:%S')} {step.name} …")

    def _ended(self, step: StepState) -> None:
        what = step.message if step.state == "failed" else _in_words(step)
        mark = {"done": "", "failed": "FAILED: ", "pending": "stopped: "}.get(step.state, "")
        if step.state == "done":
            self._status.update(done=self._names.index(step.name) + 1)
        took = duration(step.seconds or 0)
        self._say(f"{time.strftime('%H:%M:%S')} {step.name:<20} {took:>8}  {mark}{what}".rstrip())

    def _conclude(self, work: Work, seconds: float) -> None:
        output = shlex.quote(self._storage.uri)
        lines = [f"Tick {work.run} took {duration(seconds)}."]
        more = []
        for model in self._config.models:
            decision = decision_of(work, model)
            version = work.runner.outputs(f"register {model.folder}")["version"]
            name = self._config.registered(model)
            which = f" --model {name}" if len(self._config.models) > 1 else ""
            if decision.promotes:
                lines.append(f"{name} version {version} is champion.")
                lines += [f"  {reason.text}" for reason in decision.reasons if reason.check == "gain"]
                folder = shlex.quote(work.runner.outputs(f"train {model.folder}")["folder"])
                more.append(f"Label with it: maskmill label --model {folder} --images DIR --output OUT")
                if decision.champion is not None:
                    more.append(f"Go back:       maskmill rollback {output}{which}")
            else:
                lines.append(f"{name} version {version} is refused.")
                lines += [f"  {reason.text}" for reason in decision.failed]
        page = work.runner.outputs("report")["page"]
        lines += [
            f"  the page     {Path(page).as_uri() if self._storage.is_local else page}",
            f"  its files    {page.rpartition('/')[0]}",
            *more,
        ]
        self._say("\n".join(lines))


def _in_words(step: StepState) -> str:
    """What a step has made, in a few words."""
    made, kind = step.outputs, step.name.partition(" ")[0]
    if kind == "intake":
        parts = [f"{made['images']:,} new images", *made["lines"]]
        return ", ".join(parts)
    if kind == "label":
        failed = f", {made['failed']:,} failed" if made["failed"] else ""
        return f"{made['images']:,} images in the table{failed}"
    if kind == "verify":
        drift = "" if made["drift"] is None else f", classes drifted by {made['drift']:.3f} bits"
        return f"{made['rows']:,} rows looked at{drift}"
    if kind == "train":
        return made["stopped"] or f"{made['steps']:,} steps" if made.get("steps") else made["stopped"]
    if kind == "evaluate":
        return ", ".join(
            f"{who} mIoU {100 * found['miou']:.1f}"
            for who in ("candidate", "champion")
            if (found := made[who]) is not None and found["miou"] is not None
        )
    if kind == "gate":
        return f"says {made['verdict']}"
    if kind in ("register", "promote"):
        return f"version {made['version']}" + (f" {made['kind']}" if kind == "promote" else "")
    return str(made.get("page", ""))
