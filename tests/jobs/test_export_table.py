"""``maskmill export`` of label tables: kills, Ray, memory, and what it says."""

from __future__ import annotations

import contextlib
import io
import json
import tracemalloc
from pathlib import Path

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from benchmarks.faults.runs import Command
from pipeline.files.status import STATUS_FILE
from pipeline.files.storage import Storage, open_storage
from pipeline.formats.export import finish
from pipeline.formats.parts import write_part
from pipeline.formats.plan import make_plan
from pipeline.formats.record import Export, new_export
from pipeline.formats.registry import make_format
from pipeline.formats.samples import Source
from pipeline.table.record import read_table_record
from tests.pipeline.formats.tables import toy_table


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of an export, without what its latest run says of itself."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name != STATUS_FILE}


@pytest.mark.slow
def test_a_killed_export_goes_on_and_is_the_same(
    tmp_path: Path, maskmill_here, maskmill_environment: dict[str, str]
) -> None:
    """A real SIGKILL, twice, among many small files."""
    toy_table(tmp_path / "table", 240, images=tmp_path / "images", rows_a_part=1)
    arguments = [str(tmp_path / "table"), "--format", "coco", "--with-images", "--val-share", "0.2"]
    whole = maskmill_here("export", *arguments, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr

    out = tmp_path / "out"
    marks = out / ".maskmill" / "parts"
    command = ["export", *arguments, "--output", str(out)]
    for least in (2, 12):
        run = Command(command, maskmill_environment, tmp_path / "log.txt")
        assert run.wait_until(lambda least=least: marks.is_dir() and len(list(marks.iterdir())) >= least)
        run.driver.kill()
        assert run.wait() == -9
    assert not json.loads((out / "export.json").read_text())["complete"]
    done = maskmill_here(*command)
    assert done.returncode == 0 and "Going on: " in done.stderr, done.stderr
    assert files_of(out) == files_of(tmp_path / "whole")
    again = maskmill_here(*command)
    assert again.returncode == 0 and "Nothing new" in again.stderr
    assert files_of(out) == files_of(tmp_path / "whole")


@pytest.mark.cluster
def test_ray_writes_the_same(tmp_path: Path, maskmill_here, maskmill_joined) -> None:
    toy_table(tmp_path / "table", 40)
    command = ("export", tmp_path / "table", "--format", "coco", "--min-area", 4, "--set", "crowd=true")
    joined = maskmill_joined(*command, "--output", tmp_path / "joined")
    assert joined.returncode == 0 and "Exported 39 images" in joined.stderr, joined.stderr
    here = maskmill_here(*command, "--output", tmp_path / "here", "--workers", 0)
    assert here.returncode == 0
    assert files_of(tmp_path / "joined") == files_of(tmp_path / "here")
    # What goes wrong on a worker is told in words.
    (part, *_) = (tmp_path / "table" / "labels").iterdir()
    part.write_bytes(part.read_bytes()[:-200] + bytes(200))
    broken = maskmill_joined(*command, "--output", tmp_path / "broken")
    assert broken.returncode == 1 and "[table_damaged]" in broken.stderr, broken.stderr


def prepared(table: Storage, output: Path, name: str) -> Export:
    record = read_table_record(table.uri)
    return new_export(Source(table), record, make_format(name, {}), open_storage(output))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["png", "coco"])
def test_memory_does_not_grow_with_the_table(tmp_path: Path, name: str) -> None:
    peaks = []
    for count in (24, 24, 240):  # the first warms up
        folder = tmp_path / f"{len(peaks)}"
        work = prepared(toy_table(folder / "table", count, size=64, rows_a_part=6), folder / "out", name)
        tracemalloc.start()
        plan = make_plan(work)
        for part in plan.todo:
            write_part(part, export=work, plan=plan)
        finish(work, plan)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.3 * peaks[1] + 200_000, peaks


def test_a_table_is_scored_by_pycocotools(tmp_path: Path, maskmill_here) -> None:
    """Labels that are thinned by a view find the truth less well than the truth itself."""
    toy_table(tmp_path / "table", 12, size=64)
    precision = {}
    for name, view in {"truth": (), "same": (), "fewer": ("--drop", "zebra, fish, sky")}.items():
        done = maskmill_here(
            "export", tmp_path / "table", "--format", "coco", "--output", tmp_path / name, *view
        )
        assert done.returncode == 0, done.stderr
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(tmp_path / "truth/annotations/instances_train.json")
        by_name = {category["name"]: category["id"] for category in truth.dataset["categories"]}
        for name in ("same", "fewer"):
            made = json.loads((tmp_path / name / "annotations/instances_train.json").read_text())
            names = {category["id"]: category["name"] for category in made["categories"]}
            found = [
                {
                    "image_id": one["image_id"],
                    "category_id": by_name[names[one["category_id"]]],
                    "segmentation": one["segmentation"],
                    "score": 1.0,
                }
                for one in made["annotations"]
            ]
            scores = COCOeval(truth, truth.loadRes(found), "segm")
            scores.params.maxDets = [1000, 1000, 1000]
            scores.evaluate()
            scores.accumulate()
            precision[name] = float(scores.eval["precision"][scores.eval["precision"] > -1].mean())
    assert precision["same"] == pytest.approx(1.0)
    assert 0.2 < precision["fewer"] < 0.95


def test_a_student_and_a_format_of_tables_do_not_fit(tmp_path: Path, maskmill_here) -> None:
    (tmp_path / "student.json").write_text("{}")
    done = maskmill_here("export", tmp_path, "--format", "coco", "--output", tmp_path / "out")
    assert done.returncode == 2 and "Formats of students: onnx, torch." in done.stderr
