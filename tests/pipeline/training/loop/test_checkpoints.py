"""Checkpoints: atomic writes, the newest usable one, no code execution, no silent loss."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.errors import MaskMillError
from pipeline.files.storage import Storage, open_storage
from pipeline.table.lease import LEASE_FILE, Holder, Lease
from pipeline.training.loop import rng
from pipeline.training.loop.checkpoints import BrokenCheckpoint, CheckpointStore, folder_name

RECORD = {"iterations": 9, "learning_rate": 0.1}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(open_storage(tmp_path / "run"))


def write(store: CheckpointStore, step: int, **options: Any) -> str:
    fingerprint = store.claim(RECORD)
    store.write(
        step,
        module={"weight": torch.full((2, 3), float(step)), "count": torch.tensor(step)},
        training={
            "optimizer": {"state": {0: {"momentum": torch.ones(3)}}},
            "task": {"names": ["a"], "x": None},
        },
        lines=[{"step": step, "loss": 0.5}],
        fingerprint=fingerprint,
        **options,
    )
    return fingerprint


@pytest.mark.parametrize("place", ["local", "s3"])
def test_round_trip(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    store = CheckpointStore(
        open_storage(tmp_path / "run" if place == "local" else request.getfixturevalue("bucket"))
    )
    fingerprint = write(store, 3)
    write(store, 12)
    warnings: list[str] = []
    found = store.newest(fingerprint, warnings.append)
    assert found is not None and found.step == 12 and not warnings
    assert torch.equal(found.module["weight"], torch.full((2, 3), 12.0)) and found.module["count"] == 12
    assert torch.equal(found.training["optimizer"]["state"][0]["momentum"], torch.ones(3))
    assert found.training["task"] == {"names": ["a"], "x": None}
    assert found.lines == [{"step": 12, "loss": 0.5}]
    assert store.steps() == [3, 12]
    store.prune(12, keep=1)
    assert store.steps() == [12]


def truncate(folder: Path) -> None:
    (folder / "training.pt").write_bytes((folder / "training.pt").read_bytes()[:-7])


def flip(folder: Path) -> None:
    data = bytearray((folder / "module.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "module.pt").write_bytes(data)


def garble(folder: Path) -> None:
    (folder / "manifest.json").write_text("{")


HARMS: list[tuple[Callable[[Path], object], str]] = [
    (truncate, "training.pt is not what was written"),
    (flip, "module.pt is not what was written"),
    (garble, "manifest.json is not JSON"),
    (lambda folder: (folder / "manifest.json").write_text("{}"), "lacks fields"),
    (lambda folder: (folder / "module.pt").unlink(), "module.pt is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "writing it was cut off"),
]


@pytest.mark.parametrize(("harm", "says"), HARMS)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    harm: Callable[[Path], object], says: str, store: CheckpointStore, tmp_path: Path
) -> None:
    write(store, 100)
    fingerprint = write(store, 200)
    harm(tmp_path / "run/checkpoints" / folder_name(200))
    warnings: list[str] = []
    found = store.newest(fingerprint, warnings.append)
    assert found is not None and found.step == 100
    assert len(warnings) == 1 and folder_name(200) in warnings[0] and says in warnings[0]


@pytest.mark.parametrize(("harm", "says"), HARMS)
def test_training_never_silently_restarts_from_scratch(
    harm: Callable[[Path], object], says: str, store: CheckpointStore, tmp_path: Path
) -> None:
    fingerprint = write(store, 100)
    write(store, 200)
    for step in (100, 200):
        harm(tmp_path / "run/checkpoints" / folder_name(step))
    with pytest.raises(MaskMillError, match=says) as caught:
        store.newest(fingerprint, lambda _text: None)
    assert caught.value.code == "file_damaged"
    assert "name another output" in caught.value.remedy


def test_an_interrupted_first_checkpoint_does_not_count(store: CheckpointStore, tmp_path: Path) -> None:
    fingerprint = write(store, 100)
    (tmp_path / "run/checkpoints" / folder_name(100) / "manifest.json").unlink()
    warnings: list[str] = []
    assert store.newest(fingerprint, warnings.append) is None
    assert len(warnings) == 1


def test_killed_at_any_point_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any prefix of a checkpoint's writes, the previous or the complete new one is readable."""
    for stop_after in range(5):
        store = CheckpointStore(open_storage(tmp_path / str(stop_after)))
        fingerprint = write(store, 1)
        written = 0
        real = Storage.write_bytes

        def limited(self: Storage, name: str, data: bytes, limit: int = stop_after) -> None:
            nonlocal written
            if written == limit:
                raise KeyboardInterrupt
            written += 1
            real(self, name, data)  # noqa: B023

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write_bytes", limited)
            if stop_after < 4:
                with pytest.raises(KeyboardInterrupt):
                    write(store, 2)
            else:
                write(store, 2)
        found = store.newest(fingerprint, lambda _text: None)
        assert found is not None and found.step == (1 if stop_after < 4 else 2)


