"""Images that are labelled again: changed ones, failed ones, and those of a run that was killed meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.table.labels import iter_rows, summarise

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]


def _label(images: Path, output: Path, *more: object) -> list[object]:
    return [
        "label", "--images", images, "--ontology", "toyworld", "--output", output, "--recipe", "toy",
        "--max-failure-rate", "0.5", *more,
    ]  # fmt: skip


def _rows(table: Path) -> dict[str, dict[str, Any]]:
    rows = list(iter_rows(table))
    found = {Path(row["uri"]).name: row for row in rows}
    assert len(found) == len(rows)
    return found


def _counts(table: Path) -> dict[str, Any]:
    """The recorded counts, which are those of the table."""
    counts: dict[str, Any] = json.loads((table / "dataset.json").read_text())["counts"]
    whole = summarise(table)
    assert counts == whole | {
        "mean_quality": pytest.approx(whole["mean_quality"]),
        "errors": counts["errors"],
    }
    assert counts["errors"].keys() == whole["errors"].keys()
    return counts


def _forget_counts(table: Path) -> None:
    record = json.loads((table / "dataset.json").read_text())
    (table / "dataset.json").write_text(json.dumps(record | {"counts": {}}))


@pytest.fixture(scope="module")
def labelled(
    maskmill_joined: Run, toy_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Twelve scenes, of which two were not there yet and one was cut, and their table."""
    images = tmp_path_factory.mktemp("again") / "images"
    images.mkdir()
    for path in sorted(toy_images.iterdir())[:12]:
        shutil.copy(path, images)
    cut = images / "scene_003.png"
    cut.write_bytes(cut.read_bytes()[:300])
    listing = images.parent / "list.txt"
    for name in ("scene_001.png", "scene_007.png"):
        (images / name).rename(images / f".{name}")
    listing.write_text("".join(f"{images}/scene_{number:03d}.png\n" for number in range(12)))
    table = images.parent / "table"
    done = maskmill_joined(*_label(listing, table))
    assert done.returncode == 0 and "3 failed" in done.stderr, done.stderr
    return listing, table


