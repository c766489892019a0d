"""The training process: forward, backward, update, figures, checkpoints.

All workers take the same decisions, because they base them on summed figures
(``pipeline.training.loop.figures``): one small all-reduce per step carries the logged figures, whether a
worker was asked to stop, and whether a loss is NaN.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.device import DTYPES
from models.errors import FailedWork, WrongUse
from models.student.batchnorm import synchronise_batchnorm
from pipeline.files.logs import run_log
from pipeline.files.storage import open_storage
from pipeline.training.loop import rng
from pipeline.training.loop.board import BoardLink
from pipeline.training.loop.checkpoints import Checkpoint, CheckpointStore
from pipeline.training.loop.figures import Agreement, Meter
from pipeline.training.loop.ingest import batches
from pipeline.training.loop.optimisation import learning_rate, make_optimizer
from pipeline.training.loop.protocols import Samples, Task
from pipeline.training.loop.resources import TrainingCompute
from pipeline.training.loop.settings import LoopSettings

NOTICE_S = 5.0
"""Seconds between checks for preemption notices, which Ray itself polls as often."""


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know; pickled once.

    Attributes:
        make_task: picklable factory of the task.
        samples: the training data.
        settings: optimisation settings.
        output: URI of the run.
        fingerprint: of the settings, from ``CheckpointStore.claim``.
        compute: resources of each worker.
        board: receives figures, and passes stop requests on.
        run_id: that holds the lease of ``output``, if the driver holds one.
    """

    make_task: Callable[[], Task]
    samples: Samples
    settings: LoopSettings
    output: str
    fingerprint: str
    compute: TrainingCompute
    board: BoardLink
    run_id: str | None = None


def work(job: Job) -> dict[str, Any]:
    """Train until the last step or a stop request.

    Runs in every worker of Ray Train, or in the driver's process if there are none.

    Returns:
        ``step`` (updates done), ``stopped`` (why it stopped early, or empty) and the state of ``meter``.

    Raises:
        MaskMillError: ``training_failed``, ``file_damaged``, ``wrong_use``, errors of samples
            and task; ``output_in_use`` if another run has taken the lease over.
    """
    rank, world, device = 0, 1, torch.device("cpu")
    if job.compute.workers:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
        device = ray.train.torch.get_device() if job.compute.gpu else device
    elif job.compute.gpu:
        device = torch.device("cuda", torch.cuda.current_device())
    with _process_settings(job, device):
        try:
            return _Worker(job, rank, world, device).run()
        except torch.OutOfMemoryError as error:
            raise FailedWork(
                "training_failed",
                f"The GPU's memory is too small: {str(error).splitlines()[0]}",
                "Raise the accumulation (micro-batches per update), or lower the batch or crop size.",
            ) from error


