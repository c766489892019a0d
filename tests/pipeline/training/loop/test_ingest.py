"""The sequence of training samples through a real Ray, on which every logical CPU is taken."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.ontology.ontology import load_ontology
from pipeline.table.labels import LABEL_SCHEMA, ok_row
from pipeline.toyworld import scenes as toyworld
from pipeline.training.loop import ingest
from pipeline.training.loop.protocols import Sample
from pipeline.training.samples.augment import AugmentSettings
from pipeline.training.samples.table import TableSamples, open_table_samples

ROOT = Path(__file__).resolve().parents[4]
SEED = 5


@pytest.fixture(scope="module")
def session() -> Iterator[None]:
    """A Ray whose two CPUs belong to training workers: loading must go on all the same."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")
        patch.setenv("RAY_ADDRESS", "")
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        worker = ray.remote(num_cpus=2)(Worker).remote()
        ray.get(worker.ready.remote())
        yield
        ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        ray.shutdown()


class Worker:
    def ready(self) -> bool:
        return True


@dataclass(frozen=True)
class Numbers:
    """Samples without images: n of them, of which some fail, that leave a file when they are loaded."""

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
    """Samples at positions by the definition, one by one."""
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
    open_storage(folder).write_json("dataset.json", {"ontology": ontology.to_dict(), "recipe": {}})
    augment = AugmentSettings(scale=(96, 64), crop=(48, 40))
    return open_table_samples(str(folder), ontology=ontology, augment=augment)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "stop", "rank", "world", "loaders"),
    [(0, 9, 0, 1, 2), (0, 9, 1, 2, 1), (0, 9, 2, 4, 3), (4, 9, 0, 2, 2)],
)
def test_position_decides_whatever_workers_loaders_and_restarts(
    session: None, table: TableSamples, start: int, stop: int, rank: int, world: int, loaders: int
) -> None:
    """All shares are those of one reference, so they are those of each other."""
    found = ingest.batches(
        table, seed=SEED, start_step=start, stop_step=stop, batch_size=4, rank=rank, world_size=world,
        loaders=loaders,
    )  # fmt: skip
    assert_is_share(list(found), table, start, stop, 4, rank, world)


@pytest.mark.slow
def test_long_runs_are_cut_into_legs(session: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingest, "_BLOCK_SAMPLES", 3)  # less than a share: batches are put together
    monkeypatch.setattr(ingest, "_LEG_BLOCKS", 6)
    monkeypatch.setattr(ingest, "_LEG_LEAD", 2)
    samples = Numbers(10)
    found = list(ingest.batches(samples, seed=SEED, start_step=1, stop_step=9, batch_size=4, loaders=2))
    assert_is_share(found, samples, 1, 9, 4, 0, 1)


@pytest.mark.slow
def test_failed_samples_are_blank_and_counted(session: None) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        ("gone", MaskMillError, "image 1 is gone"),
        ("unreadable", MaskMillError, "image 1 cannot be read"),
        ("bug", ZeroDivisionError, "sample 1"),
        ("shape", TypeError, "blank"),
    ],
)
def test_what_goes_wrong_is_told_as_it_is(
    session: None, wrong: str, error: type[Exception], text: str
) -> None:
    samples = Numbers(2, failing=(1,), wrong=wrong)
    with pytest.raises(error) as caught:
        list(
            ingest.batches(
                samples, seed=0, start_step=0, stop_step=50, batch_size=2, loaders=1, max_failure_rate=0.2,
                failure_window=20,
            )
        )  # fmt: skip
    assert text in str(caught.value)
    if isinstance(caught.value, MaskMillError):
        assert caught.value.code == "training_failed" and "5 of the last" in str(caught.value)


