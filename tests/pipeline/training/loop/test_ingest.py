"""The sequence of training samples through real loader processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.ontology.reading import load_ontology
from pipeline.table.labels import LABEL_SCHEMA, ok_row
from pipeline.table.record import TableRecord, write_table_record
from pipeline.toyworld import scenes as toyworld
from pipeline.training.loop import ingest
from pipeline.training.loop.protocols import Sample
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.table import TableSamples, open_table_samples

ROOT = Path(__file__).resolve().parents[4]
SEED = 5


@dataclass(frozen=True)
class Numbers:
    """``count`` samples without images; some fail, and each writes a file when it is loaded."""

    count: int
    size: int = 4
    failing: tuple[int, ...] = ()
    wrong: str = "gone"
    folder: str = ""

    def order(self, epoch: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng((seed, epoch))
        return rng.permutation(np.arange(self.count + epoch % 3) % self.count)  # epochs differ in length

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        if self.folder:
            (Path(self.folder) / f"{time.monotonic_ns()}").touch()
        if index in self.failing:
            if self.wrong == "gone":
                raise MaskMillError("not_found", f"image {index} is gone", "Put it back.")
            if self.wrong == "unreadable":
                raise OSError(5, f"image {index} cannot be read")
            if self.wrong == "shape":
                return {"value": np.zeros(self.size + 1), "id": np.array(index)}
            raise ZeroDivisionError(f"sample {index}")
        return {"value": rng.random(self.size), "id": np.array(index)}

    def blank(self) -> Sample:
        return {"value": np.zeros(self.size), "id": np.array(-1)}


def reference(samples: Any, seed: int, positions: range) -> list[tuple[int, Sample]]:
    """Load the samples at positions one by one, by the definition."""
    order: list[int] = []
    epoch = 0
    while len(order) < positions.stop:
        order += samples.order(epoch, seed).tolist()
        epoch += 1
    return [(p, samples.load(order[p], np.random.default_rng((seed, p)))) for p in positions]


def assert_is_share(
    found: list[Any], samples: Any, start: int, stop: int, batch: int, rank: int, world: int
) -> None:
    assert len(found) == stop - start
    share = batch // world
    for step, columns in zip(range(start, stop), found, strict=True):
        first = step * batch + rank * share
        expected = reference(samples, SEED, range(first, first + share))
        assert columns["position"].tolist() == [position for position, _ in expected]
        assert not columns["failed"].any()
        for name in expected[0][1]:
            stacked = np.stack([sample[name] for _, sample in expected])
            array = columns[name].numpy()
            assert array.dtype == stacked.dtype and array.tobytes() == stacked.tobytes()
            assert array.flags.writeable


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> TableSamples:
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for index in range(7):
        scene = toyworld.scene(1, index, 64)
        path = folder / f"{index}.png"
        Image.fromarray(scene.image).save(path)
        rows.append(
            ok_row(
                id=index, uri=str(path), sha256=hashlib.sha256(path.read_bytes()).digest(), height=64,
                width=64, labels=scene.labels, confidence=np.full((64, 64), 200, np.uint8), ignore_index=255,
            )
        )  # fmt: skip
    (folder / "labels").mkdir()
    for part in range(2):
        found = pa.Table.from_pylist(rows[4 * part : 4 * part + 4], schema=LABEL_SCHEMA)
        pq.write_table(found, folder / "labels" / f"part-{part}-0.parquet")
    ontology = load_ontology("toyworld")
    weights = {"model": "toyclip", "pretrained": "bundled", "fingerprint": "0"}
    write_table_record(open_storage(folder), TableRecord(ontology=ontology, recipe={}, weights=weights))
    augment = AugmentSettings(scale=(96, 64), crop=(48, 40))
    return open_table_samples(str(folder), ontology=ontology, augment=augment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "stop", "rank", "world", "loaders"),
    [(0, 9, 0, 1, 2), (4, 9, 2, 4, 1)],
)
def test_samples_depend_on_position_not_on_workers_loaders_or_restarts(
    table: TableSamples, start: int, stop: int, rank: int, world: int, loaders: int
) -> None:
    """All shares equal one reference, so they equal each other."""
    found = ingest.batches(
        table, seed=SEED, start_step=start, stop_step=stop, batch_size=4, rank=rank, world_size=world,
        loaders=loaders,
    )  # fmt: skip
    assert_is_share(list(found), table, start, stop, 4, rank, world)


@pytest.mark.slow
def test_failed_samples_are_blank_and_counted() -> None:
    samples = Numbers(8, failing=(2, 5))
    found = list(
        ingest.batches(
            samples,
            seed=SEED,
            start_step=0,
            stop_step=6,
            batch_size=4,
            max_failure_rate=0.5,
            failure_window=16,
        )
    )
    ids = np.concatenate([batch["id"] for batch in found])
    failed = np.concatenate([batch["failed"] for batch in found])
    values = np.concatenate([batch["value"] for batch in found])
    order = np.concatenate([samples.order(epoch, SEED) for epoch in range(4)])[: len(ids)]
    assert (failed == np.isin(order, [2, 5])).all() and failed.any()
    assert (ids == np.where(failed, -1, order)).all()
    assert (values[failed] == 0).all() and (values[~failed] > 0).all()


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ("gone", MaskMillError, "image 1 is gone"),
        ("unreadable", MaskMillError, "image 1 cannot be read"),
        ("bug", ZeroDivisionError, "sample 1"),
        ("shape", TypeError, "blank"),
    ],
)
def test_errors_keep_their_type_and_text(wrong: str, error: type[Exception], text: str) -> None:
    loading = ingest.Loading(Numbers(2, failing=(1,), wrong=wrong), 0)
    failures = ingest.Failures(0.2, 20)
    with pytest.raises(error) as caught:
        for position in range(10):
            found, _, failure = loading[position, position % 2]
            failures.add([found], [failure])
    assert text in str(caught.value)
    if isinstance(caught.value, MaskMillError):
        assert caught.value.code == "training_failed" and "5 of the last" in str(caught.value)


def started(folder: Path) -> int:
    """How many samples have started to load."""
    return len(os.listdir(folder))


@pytest.mark.slow
def test_a_slow_consumer_is_not_overrun(tmp_path: Path) -> None:
    """Each loader pauses at two prefetched batches, and exits when the iterator is closed."""
    samples = Numbers(1000, size=1000, folder=str(tmp_path))
    found = ingest.batches(samples, seed=0, start_step=0, stop_step=1000, batch_size=2, loaders=2)
    for _ in range(3):
        next(found)
    expected = 2 * (3 + 2 * 2)  # consumed and prefetched
    deadline = time.monotonic() + 60
    while started(tmp_path) < expected and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    assert started(tmp_path) == expected
    found.close()
    assert not [process for process in psutil.Process().children() if is_loader(process)]


def is_loader(process: psutil.Process) -> bool:
    return "spawn_main" in " ".join(process.cmdline())


@pytest.mark.slow
def test_large_batches_wait_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """One loader prefetches one batch if a second would exceed the limit; also without shared memory."""
    monkeypatch.setattr(ingest, "AHEAD_BYTES", 20_000)
    monkeypatch.setattr(ingest, "free_shared_memory", lambda: 1000)
    samples = Numbers(1000, size=1000)
    found = ingest.batches(samples, seed=SEED, start_step=0, stop_step=3, batch_size=2, loaders=8)
    first = next(found)
    assert len([process for process in psutil.Process().children() if is_loader(process)]) == 1
    assert_is_share([first, *found], samples, 0, 3, 2, 0, 1)


@pytest.mark.slow
@pytest.mark.long  # that a killed loader is replaced is seen with the sample that kills it, too
@pytest.mark.parametrize("loaders", [1, 3])
def test_a_killed_loader_is_replaced(tmp_path: Path, loaders: int) -> None:
    samples = Suicidal(8, folder=str(tmp_path), times=1)
    notices: list[str] = []
    found = ingest.batches(
        samples, seed=SEED, start_step=0, stop_step=6, batch_size=4, loaders=loaders, notice=notices.append
    )
    assert_is_share(list(found), Numbers(8), 0, 6, 4, 0, 1)
    assert len(notices) == 1 and "died" in notices[0]


@pytest.mark.slow
def test_a_sample_that_kills_its_loader_is_left_out(tmp_path: Path) -> None:
    """After three deaths the sample counts as failed, in every epoch; the others are as ever."""
    samples = Suicidal(8, folder=str(tmp_path), times=99)
    notices: list[str] = []
    found = list(
        ingest.batches(
            samples, seed=SEED, start_step=0, stop_step=12, batch_size=4, loaders=3, notice=notices.append
        )
    )
    # Each of the first three loaders may have begun it, in another epoch.
    assert 3 <= started(tmp_path) <= 5 and len(notices) == 3 and "Training sample 5 kills" in notices[-1]
    expected = list(
        ingest.batches(
            Numbers(8, failing=(5,)), seed=SEED, start_step=0, stop_step=12, batch_size=4, loaders=1
        )
    )
    assert sum(int(batch["failed"].sum()) for batch in found) > 1
    for batch, other in zip(found, expected, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[name], other[name]) for name in batch)


@pytest.mark.slow
def test_loaders_that_die_whatever_they_load_end_the_run(tmp_path: Path) -> None:
    samples = Suicidal(8, folder=str(tmp_path), times=99, sample=None)
    found = ingest.batches(samples, seed=SEED, start_step=0, stop_step=50, batch_size=4, loaders=1)
    with pytest.raises(MaskMillError, match="keep dying") as caught:
        list(found)
    assert caught.value.code == "training_failed"


@dataclass(frozen=True)
class Suicidal(Numbers):
    """Kills the process that loads a sample, or any if that is None, a number of times."""

    times: int = 1
    sample: int | None = 5

    def load(self, index: int, rng: np.random.Generator) -> Sample:
        if self.sample in (None, index):
            for number in range(self.times):
                with contextlib.suppress(FileExistsError):
                    (Path(self.folder) / f"{number}").touch(exist_ok=False)  # two loaders may come at once
                    os.kill(os.getpid(), signal.SIGKILL)
        return Numbers(self.count, self.size).load(index, rng)


ORPHANED = """
import sys, time
from tests.pipeline.training.loop.test_ingest import Numbers
from pipeline.training.loop import ingest
found = ingest.batches(Numbers(9), seed=0, start_step=0, stop_step=9999, batch_size=2, loaders=1)
next(found)
print("loading", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_loaders_survive_ctrl_c_and_exit_with_their_worker() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANED],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as worker:
        assert worker.stdout is not None and worker.stdout.readline()
        (loader,) = filter(is_loader, psutil.Process(worker.pid).children())
        loader.send_signal(signal.SIGINT)
        with pytest.raises(psutil.TimeoutExpired):
            loader.wait(0.5)
        worker.kill()
    psutil.wait_procs([loader], 60)
    assert not loader.is_running()


