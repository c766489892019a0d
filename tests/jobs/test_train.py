"""``maskmill train maskclip-plus`` from the command line, on a small label table of toy scenes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from jobs.benchmarks.toy_students import _draw as draw_scenes

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
QUICK = (
    "augment.scale=[64, 64]", "crop=[64, 64]", f"iterations={STEPS}", "warmup=2", "guided=[1, 12]",
    "self_train=[13, -1]", "checkpoint_every=6", "log_every=2", "width=8",
)  # fmt: skip


def _set(*settings: str) -> list[str]:
    return [word for setting in (*QUICK, *settings) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    draw_scenes(folder / "images", folder / "masks", 77, 16)
    return folder


@pytest.fixture(scope="module")
def table(maskmill: Run, scenes: Path) -> Path:
    done = maskmill(
        "label", "--images", scenes / "images", "--ontology", "toyworld", "--recipe", "toy",
        "--output", scenes / "table",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return scenes / "table"


@pytest.fixture(scope="module")
def student(maskmill: Run, table: Path, scenes: Path) -> Path:
    done = maskmill(
        "train",
        "maskclip-plus",
        "--labels",
        table,
        "--output",
        scenes / "student",
        "--recipe",
        "toy",
        *_set(),
    )
    assert done.returncode == 0, done.stderr
    assert f"Trained {STEPS} steps" in done.stderr
    return scenes / "student"


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_student_has_all_that_it_needs(student: Path, table: Path) -> None:
    record = json.loads((student / "student.json").read_text())
    assert record["kind"] == "student" and record["recipe"]["name"] == "toy"
    assert record["teacher"]["labels"] == str(table) and record["text"]["model"] == "toyclip"
    assert record["training"]["iterations"] == STEPS and record["labelling"]["scale"] == [512, 128]
    assert _steps(student) == list(range(2, STEPS + 1, 2))
    phases = [json.loads(line)["phase"] for line in (student / "metrics.jsonl").read_text().splitlines()]
    assert phases == [1.0] * 6 + [2.0] * 6
    assert (student / "checkpoints" / "step-0000012").is_dir()  # the end of the guided phase is kept
    page = (student / "report.html").read_text()
    assert "Side by side" in page and "agreement with the teacher" in page
    with Image.open(student / "preview.png") as sheet:
        assert sheet.width > 600


def test_the_same_command_again_does_nothing(maskmill: Run, student: Path, table: Path) -> None:
    before = (student / "model.safetensors").stat().st_mtime_ns
    again = ("train", "maskclip-plus", "--labels", table, "--output", student, "--recipe", "toy", *_set())
    done = maskmill(*again)
    assert done.returncode == 0 and "Nothing to do" in done.stderr
    assert (student / "model.safetensors").stat().st_mtime_ns == before


def test_a_student_labels_and_is_evaluated(
    maskmill: Run, student: Path, scenes: Path, tmp_path: Path
) -> None:
    done = maskmill("label", "--model", student, "--images", scenes / "images", "--output", tmp_path / "own")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "own" / "dataset.json").read_text())
    assert record["counts"]["images"] == 16 and record["weights"]["model"].startswith("student:")
    done = maskmill(
        "evaluate", "--model", student, "--images", scenes / "images", "--truth", scenes / "masks",
        "--ontology", "toyworld", "--output", tmp_path / "result",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    assert 0 < result["metrics"]["miou"] < 1 and result["images"]["evaluated"] == 16


def test_a_killed_driver_goes_on_and_gives_the_same_student(
    maskmill: Run, maskmill_environment: dict[str, str], student: Path, table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "student"
    arguments = ["train", "maskclip-plus", "--labels", table, "--output", output, "--recipe", "toy", *_set()]
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    driver = subprocess.Popen(command, cwd=ROOT, env=maskmill_environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    # Beyond the end of the guided phase: what goes on must not replay it.
    while not (output / "checkpoints" / "step-0000018" / "manifest.json").exists():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = maskmill(*arguments)
    assert done.returncode == 0, done.stderr
    resumed = re.search(r"went on from step (\d+)", done.stderr)
    assert resumed and int(resumed[1]) >= 18
    assert _steps(output) == _steps(student)
    lines = {
        path: [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (output, student)
    }
    for ours, theirs in zip(lines[output], lines[student], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5) and ours["phase"] == theirs["phase"]
    weights = {path: (path / "model.safetensors").read_bytes() for path in (output, student)}
    assert weights[output] == weights[student]


def test_zero_shot_with_two_workers_never_sees_the_unseen(
    maskmill: Run, table: Path, scenes: Path, tmp_path: Path
) -> None:
    done = maskmill(
        "train", "maskclip-plus", "--labels", table, "--output", tmp_path / "student", "--recipe", "toy",
        "--unseen", "sand, zebra", "--images", scenes / "images", "--truth", scenes / "masks",
        "--workers", "2", *_set("batch_size=4"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "student" / "student.json").read_text())
    assert record["training"]["unseen"] == ["sand", "zebra"]
    assert record["recipe"]["form"] == "zero-shot"


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (["--recipe", "toy", "--unseen", "unicorn"], "unicorn"),
        (["--recipe", "toy", "--unseen", "sand"], "trains with truth"),
        (["--recipe", "toys"], "Did you mean toy"),
        (["--recipe", "toy", "--set", "batch_size=3", "--workers", "2"], "multiple of 2"),
        (["--recipe", "maskclip-plus-voc20", "--set", "iterations=1"], "imagenet"),
    ],
)
def test_mistakes_are_told_before_work_starts(
    maskmill: Run, table: Path, tmp_path: Path, extra: list[str], says: str
) -> None:
    done = maskmill("train", "maskclip-plus", "--labels", table, "--output", tmp_path / "x", *extra)
    assert done.returncode == 2, done.stderr
    assert says.lower() in done.stderr.lower() and "Traceback" not in done.stderr
