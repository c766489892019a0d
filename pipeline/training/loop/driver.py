"""The training loop that MaskCLIP+ and CLIPSeg share, on Ray Train: the driver's side.

``train`` starts the workers (``pipeline.training.loop.worker``), keeps ``metrics.jsonl`` up to date while
they
run, and hands back how it ended. A run is a folder, here or on S3: started again with the same settings it
goes on from its newest whole checkpoint, whatever ended it before.

* A worker that dies is started again by Ray Train, with all others, from the newest checkpoint.
* A mistake (``MaskMillError``) in a worker ends the run at once, and is raised here as it was there.
* SIGTERM or Ctrl-C to this process: the workers write a checkpoint and stop.
* Notice that a node will be taken away: the workers write a checkpoint and go on; when the node is gone, Ray
  Train starts them elsewhere from that checkpoint.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchTrainer

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.files.storage import Storage, open_storage
from pipeline.training.loop.board import BoardLink, News
from pipeline.training.loop.checkpoints import CheckpointStore
from pipeline.training.loop.meter import Meter
from pipeline.training.loop.protocols import Samples, Task
from pipeline.training.loop.resources import TrainingCompute
from pipeline.training.loop.settings import LoopSettings
from pipeline.training.loop.stopping import INTERRUPTED, stop_on_signals
from pipeline.training.loop.worker import Job, work

__all__ = ["METRICS_FILE", "LoopSettings", "Outcome", "train"]

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended.

    Attributes:
        step: updates done, those of earlier calls included.
        stopped: why it stopped before the last update: ``terminated`` (SIGTERM), ``interrupted`` (Ctrl-C),
            or empty if it did not.
        resumed: updates that had been done before this call.
        restarts: how often workers were started again in this call.
        checkpoint: URI of the checkpoint of ``step``.
        seconds: spent on updates, start-up and checkpoints left out, earlier calls included.
        samples_per_second: in that time, all workers together; None if too little was timed.
        data_wait: share of that time that workers waited for samples, 0 to 1.
        failed_samples: samples that could not be loaded, and were left out of the loss.
    """

    step: int
    stopped: str
    resumed: int
    restarts: int
    checkpoint: str
    seconds: float
    samples_per_second: float | None
    data_wait: float | None
    failed_samples: int

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return not self.stopped

    @property
    def message(self) -> str:
        """One line for the user."""
        if self.finished:
            return f"trained {self.step:,} steps"
        return f"{self.stopped} at step {self.step:,}: a checkpoint is written, the same command goes on"