@pytest.mark.slow
def test_loading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    list(ingest.batches(Numbers(4), seed=0, start_step=0, stop_step=1, batch_size=2, loaders=1))
    assert torch.rand(1) == expected


@pytest.mark.slow
def test_a_short_run_without_a_loaded_sample_fails() -> None:
    samples = Numbers(4, failing=(0, 1, 2, 3))
    found = ingest.batches(samples, seed=0, start_step=0, stop_step=2, batch_size=2, loaders=1)
    assert next(found)["failed"].all()  # far below the limit of 1000 samples
    with pytest.raises(MaskMillError, match="4 of the last 4"):
        next(found)


# --- without loaders ---


@pytest.mark.slow
@given(st.integers(0, 9), st.integers(1, 30), st.sampled_from([1, 2, 3, 6]), st.integers(1, 12))
def test_shares_follow_the_epochs(start: int, steps: int, world: int, count: int) -> None:
    """The ranks' shares of each step, concatenated, are the sequence of all epochs."""
    samples = Numbers(count)
    order = np.concatenate([samples.order(epoch, SEED) for epoch in range(250)]).tolist()
    shares = [
        ingest.shares_of(
            samples, seed=SEED, start_step=start, stop_step=start + steps, batch_size=6, rank=rank,
            world_size=world,
        )
        for rank in range(world)
    ]  # fmt: skip
    keys = [key for step in zip(*shares, strict=True) for share in step for key in share]
    assert keys == [(position, order[position]) for position in range(6 * start, 6 * (start + steps))]


