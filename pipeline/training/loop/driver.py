"""The training loop that MaskCLIP+ and CLIPSeg share: the driver's side.

``train`` starts the workers (``pipeline.training.loop.worker``) on Ray Train, or trains in this process. It
keeps ``metrics.jsonl`` up to date and returns how the run ended. A run is a local or S3 folder; started again
with the same settings, it resumes from its newest usable checkpoint, however it ended before.

* When a worker dies, Ray Train restarts all of them from the newest checkpoint.
* A ``MaskMillError`` in a worker ends the run at once and is re-raised here.
* On SIGTERM or Ctrl-C, the workers write a checkpoint and stop.
* When the nodes of a cluster have no room for all workers, Ray Train waits for more; the user is told.
* When Ray announces the preemption of a node, the workers write a checkpoint and continue; once the node is
  gone, Ray Train restarts them elsewhere from that checkpoint.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.cluster.nodes import LOOK_S, live_nodes
from pipeline.cluster.signals import INTERRUPTED, stop_on_signals
from pipeline.files.storage import Storage, open_storage
from pipeline.training.loop.board import BoardLink, BoardLost, News
from pipeline.training.loop.checkpoints import CheckpointStore
from pipeline.training.loop.figures import Meter
from pipeline.training.loop.protocols import Samples, Task
from pipeline.training.loop.resources import TrainingCompute, room_for_workers
from pipeline.training.loop.settings import LoopSettings
from pipeline.training.loop.worker import Job, work

__all__ = ["METRICS_FILE", "LoopSettings", "Outcome", "train"]

METRICS_FILE = "metrics.jsonl"
_LAST_STEP_S = 30.0
"""How long a training in this process may take to stop, after an error of this thread."""


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended.

    Attributes:
        step: updates done, including earlier calls.
        stopped: why it stopped before the last update: ``terminated`` (SIGTERM), ``interrupted`` (Ctrl-C),
            or empty if it did not.
        resumed: updates done before this call.
        restarts: how often workers were restarted in this call.
        checkpoint: URI of the checkpoint of ``step``.
        seconds: spent on updates, without start-up and checkpoints, including earlier calls.
        samples_per_second: in that time, over all workers; None if too little was timed.
        data_wait: share of that time that workers waited for samples, 0 to 1.
        failed_samples: samples that could not be loaded and were left out of the loss.
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
        return f"{self.stopped} at step {self.step:,}: checkpoint written; run the same command to resume"


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
    run_id: str | None = None,
) -> Outcome:
    """Train or resume until the last step.

    The caller holds the lease on ``output`` as ``run_id``, and has started Ray if ``compute`` has workers.

    Args:
        make_task: builds the task in each worker; picklable.
        samples: the training data; picklable.
        settings: optimisation settings.
        output: folder or URI of the run; gets ``checkpoints/`` and ``metrics.jsonl``. With workers on several
            nodes, all of them must reach it.
        compute: workers and resources of each (``pipeline.training.loop.resources.plan_training``).
        report: called in this thread with each new line of ``metrics.jsonl``: ``step``, ``loss``, the task's
            figures, ``gradient_norm`` (means since the previous line), ``learning_rate``,
            ``samples_per_second``, ``data_wait``, ``failed_samples``, ``seconds``. After a restart, steps
            after the checkpoint are reported again.
        notice: called with messages for the user: damaged checkpoints, restarts.
        identity: what else must not change between the calls of one run (recipe, data), JSON-able; an error
            lists its keys.
        run_id: no checkpoint is written once another run has the lease; None checks nothing.

    Raises:
        MaskMillError: ``output_differs``, ``file_damaged``, ``setting_invalid``,
            ``model_unsupported``, ``wrong_use``, errors of task and samples; ``training_failed``,
            also if workers died more than ``settings.max_failures`` times.
    """
    settings.check_workers(compute.workers)
    if settings.precision == "fp16" and not compute.gpu:
        raise WrongUse("model_unsupported", "fp16 trains on GPUs only.", "Set the precision to bf16 or fp32.")
    storage = open_storage(output)
    store = CheckpointStore(storage)
    fingerprint = store.claim(settings.effective() | dict(identity or {}))
    if store.steps()[-1:] == [settings.iterations]:
        finished = store.newest(fingerprint, notice)
        if finished and finished.step == settings.iterations:
            _write_lines(storage, finished.lines)
            step = finished.step
            return _outcome(store, settings, step, finished.training["meter"], "", step, 0)
    board = BoardLink.start(in_process=compute.workers == 0)
    reader = _Reader(board, storage, report, notice)
    room = _Room(compute, notice) if compute.workers else None
    job = Job(make_task, samples, settings, storage.uri, fingerprint, compute, board, run_id)
    with stop_on_signals() as request:
        run = _Run(job)
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
                if room:
                    room.look()
        except BaseException:
            # Raise without waiting for workers, which end when Ray is closed.
            board.tell("stop", INTERRUPTED)
            if compute.workers == 0:
                run.join(_LAST_STEP_S)  # Python aborts if it ends while a thread is in compiled code
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
    """Training in a thread; in the main one, Ray Train's Ctrl-C handler would skip the checkpoint."""

    def __init__(self, job: Job) -> None:
        super().__init__(name="training", daemon=True)
        self.result: dict[str, Any] | None = None
        self.error: Exception | None = None
        self._job = job

    def run(self) -> None:
        try:
            self.result = work(self._job) if self._job.compute.workers == 0 else _work_on_ray(self._job)
        except Exception as error:
            self.error = error


