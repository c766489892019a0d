"""The training loop on real Ray Train: the same curves whoever trains and whatever is killed."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.errors import MaskMillError
from pipeline.cluster.session import ray_session
from pipeline.files.storage import open_storage
from pipeline.table.lease import LEASE_FILE, Holder
from pipeline.training.loop import worker
from pipeline.training.loop.checkpoints import CheckpointStore, folder_name
from pipeline.training.loop.driver import METRICS_FILE, LoopSettings, Outcome, train
from pipeline.training.loop.optimisation import learning_rate
from pipeline.training.loop.protocols import Sample
from pipeline.training.loop.resources import TrainingCompute

ROOT = Path(__file__).resolve().parents[4]


class Blobs:
    """64 images of 4 classes: a bright quadrant in noise; some cannot be loaded."""

    def __init__(self, bad: Sequence[int] = ()) -> None:
        self.bad = frozenset(bad)

    def order(self, epoch: int, seed: int) -> np.ndarray:
        return np.random.default_rng((seed, epoch)).permutation(64)

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        if index in self.bad:
            raise MaskMillError("unreadable", "damaged on purpose", "None.")
        # Depends on the index alone, so that plain PyTorch can reproduce it.
        image = np.random.default_rng(index).normal(0, 0.5, (3, 8, 8)).astype(np.float32)
        image[:, 4 * (index % 2) :, 4 * (index // 2 % 2) :][:, :4, :4] += 1.0
        return {"image": image, "label": np.array(index % 4, np.int64)}

    def blank(self) -> Sample:
        return {"image": np.zeros((3, 8, 8), np.float32), "label": np.array(-100, np.int64)}


@dataclass
class Plan:
    """Faults to inject into a task.

    Attributes:
        batchnorm, dropout: of the model.
        at: fault to inject before the loss of a step in one rank: (step, rank) -> name.
        marker: file that is written at the first fault but a notice; with it, that fault happens once.
        tally: file that gets one character per fault.
        driver: pid of the driver.
        pause_s: length of each step, from that of the first fault on.
        milestones: of the task.
        logs: folder for the path of each process's log.
    """

    batchnorm: bool = True
    dropout: float = 0.0
    at: dict[tuple[int, int], str] = field(default_factory=dict)
    marker: str = ""
    tally: str = ""
    driver: int = 0
    pause_s: float = 0.0
    milestones: tuple[int, ...] = ()
    logs: str = ""


class Classify:
    host_columns: frozenset[str] = frozenset()

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.steps = 0

    def build(self, device: torch.device) -> nn.Module:
        if self.plan.logs:
            (Path(self.plan.logs) / str(os.getpid())).write_text(os.readlink("/proc/self/fd/2"))
        self.module = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8) if self.plan.batchnorm else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(self.plan.dropout),
            nn.Flatten(),
            nn.Linear(8 * 64, 4),
        ).to(device)
        return self.module

    def loss(
        self, module: nn.Module, batch: Mapping[str, Tensor], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if step >= min((at for at, _ in self.plan.at), default=0):
            time.sleep(self.plan.pause_s)
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        word = self.plan.at.get((step, rank))
        if word and not (self.plan.marker and os.path.exists(self.plan.marker)):
            if self.plan.marker and word != "node goes":
                Path(self.plan.marker).write_text(str(os.getpid()))
            self._harm(word)
        scores = module(batch["image"]).float()
        if word == "nan":
            scores = scores * torch.tensor(math.nan)
        loss = nn.functional.cross_entropy(scores, batch["label"], reduction="sum") / len(scores)
        correct = (scores.argmax(1) == batch["label"]).float().mean()
        return loss, {"accuracy": correct.detach()}

    def _harm(self, word: str) -> None:
        if self.plan.tally:
            with open(self.plan.tally, "a") as file:
                file.write("x")
        if word == "interrupt the driver":
            os.kill(self.plan.driver, signal.SIGINT)
        if word == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "mistake":
            raise MaskMillError("collapsed", "The classes drift.", "Lower the rate.")
        if word.startswith("lease "):
            Path(word.removeprefix("lease ")).write_bytes(Holder.me("2" * 32).encoded())
        if word == "bug":
            raise RuntimeError("a bug in the task")
        if word == "stop me":
            os.kill(os.getpid(), signal.SIGTERM)
        if word == "node goes":
            # What a worker is told when a node drains. The only node here cannot: it is the driver's as well.
            import ray.train

            notice = ray.train.PreemptionInfo(None, {"x": [1]})
            ray.train.get_preemption_info = lambda: notice

    def after_step(self, step: int) -> None:
        self.steps += 1

    def milestones(self) -> Sequence[int]:
        return self.plan.milestones

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


BASE: dict[str, Any] = {
    "iterations": 12,
    "batch_size": 8,
    "learning_rate": 0.05,
    "checkpoint_every": 4,
    "log_every": 1,
    "max_failures": 1,
    "seed": 5,
}


@pytest.fixture(scope="module")
def session(shared_ray: str) -> Iterator[None]:
    with ray_session("test-loop", address=shared_ray, verbose=bool(os.environ.get("RAY_TALK"))):
        yield
    logging.getLogger("ray").setLevel(logging.INFO)


def in_memory(
    samples: Any,
    *,
    seed: int,
    start_step: int,
    stop_step: int,
    batch_size: int,
    rank: int,
    world_size: int,
    **_: Any,
) -> Iterator[dict[str, Tensor]]:
    """``ingest.batches`` for one process, without loaders, which take seconds to start."""
    assert (rank, world_size) == (0, 1)
    order = np.concatenate([samples.order(epoch, seed) for epoch in range(4)])
    for step in range(start_step, stop_step):
        rows, failed = [], []
        for index in order[step * batch_size : (step + 1) * batch_size]:
            try:
                rows.append(samples.load(int(index), np.random.default_rng()))
            except MaskMillError:
                rows.append(samples.blank())
            failed.append(int(index) in samples.bad)
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        yield batch | {"failed": torch.tensor(failed)}


@dataclass
class Run:
    outcome: Outcome
    lines: list[dict[str, Any]]
    reported: list[dict[str, Any]]
    notices: list[str]
    weights: dict[str, Tensor]
    task: dict[str, Any]

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in self.lines]


def run(
    folder: Path,
    workers: int = 0,
    plan: Plan | None = None,
    samples: Any = None,
    notices: list[str] | None = None,
    run_id: str | None = None,
    **changes: Any,
) -> Run:
    settings = LoopSettings(**(BASE | changes))
    reported: list[dict[str, Any]] = []
    notices = [] if notices is None else notices
    chosen = plan or Plan()
    with pytest.MonkeyPatch.context() as patch:
        if workers == 0:
            patch.setattr(worker, "batches", in_memory)
        outcome = train(
            lambda: Classify(chosen),
            samples or Blobs(),
            settings,
            output=folder,
            compute=TrainingCompute(workers, False, 1.0, 1, 1),
            report=reported.append,
            notice=notices.append,
            run_id=run_id,
        )
    store = CheckpointStore(open_storage(folder))
    last = store.read(store.steps()[-1])
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return Run(outcome, lines, reported, notices, last.module, last.training["task"])


def assert_same(one: Run, other: Run, tolerance: float) -> None:
    assert [line["step"] for line in one.lines] == [line["step"] for line in other.lines]
    np.testing.assert_allclose(one.losses, other.losses, rtol=tolerance, atol=tolerance)
    assert one.weights.keys() == other.weights.keys()
    for name, value in one.weights.items():
        torch.testing.assert_close(value, other.weights[name], rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Twelve steps in one go, in this process."""
    return run(tmp_path_factory.mktemp("whole"))