def test_failures_are_counted_in_a_window() -> None:
    bad = ingest.pickled_error(MaskMillError("not_found", "gone", "x"))
    failures = ingest.Failures(0.2, 10)
    for _ in range(30):
        failures.add(range(5), [bad, b"", b"", b"", b""])  # always 2 of the latest 10
    failures.end()
    with pytest.raises(MaskMillError) as caught:
        failures.add([150, 151], [bad, bad])  # the first displaces another failure
    assert caught.value.code == "training_failed" and "gone" in str(caught.value)
    few = ingest.Failures(0.2, 1000)
    few.add(range(3), [bad] * 3)
    with pytest.raises(MaskMillError):
        few.end()  # far below the limit, but every sample failed


def test_errors_that_cannot_be_pickled_keep_their_text() -> None:
    class Local(Exception):
        pass

    with pytest.raises(RuntimeError, match="Local: the disk is on fire"):
        ingest.Failures(0.1, 10).add([0], [ingest.pickled_error(Local("the disk is on fire"))])


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"batch_size": 5, "world_size": 2}, "wrong_use"),
        ({"batch_size": 4, "world_size": 2, "rank": 2}, "wrong_use"),
        ({"batch_size": 4, "loaders": 0}, "wrong_use"),
    ],
)
def test_wrong_options(options: dict[str, Any], code: str) -> None:
    with pytest.raises(MaskMillError) as caught:
        next(ingest.batches(Numbers(4), seed=0, start_step=0, stop_step=1, **options))
    assert caught.value.code == code


def test_no_samples_start_no_process() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(MaskMillError) as caught:
        next(ingest.batches(Numbers(0), seed=0, start_step=0, stop_step=1, batch_size=1))
    assert caught.value.code == "too_few_images"
    assert set(psutil.Process().children()) <= before
