"""Running training figures: identical on every worker, and part of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class StepFigures:
    """The figures of one step, combined over all workers.

    Attributes:
        step: number of the update.
        stop: whether any worker was asked to stop.
        ask: whether it is time to ask Ray for preemption notices.
        not_finite: whether any worker's loss or gradient is NaN or infinite.
        failed: samples that could not be loaded.
        wait_s: seconds spent waiting for samples, mean over workers.
        means: means over workers: ``loss``, ``gradient_norm`` and the task's figures.
    """

    step: int
    stop: bool
    ask: bool
    not_finite: bool
    failed: int
    wait_s: float
    means: dict[str, float]


class Agreement:
    """Sums the workers' figures with one small all-reduce per step.

    On a GPU, results are read one step late, so the host need not wait for the device.
    """

    def __init__(self, world: int, device: torch.device) -> None:
        self._world = world
        self._device = device
        self._late = 1 if device.type == "cuda" else 0
        self._waiting: list[tuple[int, list[str], Tensor, torch.cuda.Event | None]] = []

    def submit(
        self,
        step: int,
        *,
        stop: bool,
        ask: bool,
        failed: int,
        wait_s: float,
        finite: Tensor,
        means: Mapping[str, Tensor],
    ) -> None:
        """Contribute this worker's figures, see ``StepFigures``; all workers must use the same names.

        Args:
            finite: one bool on the device: whether its loss and gradient are finite.
            means: one element each, on the device.
        """
        names = sorted(means)
        host = torch.tensor([stop, ask, failed, wait_s], dtype=torch.float64)
        found = [(~finite).double(), *(means[name].detach().double().reshape(()) for name in names)]
        vector = torch.cat([host.to(self._device, non_blocking=True), torch.stack(found)])
        if self._world > 1:
            dist.all_reduce(vector)
        event = None
        if self._device.type == "cuda":
            pinned = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            vector = pinned.copy_(vector, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._waiting.append((step, names, vector, event))

    def results(self, *, flush: bool) -> Iterator[StepFigures]:
        """Results that are due, oldest first."""
        while len(self._waiting) > (0 if flush else self._late):
            step, names, vector, event = self._waiting.pop(0)
            if event is not None:
                event.synchronize()
            stop, ask, failed, wait_s, not_finite, *sums = vector.tolist()
            means = {name: value / self._world for name, value in zip(names, sums, strict=True)}
            yield StepFigures(
                step, stop > 0, ask > 0, not_finite > 0, round(failed), wait_s / self._world, means
            )


class Meter:
    """Means since the last line of figures, and totals since the start of the run.

    Attributes:
        seconds: spent on updates, without start-up and checkpoints, before and after resuming.
        wait_s: part of ``seconds`` spent waiting for samples.
        timed: updates covered by ``seconds``; the first after each start is not, since it waits for the first
            samples.
        failed: samples that could not be loaded.
    """

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self.seconds = 0.0
        self.wait_s = 0.0
        self.timed = 0
        self.failed = 0
        self._sums: dict[str, list[float]] = {}
        self._before = (0.0, 0.0, 0)

    def add(self, figures: StepFigures) -> None:
        """Add the figures of a step."""
        self.failed += figures.failed
        self.wait_s += figures.wait_s
        for name, value in figures.means.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += 1

    def time(self, seconds: float) -> None:
        """Add the duration of a step."""
        self.seconds += seconds
        self.timed += 1

    def line(self, step: int, learning_rate: float) -> dict[str, Any]:
        """Figures since the last call, JSON-able; non-finite means become None."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        seconds, wait_s, timed = (
            now - then
            for now, then in zip((self.seconds, self.wait_s, self.timed), self._before, strict=True)
        )
        self._sums = {}
        self._before = (self.seconds, self.wait_s, self.timed)
        return {
            "step": step,
            **{name: value if math.isfinite(value) else None for name, value in means.items()},
            "learning_rate": learning_rate,
            "samples_per_second": timed * self._batch_size / seconds if seconds > 0 else None,
            "data_wait": wait_s / seconds if seconds > 0 else None,
            "failed_samples": self.failed,
            "seconds": round(self.seconds, 3),
        }

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {
            "seconds": self.seconds,
            "wait_s": self.wait_s,
            "timed": self.timed,
            "failed": self.failed,
            "sums": self._sums,
            "before": list(self._before),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from a checkpoint."""
        self.seconds, self.wait_s = state["seconds"], state["wait_s"]
        self.timed, self.failed = state["timed"], state["failed"]
        self._sums = {name: list(total) for name, total in state["sums"].items()}
        seconds, wait_s, timed = state["before"]
        self._before = (seconds, wait_s, timed)