def test_in_process(whole: Run) -> None:
    assert whole.outcome.finished and whole.outcome.step == 12 and whole.outcome.resumed == 0
    assert whole.outcome.checkpoint.endswith("checkpoints/step-0000012")
    assert whole.reported == whole.lines and whole.notices == []
    assert whole.losses[-1] < 0.5 * whole.losses[0]  # six seeds, 1 and 2 threads: at most 0.001
    assert whole.task == {"steps": 12}
    settings = LoopSettings(**BASE)
    for line in whole.lines:
        assert line["learning_rate"] == learning_rate(line["step"], settings)
        assert 0 <= line["accuracy"] <= 1 and line["gradient_norm"] > 0 and line["failed_samples"] == 0
    assert whole.lines[0]["samples_per_second"] is None  # start-up is not timed
    assert whole.lines[-1]["samples_per_second"] > 0 and 0 <= whole.lines[-1]["data_wait"] <= 1


def plain_training(iterations: int, batch_size: int = 8, clip: float = 0.0) -> tuple[list[float], nn.Module]:
    """The same training in a dozen lines of PyTorch."""
    from pipeline.training.loop import rng

    settings = LoopSettings(**(BASE | {"clip_norm": clip}))
    before = rng.capture()
    rng.seed_all(BASE["seed"])
    module = Classify(Plan()).build(torch.device("cpu"))
    rng.restore(before)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0, momentum=0.9, weight_decay=5e-4)
    losses = []
    samples = Blobs()
    order = np.concatenate([samples.order(epoch, BASE["seed"]) for epoch in range(4)])
    for step in range(1, iterations + 1):
        chosen = order[(step - 1) * batch_size : step * batch_size]
        rows = [samples.load(int(index), np.random.default_rng()) for index in chosen]
        batch = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
        optimizer.param_groups[0]["lr"] = learning_rate(step, settings)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(batch["image"]), batch["label"])
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, module


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_equals_plain_pytorch(clip: float, whole: Run, tmp_path: Path) -> None:
    ours = run(tmp_path, clip_norm=clip) if clip else whole
    losses, module = plain_training(12, clip=clip)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-6)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(ours.weights[name], value, rtol=1e-6, atol=1e-7)
    if clip:
        assert max(line["gradient_norm"] for line in ours.lines) > clip  # clipping had an effect