class _Worker:
    def __init__(self, job: Job, rank: int, world: int, device: torch.device) -> None:
        settings = job.settings
        self.job, self.settings = job, settings
        self.rank, self.world, self.device = rank, world, device
        self.store = CheckpointStore(open_storage(job.output), run_id=job.run_id)
        self.meter = Meter(settings.batch_size)
        self.agreement = Agreement(world, device)
        self.lines: list[dict[str, Any]] = []
        self.step = 0
        self.stop = self.ask = False

        # Same initial weights everywhere, then different random numbers in each worker.
        rng.seed_all(settings.seed)
        self.task = job.make_task()
        module = self.task.build(device)
        if device.type == "cuda":
            module = module.to(memory_format=torch.channels_last)
        if settings.sync_batchnorm and world > 1:
            module = synchronise_batchnorm(module)
        self.bare = module
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self.parameters, settings)
        self.scaler = torch.amp.GradScaler(device.type) if settings.precision == "fp16" else None
        self.module: nn.Module = module
        rng.seed_all(settings.seed, rank + 1)
        self._resume()
        if world > 1:
            self.module = DistributedDataParallel(
                module,
                device_ids=[device] if device.type == "cuda" else None,
                # Synchronised statistics are equal anyway; otherwise broadcast those of rank 0.
                forward_sync_buffers=not settings.sync_batchnorm,
                gradient_as_bucket_view=True,
            )
        self.milestones = frozenset(self.task.milestones())

    def _log(self, text: str, *values: object) -> None:
        """Write to the log of a worker of Ray; a training in the driver's process has the driver's."""
        if self.job.compute.workers:
            run_log(self.job.run_id or "").info(f"train: worker {self.rank} of {self.world}, {text}", *values)

    def run(self) -> dict[str, Any]:
        stopped = ""
        self._log("on %s: step %d of %d", self.device, self.step, self.settings.iterations)
        if self.step < self.settings.iterations:
            with _StopWatch(self.job.board, active=self.rank == 0) as watch:
                self._train(watch)
                stopped = watch.reason
        self._log("ends at step %d%s", self.step, f": {stopped}" if stopped else "")
        if self.rank == 0:
            # Wait for an answer, so that all figures have arrived before this process ends.
            with contextlib.suppress(Exception):
                self.job.board.ask("stop_reason")
        return {
            "step": self.step,
            "stopped": stopped if self.step < self.settings.iterations else "",
            "meter": self.meter.state_dict(),
        }

    def _train(self, watch: _StopWatch) -> None:
        settings = self.settings
        data = batches(
            self.job.samples,
            seed=settings.seed,
            start_step=self.step,
            stop_step=settings.iterations,
            batch_size=settings.batch_size,
            rank=self.rank,
            world_size=self.world,
            loaders=self.job.compute.loaders,
            pin_memory=self.device.type == "cuda",
            notice=lambda text: self.job.board.tell("note", text),
        )
        first, noticed, asked_at = self.step, False, time.monotonic()
        with contextlib.closing(data):
            while True:
                began = time.perf_counter()
                batch = next(data, None)
                if batch is None:
                    break
                wait_s = time.perf_counter() - began
                self.step += 1
                rate = learning_rate(self.step, settings)
                finite, means = self._update(batch, rate)
                self.task.after_step(self.step)

                ask = self.rank == 0 and time.monotonic() - asked_at > NOTICE_S
                warm = self.step > first + 1
                self.agreement.submit(
                    self.step,
                    stop=watch.asked,
                    ask=ask and not noticed,
                    failed=int(batch["failed"].sum()),
                    wait_s=wait_s if warm else 0.0,
                    finite=finite,
                    means=means,
                )
                last = self.step == settings.iterations
                log = last or self.step % settings.log_every == 0
                due = last or self.step % settings.checkpoint_every == 0 or self.step in self.milestones
                self._settle(flush=log or due)
                if warm:
                    self.meter.time(time.perf_counter() - began)
                if log:
                    line = self.meter.line(self.step, rate)
                    if self.rank == 0:
                        self.lines.append(line)
                        self.job.board.tell("add", line)
                notice = False
                if self.ask:
                    self.ask, asked_at = False, time.monotonic()
                    notice = self._preempted() and not noticed
                    noticed |= notice
                if due or self.stop or notice:
                    self._settle(flush=True)
                    self._checkpoint()
                if self.stop:
                    break

    def _update(self, batch: Mapping[str, Tensor], rate: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Run one optimiser update; returns whether loss and gradient are finite, and the figures."""
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = settings.batch_size // self.world // settings.accumulation
        sums: dict[str, Tensor] = {}
        for part in range(settings.accumulation):
            micro = {name: column[part * share : (part + 1) * share] for name, column in batch.items()}
            for name in micro.keys() - self.task.host_columns:
                micro[name] = micro[name].to(self.device, non_blocking=True)
            final = part == settings.accumulation - 1
            hold = isinstance(self.module, DistributedDataParallel) and not final
            with self.module.no_sync() if hold else contextlib.nullcontext():  # type: ignore[operator]
                with torch.autocast(
                    self.device.type, DTYPES[settings.precision], enabled=settings.precision != "fp32"
                ):
                    loss, figures = self.task.loss(self.module, micro, self.step)
                scaled = loss / settings.accumulation
                (self.scaler.scale(scaled) if self.scaler else scaled).backward()
            for name, value in ({"loss": loss} | figures).items():
                value = value.detach().to(self.device, torch.float64)
                sums[name] = sums[name] + value if name in sums else value
        means = {name: value / settings.accumulation for name, value in sums.items()}
        finite = torch.isfinite(means["loss"])
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if settings.clip_norm:
            norm = nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        else:
            norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.scaler:
            # Overflows are part of loss scaling: the scaler skips such updates.
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            finite = finite & torch.isfinite(norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite.reshape(()), means | {"gradient_norm": norm}

    def _settle(self, *, flush: bool) -> None:
        for figures in self.agreement.results(flush=flush):
            if figures.not_finite:
                raise FailedWork(
                    "training_failed",
                    f"Loss ({figures.means['loss']:g}) or gradient (norm {figures.means['gradient_norm']:g}) "
                    f"of step {figures.step} is not a finite number.",
                    "Lower the learning rate, clip the gradient (clip_norm), use a warm-up, or train in fp32 "
                    "or bf16. The last checkpoint is not affected.",
                )
            self.meter.add(figures)
            self.stop |= figures.stop
            self.ask |= figures.ask

    def _preempted(self) -> bool:
        """Whether one of our nodes is about to be preempted. A barrier: all workers must call it, or none."""
        if not self.job.compute.workers:
            return False
        import ray.train

        return ray.train.get_preemption_info() is not None

    def _checkpoint(self) -> None:
        task = self.task.state_dict()
        states: list[Any] = [None] * self.world
        if self.world > 1:
            dist.all_gather_object(states, rng.capture())
        else:
            states = [rng.capture()]
        if self.rank:
            return
        self.store.write(
            self.step,
            module=self.bare.state_dict(),
            training={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler else None,
                "task": task,
                "meter": self.meter.state_dict(),
                "rng": states,
            },
            lines=self.lines,
            fingerprint=self.job.fingerprint,
            milestone=self.step in self.milestones,
        )
        self.store.prune(self.step, self.settings.keep)
        self._log("checkpoint of step %d", self.step)

    def _resume(self) -> None:
        if not self.store.sees(self.job.fingerprint):
            raise WrongUse(
                "wrong_use",
                f"Worker {self.rank} does not see {self.job.output}: that folder is not shared by all nodes.",
                "On a cluster name an output that every node reaches: s3://bucket/prefix or a shared mount.",
            )
        found: Checkpoint | None = None
        if self.rank == 0:
            found = self.store.newest(self.job.fingerprint, lambda text: self.job.board.tell("note", text))
        step = found.step if found else 0
        if self.world > 1:
            from ray.train.collective import broadcast_from_rank_zero

            step = broadcast_from_rank_zero(step)
        if self.rank and step:
            found = self.store.read(step, self.job.fingerprint)
        if found:
            self._restore(found)
        if self.rank == 0:
            self.job.board.tell("begin", self.step, self.lines)

    def _restore(self, found: Checkpoint) -> None:
        self.step, self.lines = found.step, found.lines
        self.bare.load_state_dict(found.module)
        self.optimizer.load_state_dict(found.training["optimizer"])
        if self.scaler:
            self.scaler.load_state_dict(found.training["scaler"])
        self.task.load_state_dict(found.training["task"])
        self.meter.load_state_dict(found.training["meter"])
        states = found.training["rng"]
        if len(states) == self.world:
            rng.restore(states[self.rank])
        else:
            rng.seed_all(self.settings.seed, self.rank + 1, self.step)


class _StopWatch:
    """Polls the board for a stop request in the background, so that no step waits for it."""

    def __init__(self, board: BoardLink, *, active: bool) -> None:
        self.reason = ""
        self._board = board
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True) if active else None

    @property
    def asked(self) -> bool:
        return bool(self.reason)

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            # If the board is gone, so is the driver, and Ray ends this process.
            with contextlib.suppress(Exception):
                self.reason = self._board.ask("stop_reason")

    def __enter__(self) -> _StopWatch:
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()


@contextlib.contextmanager
def _process_settings(job: Job, device: torch.device) -> Iterator[None]:
    """Set threads and cuDNN for training; restores them and the random states, for the driver's process."""
    threads, benchmark, state = torch.get_num_threads(), torch.backends.cudnn.benchmark, rng.capture()
    if job.compute.threads:
        torch.set_num_threads(job.compute.threads)
    torch.backends.cudnn.benchmark = device.type == "cuda"
    try:
        yield
    finally:
        rng.restore(state)
        torch.backends.cudnn.benchmark = benchmark
        torch.set_num_threads(threads)
