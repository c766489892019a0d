"""Damaged tables through the command line: found, repaired, and made whole by the next run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.faults.damage import DAMAGES, parts
from pipeline.table.labels import iter_rows
from pipeline.table.lease import LEASE_FILE, Holder

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]


def _label(images: Path, output: Path, *more: object) -> list[object]:
    return [
        "label",
        "--images",
        images,
        "--ontology",
        "toyworld",
        "--output",
        output,
        "--recipe",
        "toy",
        *more,
    ]


def _labels(table: Path) -> dict[str, Any]:
    """All that labelling finds out, by image."""
    rows = list(iter_rows(table))
    found = {row["uri"]: {name: value for name, value in row.items() if name != "version"} for row in rows}
    assert len(found) == len(rows)
    return found


@pytest.fixture(scope="module")
def labelled(maskmill_joined: Run, toy_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("labelled") / "table"
    done = maskmill_joined(*_label(toy_images, output))
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def table(labelled: Path, tmp_path: Path) -> Path:
    return shutil.copytree(labelled, tmp_path / "table")


#: One of each kind that is told by the files alone.
ONE_OF_EACH = (
    "torn", "other columns", "copied", "renamed", "a row twice", "no mask", "mask no PNG", "confidence torn",
    "height", "no class", "mask edited",
)  # fmt: skip


def test_a_table_with_every_kind_of_damage_becomes_what_it_was(
    maskmill_joined: Run, maskmill_here: Run, toy_images: Path, table: Path
) -> None:
    before = _labels(table)
    assert maskmill_here("verify", table, "--images", toy_images, "--hashes").returncode == 0
    hurt = parts(table)[: len(ONE_OF_EACH)]
    kinds = set()
    for name, part in zip(ONE_OF_EACH, hurt, strict=True):
        DAMAGES[name][0](part)
        kinds |= DAMAGES[name][1]
    assert len(kinds) >= 10
    told = maskmill_here("verify", table, "--images", toy_images)
    assert told.returncode == 1 and "--repair" in told.stdout
    assert all(f"[{kind}]" in told.stdout for kind in kinds), told.stdout
    result = json.loads(maskmill_here("verify", table, "--json").stdout)
    assert kinds <= result["problems"].keys() and not result["repaired"]
    assert all(entry["count"] and entry["examples"] for entry in result["problems"].values())

    repaired = maskmill_here("verify", table, "--repair")
    assert repaired.returncode == 0 and "set aside as set_aside/" in repaired.stdout, repaired.stdout
    assert maskmill_here("verify", table).returncode == 0
    assert maskmill_here("verify", table, "--images", toy_images).returncode == 1  # images are missing
    done = maskmill_joined(*_label(toy_images, table))
    assert done.returncode == 0, done.stderr
    whole = maskmill_here("verify", table, "--images", toy_images, "--hashes")
    assert whole.returncode == 0 and "Nothing is wrong." in whole.stdout, whole.stdout
    assert _labels(table) == before
    assert json.loads((table / "dataset.json").read_text())["counts"]["images"] == len(before)


def test_on_ray_as_in_this_process(maskmill_joined: Run, table: Path) -> None:
    DAMAGES["mask edited"][0](parts(table)[3])
    DAMAGES["torn"][0](parts(table)[4])
    here, there = (
        json.loads(maskmill_joined("verify", table, "--json", "--workers", workers).stdout)
        for workers in (0, 2)
    )
    assert here == there and here["problems"].keys() == {
        "statistics_differ", "part_unreadable", "counts_differ"
    }  # fmt: skip


def test_labelling_sets_damaged_files_aside_and_goes_on(
    maskmill_joined: Run, toy_images: Path, table: Path
) -> None:
    before = _labels(table)
    names = ("emptied", "torn", "copied", "other columns", "overwritten")
    for name, part in zip(names, parts(table)[1:], strict=False):
        DAMAGES[name][0](part)
    done = maskmill_joined(*_label(toy_images, table))
    assert done.returncode == 0, done.stderr
    assert "It is now set_aside/" in done.stderr and "Traceback" not in done.stderr
    assert "taken out" in done.stderr
    assert _labels(table) == before
    assert len(list((table / "set_aside").iterdir())) == len(names)


def test_readers_say_what_to_run(maskmill_here: Run, table: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(table, tmp_path / "torn")
    DAMAGES["torn"][0](parts(torn)[2])
    DAMAGES["copied"][0](parts(table)[2])
    for hurt in (torn, table):
        shown = maskmill_here("show", hurt)
        assert shown.returncode == 1 and f"maskmill verify {hurt} --repair" in shown.stderr, shown.stderr
        trained = maskmill_here(
            "train", "maskclip-plus", "--labels", hurt, "--output", tmp_path / "student",
            "--recipe", "toy",
        )  # fmt: skip
        assert "maskmill verify" in trained.stderr and "Traceback" not in trained.stderr, trained.stderr


@pytest.mark.parametrize("record", ["[1, 2]", '"text"', "null", "3", "{}", '{"ontology": []}', "{torn", ""])
def test_another_kind_of_dataset_json_is_told_in_words(
    maskmill_here: Run, toy_images: Path, table: Path, record: str
) -> None:
    (table / "dataset.json").write_text(record)
    before = {path: path.read_bytes() for path in table.rglob("*") if path.is_file()}
    for command in (_label(toy_images, table), ["verify", table, "--repair"], ["show", table]):
        done = maskmill_here(*command)
        assert done.returncode in (1, 2) or (command[0] == "show" and record == "null"), done.stderr
        assert "Traceback" not in done.stderr and ("dataset.json" in done.stderr or command[0] == "show")
    (table / "gallery.html").unlink(missing_ok=True)
    assert {path: path.read_bytes() for path in table.rglob("*") if path.is_file()} == before


def test_repairing_waits_for_the_lease(maskmill_here: Run, table: Path) -> None:
    DAMAGES["torn"][0](parts(table)[2])
    (table / LEASE_FILE).write_bytes(Holder.me("another-run").encoded())
    before = sorted(table.rglob("*"))
    refused = maskmill_here("verify", table, "--repair")
    assert refused.returncode == 1 and "Another run" in refused.stderr
    assert sorted(table.rglob("*")) == before
    assert maskmill_here("verify", table).returncode == 1  # looking is free