def train(
    make_task: Callable[[], Task],
    samples: Samples,
    settings: LoopSettings,
    *,
    output: str | os.PathLike[str],
    compute: TrainingCompute,
    report: Callable[[dict[str, Any]], None],
    notice: Callable[[str], None],
    identity: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train, or go on training, until the last step. Call with Ray started and the lease on ``output`` held.

    Args:
        make_task: builds the task in each worker; picklable.
        samples: what to train on; picklable.
        settings: how to train.
        output: folder or URI of the run; gets ``checkpoints/`` and ``metrics.jsonl``. With workers on several
            nodes it must be a place that all of them reach.
        compute: workers and what each may use (``pipeline.training.loop.resources.plan_training``).
        report: called in this thread with each new line of ``metrics.jsonl``: ``step``, ``loss``, the task's
            figures, ``gradient_norm`` (means since the line before), ``learning_rate``,
            ``samples_per_second``, ``data_wait``, ``failed_samples``, ``seconds``. After workers were
            started again, steps after their checkpoint come once more.
        notice: told what the user should know: damaged checkpoints, restarts.
        identity: whatever else must not change between the calls of one run (recipe, data), JSON-able; by
            the names under which an error will list it.

    Raises:
        MaskMillError: ``output_differs``, ``checkpoint_damaged``, ``setting_invalid``,
            ``model_unsupported``, ``training_failed``, ``training_failed``, ``output_not_shared``, any that
            task or samples raise, and ``training_failed`` for what is nobody's mistake (workers died more
            than ``settings.max_failures`` times).
    """
    settings.check_workers(compute.workers)
    if settings.precision == "fp16" and not compute.gpu:
        raise WrongUse("model_unsupported", "fp16 trains on GPUs only.", "Set the precision to bf16 or fp32.")
    storage = open_storage(output)
    store = CheckpointStore(storage)
    fingerprint = store.claim(settings.training() | dict(identity or {}))
    if store.steps()[-1:] == [settings.iterations]:
        finished = store.newest(fingerprint, notice)
        if finished and finished.step == settings.iterations:
            _write_lines(storage, finished.lines)
            step = finished.step
            return _outcome(store, settings, step, finished.training["meter"], "", step, 0)
    board = BoardLink.start(in_process=compute.workers == 0)
    reader = _Reader(board, storage, report, notice)
    job = Job(make_task, samples, settings, storage.uri, fingerprint, compute, board)
    with tempfile.TemporaryDirectory(prefix="maskmill-train-") as scratch, stop_on_signals() as request:
        run = _Run(job, scratch)
        run.start()
        told = False
        try:
            while run.is_alive():
                run.join(0.25)
                if request.reason and not told:
                    told = True
                    board.tell("stop", request.reason)
                    notice("Stopping after a checkpoint.")
                reader.look()
        except BaseException:
            # What is raised here must not wait for a step to end; whoever closes Ray ends the workers.
            board.tell("stop", INTERRUPTED)
            raise
        reader.look(last=True)
    if run.error is not None:
        mistake = _explained(run.error)
        raise mistake from (None if mistake is run.error else run.error)
    assert run.result is not None
    result = run.result
    return _outcome(
        store, settings, result["step"], result["meter"], result["stopped"], reader.resumed, reader.restarts
    )


def _outcome(
    store: CheckpointStore,
    settings: LoopSettings,
    step: int,
    totals: Mapping[str, Any],
    stopped: str,
    resumed: int,
    restarts: int,
) -> Outcome:
    meter = Meter(settings.batch_size)
    meter.load_state_dict(totals)
    return Outcome(
        step=step,
        stopped=stopped,
        resumed=resumed,
        restarts=restarts,
        checkpoint=store.uri_of(step),
        seconds=meter.seconds,
        samples_per_second=meter.timed * settings.batch_size / meter.seconds if meter.seconds else None,
        data_wait=meter.wait_s / meter.seconds if meter.seconds else None,
        failed_samples=meter.failed,
    )


class _Run(threading.Thread):
    """``TorchTrainer.fit`` in a thread: in the main one it would put a Ctrl-C handler of its own in place,
    which ends the workers without a checkpoint.
    """

    def __init__(self, job: Job, scratch: str) -> None:
        super().__init__(name="training", daemon=True)
        self.result: dict[str, Any] | None = None
        self.error: Exception | None = None
        self._job = job
        self._scratch = scratch

    def run(self) -> None:
        try:
            self.result = _trainer(self._job, self._scratch).fit().return_value
        except Exception as error:
            self.error = error


def _trainer(job: Job, scratch: str) -> _Trainer:
    # Relative paths of samples must mean the same in workers as in the driver.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    # How often Ray Train looks after its workers; two seconds by default, for start and end as well.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    compute = job.compute
    resources = {"CPU": compute.worker_cpus} | ({"GPU": 1.0} if compute.gpu else {})

    def run() -> dict[str, Any]:
        return work(job)

    return _Trainer(
        run,
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers,
            use_gpu=compute.gpu,
            resources_per_worker=resources if compute.workers else None,
        ),
        run_config=ray.train.RunConfig(
            name="run",
            # Nothing but marker files of Ray's gets there; checkpoints are written by the workers.
            storage_path=scratch,
            failure_config=ray.train.FailureConfig(max_failures=job.settings.max_failures),
            callbacks=[_EndOnMistake()],
        ),
    )


class _Trainer(TorchTrainer):
    """``TorchTrainer`` for a Ray without dashboard as well.

    Should the controller die, an actor of Ray Train's frees its processors. It asks the dashboard whether the
    controller is alive; where there is none, it fails, and each run waits 12 s for it in the end. A Ray
    without dashboard is one of our own, which ends with this process.
    """

    def _create_default_callbacks(self) -> list[Any]:
        callbacks: list[Any] = super()._create_default_callbacks()
        if ray._private.worker.get_dashboard_url():
            return callbacks
        return [one for one in callbacks if type(one).__name__ != "PlacementGroupCleanerCallback"]


class _EndOnMistake(ray.train.UserCallback):
    """Ray Train would start workers again after any exception; an error of its own callbacks ends the run."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, MaskMillError):
                raise error