@pytest.mark.slow
def test_a_slow_consumer_is_not_overrun(
    session: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded, the waiting costs no processor, and closing ends it; nobody's settings change."""
    import ray

    before = ray.data.DataContext.get_current().copy()
    monkeypatch.setattr(ingest, "_BLOCK_SAMPLES", 2)
    samples = Numbers(1000, size=100_000, folder=str(tmp_path))
    found = ingest.batches(samples, seed=0, start_step=0, stop_step=1000, batch_size=2, loaders=2)
    for _ in range(3):
        next(found)
    loaded = -1
    while len(os.listdir(tmp_path)) != loaded:  # loaders take their time where others are busy
        loaded = len(os.listdir(tmp_path))
        time.sleep(2)
    busy = time.process_time()
    time.sleep(1.5)
    busy = time.process_time() - busy
    assert len(os.listdir(tmp_path)) == loaded  # it has come to rest
    # In blocks: three taken, one being made up into a batch and one ahead of it, the pipeline's own eight,
    # and what two loaders had begun before it was full.
    assert loaded / 2 <= 3 + 2 + 8 + 4
    assert busy < 0.75  # a loop without pauses takes all of 1.5 s
    began = time.monotonic()
    found.close()
    assert time.monotonic() - began < 20
    after = ray.data.DataContext.get_current()
    assert after.execution_options.preserve_order == before.execution_options.preserve_order
    assert after.custom_execution_callback_classes == before.custom_execution_callback_classes


@pytest.mark.slow
def test_a_short_run_of_nothing_but_failures_fails(session: None) -> None:
    samples = Numbers(4, failing=(0, 1, 2, 3))
    found = ingest.batches(samples, seed=0, start_step=0, stop_step=2, batch_size=2, loaders=1)
    assert next(found)["failed"].all()  # far below the limit of 1000 samples
    with pytest.raises(MaskMillError, match="4 of the last 4"):
        next(found)


# --- without Ray ---


@given(st.integers(0, 60), st.integers(1, 40), st.integers(1, 12), st.integers(0, 3))
def test_indices_follow_the_epochs(start: int, length: int, count: int, seed: int) -> None:
    samples = Numbers(count)
    positions = np.arange(start, start + length, dtype=np.int64)
    found = ingest._Sequence(samples, seed)(positions)
    order = np.concatenate([samples.order(epoch, seed) for epoch in range(110)])
    assert found.tolist() == order[positions].tolist()


@given(st.integers(1, 10**9), st.integers(1, 200))
def test_blocks_are_small_and_fit_batches(sample_bytes: int, share: int) -> None:
    size = ingest._block_samples(sample_bytes, share)
    assert 1 <= size <= 64 and (size == 1 or size * sample_bytes <= 32 << 20)
    assert size % share == 0 or size <= share
    if size < share:  # parts of a share are about equal: no last one of a single sample
        assert -(-share // size) * size - share < -(-share // size)


@given(st.integers(0, 9), st.integers(1, 30), st.sampled_from([1, 2, 3, 6]), st.integers(1, 7))
def test_legs_hold_every_position_of_a_rank_once(start: int, steps: int, world: int, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "_LEG_BLOCKS", 3)
        share = 6 // world
        seen: list[int] = []
        for rank in range(world):
            legs = list(ingest._legs(Numbers(5), 0, start, start + steps, 6, share, rank, size))
            blocks = [block for leg in legs for block in leg]
            own = np.concatenate([block.positions for block in blocks]).tolist()
            assert own == sorted(own) and all(0 <= p % 6 - rank * share < share for p in own)
            assert all(len(leg) <= 3 + share for leg in legs)
            assert all(sum(len(block.positions) for block in leg) % share == 0 for leg in legs)
            seen += own
    assert sorted(seen) == list(range(6 * start, 6 * (start + steps)))


def test_failures_are_counted_in_a_window() -> None:
    bad = ingest._pickled(MaskMillError("not_found", "gone", "x"))
    failures = ingest._Failures(0.2, 10)
    for _ in range(30):
        failures.add(range(5), [bad, b"", b"", b"", b""])  # always 2 of the latest 10
    failures.end()
    with pytest.raises(MaskMillError) as caught:
        failures.add([150, 151], [bad, bad])  # the first takes the place of one that failed as well
    assert caught.value.code == "training_failed" and "gone" in str(caught.value)
    few = ingest._Failures(0.2, 1000)
    few.add(range(3), [bad] * 3)
    with pytest.raises(MaskMillError):
        few.end()  # far below the limit of the window, but all there is


def test_errors_that_cannot_be_pickled_keep_their_words() -> None:
    class Local(Exception):
        pass

    with pytest.raises(RuntimeError, match="Local: the disk is on fire"):
        ingest._Failures(0.1, 10).add([0], [ingest._pickled(Local("the disk is on fire"))])


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


def test_no_samples() -> None:
    with pytest.raises(MaskMillError) as caught:
        ingest._Sequence(Numbers(0), 0)
    assert caught.value.code == "training_data_empty"


def test_loaders_do_not_load_torch() -> None:
    modules = "pipeline.training.loop.ingest, pipeline.training.samples.table"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