@pytest.mark.parametrize(
    ("steps", "milestones", "keep", "left"),
    [
        ([1, 2, 3, 4], [], 2, [3, 4]),
        ([1, 2, 3, 4], [2], 1, [2, 4]),
        ([1, 2, 3, 4], [1, 4], 2, [1, 3, 4]),
    ],
)
def test_pruning(
    steps: list[int], milestones: list[int], keep: int, left: list[int], store: CheckpointStore
) -> None:
    for step in steps:
        write(store, step, milestone=step in milestones)
        store.prune(step, keep)
    assert store.steps() == left


def test_unusable_later_checkpoints_are_pruned(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write(store, step)
    flip(tmp_path / "run/checkpoints" / folder_name(30))
    write(store, 25)  # resumed at 20, stopped at 25
    store.prune(25, keep=2)
    assert store.steps() == [20, 25]


def test_other_settings_are_refused_and_named(store: CheckpointStore) -> None:
    store.claim({"iterations": 5})
    assert store.claim(RECORD) == store.claim(dict(reversed(RECORD.items())))  # no checkpoint yet
    write(store, 1)
    with pytest.raises(MaskMillError) as caught:
        store.claim({"iterations": 10, "learning_rate": 0.1, "teacher": "x"})
    assert caught.value.code == "output_differs"
    assert "iterations: 9 there, 10 here" in caught.value.message
    assert "teacher: null there, x here" in caught.value.message
    assert "learning_rate" not in caught.value.message


def test_a_checkpoint_of_other_settings_does_not_count(store: CheckpointStore) -> None:
    write(store, 1)
    with pytest.raises(BrokenCheckpoint, match="other settings"):
        store.read(1, "0" * 16)


@pytest.mark.parametrize("bad", [np.float64(1.0), {1, 2}, Path("x"), object()])
def test_unreadable_state_is_refused_when_written(bad: object, store: CheckpointStore) -> None:
    with pytest.raises(TypeError, match=r"training\['task'\]\[0\]"):
        store.write(1, module={}, training={"task": [bad]}, lines=[], fingerprint="")
    assert store.steps() == []


def test_nothing_in_a_checkpoint_is_executed(store: CheckpointStore, tmp_path: Path) -> None:
    """Even with a matching manifest: an attacker can compute checksums too."""
    import hashlib
    import os

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "pwned"),)

    write(store, 1)
    folder = tmp_path / "run/checkpoints" / folder_name(1)
    torch.save({"x": Evil()}, folder / "training.pt")
    data = (folder / "training.pt").read_bytes()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["training.pt"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BrokenCheckpoint, match="more than tensors"):
        store.read(1)
    assert not (tmp_path / "pwned").exists()


def test_random_states_are_restored(store: CheckpointStore) -> None:
    def draw() -> list[float]:
        return [
            *torch.rand(2).tolist(), *np.random.rand(2).tolist(), np.random.randn(), random.random(),
            random.gauss(0, 1),
        ]  # fmt: skip

    before = rng.capture()
    try:
        rng.seed_all(1, 2)
        first = draw()
        state = rng.capture()
        expected = draw()
        store.write(1, module={}, training={"rng": [state]}, lines=[], fingerprint="")
        rng.seed_all(3)
        rng.restore(store.read(1).training["rng"][0])
        assert draw() == expected
        rng.seed_all(1, 2)
        assert draw() == first
        rng.seed_all(1, 3)
        assert draw() != first
    finally:
        rng.restore(before)


def test_a_run_that_lost_its_lease_changes_nothing(tmp_path: Path) -> None:
    """Also if it is lost while the files are written: they never count without their manifest."""
    output = open_storage(tmp_path / "run")
    with Lease.acquire(output, on_lost=lambda _reason: None) as lease:
        write(CheckpointStore(output, run_id=lease.run_id), 3)
    mine = CheckpointStore(output, run_id="1" * 32)
    with pytest.raises(MaskMillError) as caught:
        write(mine, 3)
    assert caught.value.code == "output_in_use" and mine.read(3).step == 3

    (tmp_path / "run" / LEASE_FILE).write_bytes(Holder.me("1" * 32).encoded())

    class Slow(list[dict[str, Any]]):
        """Figures that take so long to write that another run takes over."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            (tmp_path / "run" / LEASE_FILE).write_bytes(Holder.me("2" * 32).encoded())
            return super().__iter__()

    weights = {"weight": torch.ones(1)}
    with pytest.raises(MaskMillError, match="taken over"):
        mine.write(4, module=weights, training={}, lines=Slow(), fingerprint=mine.claim(RECORD))
    assert 4 in mine.steps()
    assert mine.newest(None, lambda _text: None).step == 3  # type: ignore[union-attr]