class _Reader:
    """Carries the board's news to ``metrics.jsonl`` and to the user."""

    def __init__(
        self,
        board: BoardLink,
        storage: Storage,
        report: Callable[[dict[str, Any]], None],
        notice: Callable[[str], None],
    ) -> None:
        self.resumed = 0
        self.restarts = 0
        self._board = board
        self._storage = storage
        self._report = report
        self._notice = notice
        self._attempt = 0
        self._lines: list[dict[str, Any]] = []
        self._notes = 0
        self._pause_s = 2.0 if storage.is_local else 15.0
        self._written = float("-inf")
        self._changed = False

    def look(self, *, last: bool = False) -> None:
        try:
            news: News = self._board.ask("news", self._attempt, len(self._lines), self._notes)
        except ray.exceptions.RayError:
            return  # it went with the driver's node, or Ray is being shut down
        for text in news.notes:
            self._notice(text)
        self._notes += len(news.notes)
        fresh = news.lines
        if news.attempt != self._attempt:
            if self._attempt:
                self.restarts += 1
                self._notice(f"Workers were started again from the checkpoint of step {news.step:,}.")
            else:
                self.resumed = news.step
            self._attempt, self._lines, self._changed = news.attempt, [], True
            fresh = [line for line in news.lines if line["step"] > news.step]
        self._lines += news.lines
        self._changed |= bool(news.lines)
        if self._changed and (last or time.monotonic() - self._written > self._pause_s):
            _write_lines(self._storage, self._lines)
            self._written, self._changed = time.monotonic(), False
        for line in fresh:
            self._report(line)


def _write_lines(storage: Storage, lines: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines)
    storage.write_bytes(METRICS_FILE, text.encode())


def _let_go(error: BaseException) -> None:
    """Empty the frames that an error was raised through.

    In local mode they are those of the worker: its pipeline would outlive Ray with the error, and whatever
    touches Ray after its end takes the whole process with it.
    """
    logging.getLogger(__name__).debug("training ended with an error", exc_info=error)
    chain: list[BaseException | None] = [error]
    while chain:
        if (link := chain.pop()) is None:
            continue
        traceback.clear_frames(link.__traceback__)
        link.__traceback__ = None
        chain += [link.__cause__, link.__context__]
        link.__cause__ = link.__context__ = None
    gc.collect()


def _explained(error: Exception) -> MaskMillError:
    """The mistake that ended the run, or what else did, in words."""
    causes: list[BaseException] = [error]
    while causes:
        cause = causes.pop(0)
        if isinstance(cause, MaskMillError):
            return type(cause)(cause.code, cause.message, cause.remedy)
        inner = [cause.__cause__, getattr(cause, "controller_failure", None)]
        inner += getattr(cause, "worker_failures", {}).values()
        causes += [other for other in inner if isinstance(other, BaseException)]
    failures = getattr(error, "worker_failures", None)
    first = next(iter(failures.values())) if failures else error
    lines = str(first).strip().splitlines()
    return FailedWork(
        "training_failed",
        f"Training stopped: {type(first).__name__}{f': {lines[-1]}' if lines else ''}",
        "What was trained up to the last checkpoint is kept: run the same command again. "
        "With -v Ray tells more.",
    )