def test_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    plan = Plan(batchnorm=False)
    one, four = run(tmp_path / "1", plan=plan), run(tmp_path / "4", plan=plan, accumulation=4)
    assert_same(one, four, 1e-5)


def test_an_error_of_the_driver_lets_the_last_step_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If a thread is in compiled code when Python ends, the process aborts, whatever its status was to be."""
    monkeypatch.setattr(worker, "batches", in_memory)

    def no_room(_line: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        train(
            lambda: Classify(Plan(at={(1, 0): "nothing but slow steps"}, pause_s=0.4)),
            Blobs(),
            LoopSettings(**BASE),
            output=tmp_path,
            compute=TrainingCompute(0, False, 1.0, 1, 1),
            report=no_room,
            notice=lambda _text: None,
        )
    assert "training" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.slow
def test_interrupted_equals_whole(whole: Run, tmp_path: Path) -> None:
    """SIGTERM in step 6 writes an extra checkpoint, from which the same command resumes."""
    first = run(tmp_path, plan=Plan(at={(6, 0): "stop me"}, pause_s=1.0))
    at = first.outcome.step
    assert not first.outcome.finished and first.outcome.stopped == "terminated" and 6 <= at < 12
    assert f"terminated at step {at}" in first.outcome.message and "to resume" in first.outcome.message
    assert first.outcome.checkpoint.endswith(folder_name(at)) and len(first.lines) == at
    second = run(tmp_path)
    assert second.outcome.finished and second.outcome.resumed == at
    assert [line["step"] for line in second.reported] == list(range(at + 1, 13))
    assert_same(second, whole, 0.0)
    assert second.task == {"steps": 12}
    # Running it again does nothing and reports no line again, but restores a lost line of metrics.jsonl.
    (tmp_path / METRICS_FILE).write_text("")
    third = run(tmp_path)
    assert third.outcome.resumed == third.outcome.step == 12 and third.reported == []
    assert third.outcome.seconds == second.outcome.seconds and third.lines == second.lines


def test_random_numbers_and_windows_survive_an_interruption(tmp_path: Path) -> None:
    """With dropout, AdamW, and lines of five steps, two of which precede the checkpoint."""
    options: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 0.01, "log_every": 5}
    straight = run(tmp_path / "straight", plan=Plan(dropout=0.5), **options)
    failing = Plan(dropout=0.5, at={(8, 0): "mistake"})
    with pytest.raises(MaskMillError, match="The classes drift"):
        run(tmp_path / "resumed", plan=failing, **options)
    resumed = run(tmp_path / "resumed", plan=Plan(dropout=0.5), **options)
    assert resumed.outcome.resumed == 4 and [line["step"] for line in resumed.lines] == [5, 10, 12]
    assert_same(resumed, straight, 0.0)


def test_a_damaged_checkpoint_falls_back_with_a_warning(whole: Run, tmp_path: Path) -> None:
    with pytest.raises(MaskMillError):
        run(tmp_path, plan=Plan(at={(11, 0): "mistake"}))
    assert CheckpointStore(open_storage(tmp_path)).steps() == [4, 8]
    module = tmp_path / "checkpoints" / folder_name(8) / "module.pt"
    module.write_bytes(module.read_bytes()[:-100])
    again = run(tmp_path)
    assert again.outcome.resumed == 4
    assert len(again.notices) == 1 and folder_name(8) in again.notices[0]
    assert_same(again, whole, 0.0)


def test_milestones_are_kept(tmp_path: Path) -> None:
    run(tmp_path, plan=Plan(milestones=(3, 7)), checkpoint_every=2, keep=1)
    assert CheckpointStore(open_storage(tmp_path)).steps() == [3, 7, 12]


def test_other_settings_are_refused(tmp_path: Path, whole: Run) -> None:
    run(tmp_path)
    with pytest.raises(MaskMillError, match=r"learning_rate: 0\.05 there, 0\.01 here") as caught:
        run(tmp_path, learning_rate=0.01, log_every=3, keep=9)
    assert caught.value.code == "output_differs"
    assert "keep" not in caught.value.message and "log_every" not in caught.value.message


def test_a_loss_that_is_nan_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError, match="step 6") as caught:
        run(tmp_path, plan=Plan(at={(6, 0): "nan"}), checkpoint_every=1)
    assert caught.value.code == "training_failed"
    # No checkpoint contains it.
    store = CheckpointStore(open_storage(tmp_path))
    assert store.steps()[-1] == 5
    assert all(torch.isfinite(value).all() for value in store.read(5).module.values())


def test_bf16_learns_about_the_same(whole: Run, tmp_path: Path) -> None:
    half = run(tmp_path, precision="bf16")
    np.testing.assert_allclose(half.losses, whole.losses, rtol=0.1, atol=0.05)
    assert half.losses != whole.losses
    assert all(value.dtype != torch.bfloat16 for value in half.weights.values())


def test_samples_that_cannot_be_loaded_are_counted(tmp_path: Path) -> None:
    bad = Blobs(bad=range(0, 64, 16))
    result = run(tmp_path, samples=bad, iterations=8)  # one epoch
    assert result.outcome.failed_samples == 4
    assert [line["failed_samples"] for line in result.lines][-1] == 4


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(MaskMillError, match="GPUs only"):
        run(tmp_path, precision="fp16")


# Workers of their own: real processes, gloo between them.


@pytest.mark.cluster
@pytest.mark.slow
def test_workers_equal_one_process(session: None, whole: Run, tmp_path: Path) -> None:
    """Two workers with synchronised batch norm, then Ctrl-C, then this process: all as in one process."""
    run_id, logs = "5" * 32, tmp_path / "logs"
    logs.mkdir()
    (tmp_path / LEASE_FILE).write_bytes(Holder.me(run_id).encoded())
    plan = Plan(at={(5, 1): "interrupt the driver"}, driver=os.getpid(), pause_s=1.0, logs=str(logs))
    first = run(tmp_path, 2, plan, run_id=run_id)
    at = first.outcome.step
    assert first.outcome.stopped == "interrupted" and 5 <= at < 12
    assert first.outcome.checkpoint.endswith(folder_name(at)) and len(first.lines) == at
    second = run(tmp_path)
    assert second.outcome.finished and second.outcome.resumed == at and second.outcome.restarts == 0
    assert_same(second, whole, 1e-5)
    for mine, theirs in zip(second.lines, whole.lines, strict=True):
        assert mine["accuracy"] == pytest.approx(theirs["accuracy"])
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-4)
    # Each line of the workers' logs says whose it is.
    said = "".join(Path(path.read_text()).read_text() for path in logs.iterdir())
    assert len([*logs.iterdir()]) == 2
    for rank, text in (
        (0, "on cpu: step 0 of 12"),
        (0, f"checkpoint of step {at}"),
        (1, f"ends at step {at}"),
    ):
        assert f"run {run_id} train: worker {rank} of 2, {text}" in said


@pytest.mark.cluster
@pytest.mark.slow
def test_a_notice_triggers_a_checkpoint_and_a_killed_worker_costs_nothing_but_time(
    session: None, whole: Run, tmp_path: Path
) -> None:
    """A node is to go from step 2 on, and rank 1 dies in step 11, before any other checkpoint is due.

    The two workers still match one process in curve and weights.
    """
    marker = tmp_path / "killed"
    # Notices are asked for every five seconds.
    faults = {(2, 0): "node goes", (2, 1): "node goes", (11, 1): "kill"}
    plan = Plan(at=faults, marker=str(marker), pause_s=1.0)
    result = run(tmp_path / "run", 2, plan, checkpoint_every=100, keep=9)
    assert marker.exists() and result.outcome.restarts == 1 and result.outcome.finished
    steps = CheckpointStore(open_storage(tmp_path / "run")).steps()
    assert len(steps) == 2 and 2 <= steps[0] < 11 and steps[1] == 12
    assert any(f"restarted from the checkpoint of step {steps[0]}" in text for text in result.notices)
    assert_same(result, whole, 1e-5)
    reported = [line["step"] for line in result.reported]
    again = 12 - steps[0]
    assert reported[-again:] == list(range(steps[0] + 1, 13)) and set(reported) == set(range(1, 13))


def test_a_run_that_lost_its_lease_stops_at_the_next_checkpoint(tmp_path: Path) -> None:
    lease = tmp_path / LEASE_FILE
    lease.write_bytes(Holder.me("1" * 32).encoded())
    plan = Plan(at={(7, 0): f"lease {lease}"})
    with pytest.raises(MaskMillError, match="taken over") as caught:
        run(tmp_path, plan=plan, run_id="1" * 32)
    assert caught.value.code == "output_in_use"
    assert max(CheckpointStore(open_storage(tmp_path)).steps()) < 7


@pytest.mark.cluster
@pytest.mark.slow
def test_a_worker_s_user_error_is_reraised_without_a_restart(session: None, tmp_path: Path) -> None:
    marker = tmp_path / "attempts"
    plan = Plan(at={(3, 1): "mistake"}, tally=str(marker))
    with pytest.raises(MaskMillError) as caught:
        run(tmp_path / "run", 2, plan, max_failures=5)
    assert str(caught.value) == "The classes drift.\nLower the rate. [collapsed]"
    assert len(marker.read_text()) == 1


KILLED = """
import sys
from pathlib import Path
from tests.pipeline.training.loop.test_driver import Plan, run
run(Path(sys.argv[1]), plan=Plan(pause_s=0.2))
"""


@pytest.mark.slow
def test_a_killed_driver_costs_nothing_but_time(whole: Run, tmp_path: Path) -> None:
    """SIGKILL after a checkpoint; the same command resumes."""
    driver = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    manifest = tmp_path / "checkpoints" / folder_name(4) / "manifest.json"
    deadline = time.monotonic() + 300
    while not manifest.exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    driver.kill()
    _, errors = driver.communicate()
    assert manifest.exists(), errors
    result = run(tmp_path)
    assert result.outcome.finished and 4 <= result.outcome.resumed < 12
    assert_same(result, whole, 0.0)