def _work_on_ray(job: Job) -> dict[str, Any]:
    """Run ``work`` in every worker; returns the result of rank 0."""
    import ray.train
    from ray.train.torch import TorchTrainer

    class EndOnMistake(ray.train.UserCallback):
        """Ends the run on a ``MaskMillError``, after which Ray Train would restart the workers."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, MaskMillError):
                    raise error

    compute = job.compute
    with tempfile.TemporaryDirectory(prefix="maskmill-train-") as scratch:
        trainer = TorchTrainer(
            lambda: work(job),
            scaling_config=ray.train.ScalingConfig(
                num_workers=compute.workers,
                use_gpu=compute.gpu,
                resources_per_worker={"CPU": compute.worker_cpus} | ({"GPU": 1.0} if compute.gpu else {}),
            ),
            run_config=ray.train.RunConfig(
                name="run",
                # Ray only puts marker files there; the workers write checkpoints themselves.
                storage_path=scratch,
                failure_config=ray.train.FailureConfig(max_failures=job.settings.max_failures),
                callbacks=[EndOnMistake()],
            ),
        )
        result: dict[str, Any] = trainer.fit().return_value
        return result


class _Room:
    """Tells the user when nodes were lost that the workers need, for which Ray Train waits without a word."""

    def __init__(self, compute: TrainingCompute, notice: Callable[[str], None]) -> None:
        self._compute = compute
        self._notice = notice
        self._looked = time.monotonic()
        self._waits = False

    def look(self) -> None:
        if time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        workers, kind = self._compute.workers, "GPU" if self._compute.gpu else "CPU"
        room = room_for_workers(live_nodes(), self._compute)
        if (room < workers) == self._waits:
            return
        self._waits = room < workers
        if self._waits:
            self._notice(
                f"Waiting for nodes: {workers} workers need a {kind} each, and the cluster has room for "
                f"{room}. To go on with fewer, stop this run, and run the same command with fewer --workers."
            )
        else:
            self._notice("The cluster has room for all workers again.")


class _Reader:
    """Passes the board's news on to ``metrics.jsonl`` and to the user."""

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
        except BoardLost:
            return  # Ray is shutting down
        for text in news.notes:
            self._notice(text)
        self._notes += len(news.notes)
        fresh = news.lines
        if news.attempt != self._attempt:
            if self._attempt:
                self.restarts += 1
                self._notice(f"Workers were restarted from the checkpoint of step {news.step:,}.")
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


def _explained(error: Exception) -> MaskMillError:
    """The ``MaskMillError`` that ended the run, or one that explains the error that did."""
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
        "Run the same command again to resume from the last checkpoint. With -v, Ray's log says more.",
    )
