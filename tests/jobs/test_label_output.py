"""Outputs that cannot be written to, from the start or in mid-run."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.faults.disks import NoDisk, fill, mounted
from pipeline.table.labels import iter_rows
from pipeline.toyworld import scenes as toyworld

Run = Callable[..., subprocess.CompletedProcess[str]]


def _label(images: Path, output: object, *more: object) -> list[object]:
    return [
        "label", "--images", images, "--ontology", "toyworld", "--output", output, "--recipe", "toy", *more
    ]  # fmt: skip


@contextlib.contextmanager
def _mounted(place: Path, options: str) -> Iterator[Path]:
    """A small disk of its own; skips where it cannot be made."""
    try:
        with mounted(place, options) as disk:
            yield disk
    except NoDisk as reason:
        pytest.skip(f"no disk can be mounted here: {reason}")


needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


@pytest.mark.parametrize(
    ("output", "status", "says"),
    [
        ("file", 2, "is a file"),
        ("file/table", 2, "which is a file"),
        ("x" * 300, 2, "too long"),
        ("http://example.org/table", 2, "can be read, but not written to"),
    ],
)
@pytest.mark.parametrize("command", ["label", "train"])
def test_what_is_no_place_for_a_table_is_told_before_work(
    maskmill_here: Run, toy_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    output: str, status: int, says: str, command: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    train = ["train", "clipseg", "--output", output, "--dataset", "toyworld", "--split", "seed-3"]
    train += ["--recipe", "toy"]
    done = maskmill_here(*(_label(toy_images, output) if command == "label" else train))
    assert done.returncode == status and says in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Ray" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@needs_mount
def test_a_read_only_disk_is_told_before_work(maskmill_here: Run, toy_images: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "ro,size=1m") as disk:
        done = maskmill_here(*_label(toy_images, disk / "table"))
    assert done.returncode == 2 and "cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Ray" not in done.stderr


@pytest.mark.slow
@needs_mount
def test_a_full_disk_is_told_before_work(maskmill_here: Run, toy_images: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "disk", "size=64k") as disk:
        fill(disk / "filler")
        done = maskmill_here(*_label(toy_images, disk / "table"))
        left = sorted(path.name for path in disk.rglob("*") if path.is_file())
    assert done.returncode == 1 and "no space is left" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "Ray" not in done.stderr
    assert left == ["filler"]


@needs_mount
@pytest.mark.cluster
@pytest.mark.slow
def test_a_disk_that_fills_in_mid_run_stops_it_in_words_and_the_same_command_goes_on(
    maskmill_joined: Run, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    scenes, _, _ = toyworld.generate(5, 80, 256)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(images / f"scene_{index:03d}.png")
    with _mounted(tmp_path / "disk", "size=8m") as disk:
        table, filler = disk / "table", disk / "filler"
        done = threading.Event()

        def fill_up() -> None:
            """Take all room as soon as some parts are there, as another program would."""
            while len(list(table.glob("labels/*.parquet"))) < 3 and not done.wait(0.005):
                pass
            fill(filler)

        thread = threading.Thread(target=fill_up)
        thread.start()
        try:
            began = time.monotonic()
            stopped = maskmill_joined(*_label(images, table))
        finally:
            done.set()
            thread.join()
        assert stopped.returncode == 1 and "no space is left" in stopped.stderr, stopped.stderr
        assert "Traceback" not in stopped.stderr and time.monotonic() - began < 300
        assert not list(disk.rglob("*.tmp"))
        some = {row["uri"]: row for row in iter_rows(table)}  # nothing is torn
        assert 0 < len(some) < len(scenes)
        filler.unlink()
        again = maskmill_joined(*_label(images, table))
        assert again.returncode == 0, again.stderr
        rows = list(iter_rows(table))
        assert len(rows) == len({row["id"] for row in rows}) == len(scenes)
        assert all(row["status"] == "ok" for row in rows)
        assert {row["uri"]: row for row in rows if row["uri"] in some} == some
        whole = maskmill_joined("verify", table, "--images", images, "--hashes")
        assert whole.returncode == 0, whole.stdout