@pytest.fixture
def copy(labelled: tuple[Path, Path], toy_images: Path, tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The list, and a copy of the table; the images are as they were when they were labelled."""
    listing, table = labelled
    images = listing.parent / "images"
    kept = {path: (path.read_bytes(), path.stat()) for path in images.iterdir()}
    yield listing, shutil.copytree(table, tmp_path / "table")
    for path in images.iterdir():
        path.unlink()
    for path, (data, status) in kept.items():
        path.write_bytes(data)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def _appear(listing: Path) -> None:
    for name in ("scene_001.png", "scene_007.png"):
        shutil.copy(listing.parent / "images" / f".{name}", listing.parent / "images" / name)


def test_failed_images_are_retried_and_only_these(maskmill_joined: Run, copy: tuple[Path, Path]) -> None:
    listing, table = copy
    before = _rows(table)
    assert "Nothing new" in maskmill_joined(*_label(listing, table)).stderr
    _appear(listing)
    longer = table.parent / "longer.txt"
    longer.write_text(listing.read_text() + f"{listing.parent}/images/.scene_001.png\n")
    done = maskmill_joined(*_label(longer, table, "--retry-failed"))
    assert done.returncode == 0 and "Labelling 3 images again" in done.stderr, done.stderr
    assert "Labelled 2 images" in done.stderr and "1 failed: 1 truncated" in done.stderr
    after = _rows(table)
    assert after.keys() == before.keys()
    again = ("scene_001.png", "scene_007.png")
    assert all(after[name]["status"] == "ok" and after[name]["mask"] for name in again)
    assert {name: row for name, row in after.items() if name not in again} == {
        name: row for name, row in before.items() if name not in again
    }
    assert _counts(table)["status"] == {"ok": 11, "truncated": 1}
    done = maskmill_joined(*_label(listing, table, "--retry-failed", "not_found"))
    assert done.returncode == 0 and "Nothing to retry" in done.stderr and "not_found" in done.stderr


def test_codes_choose_what_is_retried_and_the_failure_rate_is_that_of_this_run(
    maskmill_joined: Run, copy: tuple[Path, Path]
) -> None:
    listing, table = copy
    _appear(listing)
    # A run that was killed has added rows without counting them.
    _forget_counts(table)
    done = maskmill_joined(*_label(listing, table, "--retry-failed", "truncated", "unreadable"))
    assert done.returncode == 1 and "Labelling 1 images again" in done.stderr, done.stderr
    assert "100.0% of the images failed" in done.stderr and "Labelled 0 images" in done.stderr
    assert _counts(table)["status"] == {"ok": 9, "not_found": 2, "truncated": 1}
    wrong = maskmill_joined(*_label(listing, table, "--retry-failed", "trunkated"))
    assert wrong.returncode == 2 and "not_found (2), truncated (1)" in wrong.stderr, wrong.stderr


def test_changed_images_are_labelled_again_with_the_new_ones(
    maskmill_joined: Run, copy: tuple[Path, Path], toy_images: Path
) -> None:
    listing, table = copy
    images = listing.parent / "images"
    before = _rows(table)
    same = maskmill_joined(*_label(listing, table, "--changed"))
    assert "none has changed" in same.stderr, same.stderr
    _appear(listing)
    shutil.copy(toy_images / "scene_040.png", images / "scene_005.png")
    (images / "scene_006.png").touch()
    (images / "scene_009.png").write_text("no image any more")
    (images / "scene_010.png").unlink()
    shutil.copy(toy_images / "scene_050.png", images / "new.png")
    longer = table.parent / "longer.txt"
    longer.write_text(listing.read_text() + f"{images}/new.png\n")
    assert maskmill_joined("verify", table, "--images", listing, "--hashes").returncode == 1
    done = maskmill_joined(*_label(longer, table, "--changed"))
    assert done.returncode == 0, done.stderr
    assert "Labelling 4 images again and 1 new ones" in done.stderr and "1 are gone" in done.stderr
    after = _rows(table)
    changed = {name for name, row in before.items() if after[name] != row}
    assert changed == {"scene_001.png", "scene_005.png", "scene_007.png", "scene_009.png"}
    assert after.keys() - before.keys() == {"new.png"}
    assert after["scene_005.png"]["sha256"] != before["scene_005.png"]["sha256"]
    assert after["scene_009.png"]["status"] == "not_an_image"
    assert _counts(table)["images"] == 13
    again = maskmill_joined(*_label(longer, table, "--changed"))
    assert "none has changed" in again.stderr, again.stderr


def test_a_kill_while_images_are_labelled_again_loses_and_doubles_nothing(
    copy: tuple[Path, Path], maskmill_joined: Run, maskmill_environment: dict[str, str], shared_ray: str
) -> None:
    listing, table = copy
    _appear(listing)
    command = [sys.executable, "-m", "jobs.cli", *map(str, _label(listing, table, "--retry-failed"))]
    joining = maskmill_environment | {"RAY_ADDRESS": shared_ray}
    with subprocess.Popen(command, cwd=ROOT, env=joining, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not list((table / "relabelled").glob("part-*")) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert len(_rows(table)) == 12
    done = maskmill_joined(*_label(listing, table, "--retry-failed"))
    assert done.returncode == 0, done.stderr
    assert {row["status"] for row in _rows(table).values()} == {"ok", "truncated"}
    assert _counts(table)["status"] == {"ok": 11, "truncated": 1}
    assert not list((table / "relabelled").iterdir())


def test_counts_come_from_what_the_run_committed(
    maskmill_joined: Run, labelled: tuple[Path, Path], tmp_path: Path, toy_images: Path
) -> None:
    """A rerun for a few new images reads only their files at the end, and says how many they were."""
    listing, original = labelled
    table = shutil.copytree(original, tmp_path / "table")
    longer = tmp_path / "longer.txt"
    longer.write_text(listing.read_text() + f"{toy_images}/scene_060.png\n{tmp_path}/nowhere.png\n")
    done = maskmill_joined(*_label(longer, table))
    assert done.returncode == 0, done.stderr
    assert "Labelled 1 images" in done.stderr and "1 failed: 1 not_found" in done.stderr
    assert _counts(table)["images"] == 14
    _forget_counts(table)
    assert "Nothing new" in maskmill_joined(*_label(longer, table)).stderr
    assert _counts(table)["images"] == 14
