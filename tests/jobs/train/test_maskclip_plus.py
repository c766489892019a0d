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

import boto3
import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image

from jobs.benchmarks.toyworld.students import draw_scenes
from pipeline.files.storage import open_storage
from pipeline.metrics.confusion import confusion_matrix, mean_iou
from pipeline.toyworld.scenes import CLASSES
from pipeline.trained.student import load_student, read_student_record

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]
ROOT = Path(__file__).resolve().parents[3]
STEPS = 24
QUICK = (
    "augment.scale=[64, 64]", "crop=[64, 64]", f"iterations={STEPS}", "warmup=2", "guided=[1, 12]",
    "self_train=[13, -1]", "checkpoint_every=6", "log_every=2", "width=8",
)  # fmt: skip


def _set(*settings: str) -> list[str]:
    return [word for setting in (*QUICK, *settings) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 scenes as images and masks, some with odd names."""
    folder = tmp_path_factory.mktemp("scenes")
    draw_scenes(folder / "images", folder / "masks", 77, 16)
    drawn = sorted(path.name for path in (folder / "images").iterdir())
    for name, odd in zip(drawn, ("new\nline", "#comment", " leading", "%41", "a,b"), strict=False):
        for kind in ("images", "masks"):
            (folder / kind / name).rename(folder / kind / f"{odd}.png")
    return folder


@pytest.fixture(scope="module")
def table(maskmill_joined: Run, scenes: Path) -> Path:
    done = maskmill_joined(
        "label", "--images", scenes / "images", "--ontology", "toyworld", "--recipe", "toy",
        "--output", scenes / "table",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return scenes / "table"


@pytest.fixture(scope="module")
def student(maskmill_here: Run, table: Path, scenes: Path) -> Path:
    done = maskmill_here(
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
    # What follows the last step is named; no model is copied into MLflow unless it is asked for.
    for step in ("reading weights and labels", "writing the model", "writing the page"):
        assert re.search(rf"^\d\d:\d\d:\d\d {step}$", done.stderr, re.M), done.stderr
    assert "MLflow model" not in done.stderr and "copying the model" not in done.stderr
    return scenes / "student"


def _steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_writes_a_complete_student(student: Path, table: Path) -> None:
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


def test_the_same_command_again_does_nothing(maskmill_here: Run, student: Path, table: Path) -> None:
    before = (student / "model.safetensors").stat().st_mtime_ns
    again = ("train", "maskclip-plus", "--labels", table, "--output", student, "--recipe", "toy", *_set())
    done = maskmill_here(*again)
    assert done.returncode == 0 and "Nothing to do" in done.stderr
    assert (student / "model.safetensors").stat().st_mtime_ns == before


def test_a_missing_page_is_written_without_training(maskmill_here: Run, student: Path, table: Path) -> None:
    page, sheet = student / "report.html", student / "preview.png"
    before, text = (student / "model.safetensors").stat().st_mtime_ns, page.read_text()
    page.unlink()
    sheet.unlink()
    sheet.mkdir()  # blocks the picture, so that the page fails
    again = ("train", "maskclip-plus", "--labels", table, "--output", student, "--recipe", "toy", *_set())
    done = maskmill_here(*again)
    assert done.returncode == 1 and "no page" in done.stderr and "Traceback" not in done.stderr
    sheet.rmdir()
    done = maskmill_here(*again)
    assert done.returncode == 0 and "its page was missing" in done.stderr, done.stderr
    assert page.read_text() == text and sheet.is_file()
    assert (student / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_refuses_other_settings(
    maskmill_here: Run, student: Path, table: Path, tmp_path: Path
) -> None:
    done = maskmill_here(
        "train", "maskclip-plus", "--labels", table, "--output", student, "--recipe", "toy", *_set("anchor=0")
    )
    assert done.returncode == 2
    assert "selftrain.anchor: 1.0 there, 0.0 here" in done.stderr
    # What does not change the result may change: the recipe's name, and fields of the loop.
    (tmp_path / "mine.yaml").write_text("base: toy\n")
    free = maskmill_here(
        "train", "maskclip-plus", "--labels", table, "--output", student,
        "--recipe", tmp_path / "mine.yaml", *_set("keep=1"),
    )  # fmt: skip
    assert free.returncode == 0 and "Nothing to do" in free.stderr


def test_another_view_of_the_labels_is_another_training(
    maskmill_here: Run, student: Path, table: Path, tmp_path: Path
) -> None:
    command = ("train", "maskclip-plus", "--labels", table, "--recipe", "toy", *_set())
    view = ("--threshold", "0.3", "--merge", "fish,leaf=thing", "--drop", "sky")
    done = maskmill_here(*command, *view, "--output", student)
    assert done.returncode == 2 and "view: null there" in done.stderr, done.stderr
    short = ("--set", "iterations=4", "--set", "guided=[1, 2]", "--set", "self_train=[3, -1]")
    # What is sure in the table is believed, what is less so is guessed.
    (tmp_path / "sure.yaml").write_text("threshold: 0.6\nmerge: {thing: [fish, leaf]}\n")
    known = ("--known", table, "--known-view", tmp_path / "sure.yaml")
    known = (*known, "--second", table)
    done = maskmill_here(*command, *short, *view, *known, "--output", tmp_path / "seen")
    assert done.returncode == 0, done.stderr
    assert "16 images have known labels" in " ".join(done.stderr.split())
    record = read_student_record(tmp_path / "seen")
    assert record.ontology.num_classes == len(CLASSES) - 1 and record.ontology.names[-1] == "sky"
    assert record.teacher["view"]["drop"] == ["sky"] and record.teacher["known"]["view"]["threshold"] == 0.6
    assert record.teacher["second"] == str(table)
    lines = (tmp_path / "seen/metrics.jsonl").read_text().splitlines()
    guessed = [json.loads(line)["guessed"] for line in lines]
    assert all(0 < share < 0.9 for share in guessed), "some pixels are known, some guessed"
    assert "fish and leaf are thing" in (tmp_path / "seen/report.html").read_text()


def test_a_finished_student_can_be_registered_later(
    maskmill_here: Run, student: Path, table: Path, tmp_path: Path
) -> None:
    store = f"sqlite:///{tmp_path / 'runs.db'}"
    done = maskmill_here(
        "train", "maskclip-plus", "--labels", table, "--output", student, "--recipe", "toy", *_set(),
        "--register", "pets", "--tracking", store,
    )  # fmt: skip
    assert done.returncode == 0 and "pets version 1 (challenger)" in done.stderr, done.stderr
    client = MlflowClient(tracking_uri=store, registry_uri=store)
    version = client.get_model_version_by_alias("pets", "challenger")
    assert str(version.version) == "1" and client.get_run(version.run_id).info.status == "FINISHED"


def test_foreign_files_are_left_alone(maskmill_here: Run, table: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    for extra in ((), ("--overwrite",)):
        done = maskmill_here(
            "train",
            "maskclip-plus",
            "--labels",
            table,
            "--output",
            tmp_path,
            "--recipe",
            "toy",
            *_set(),
            *extra,
        )
        assert done.returncode == 2 and "report.html" in done.stderr
    assert (tmp_path / "report.html").read_text() == "mine"


def test_a_student_labels_and_is_evaluated(
    maskmill_joined: Run, student: Path, scenes: Path, tmp_path: Path
) -> None:
    done = maskmill_joined(
        "evaluate", "--model", student, "--images", scenes / "images", "--truth", scenes / "masks",
        "--ontology", "toyworld", "--output", tmp_path / "result",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result" / "evaluation.json").read_text())
    assert result["images"]["evaluated"] == 16 and result["model"]["toy"]
    record = json.loads((tmp_path / "result" / "labels" / "dataset.json").read_text())
    assert record["counts"]["images"] == 16 and record["weights"]["model"].startswith("student:")
    # The network itself, on the same images.
    network = load_student(read_student_record(student), device=torch.device("cpu"), dtype=torch.float32)
    confusion = np.zeros((14, 15), np.int64)
    for path in sorted((scenes / "images").iterdir()):
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None]
        with torch.inference_mode():
            labels = network(pixels)[0].argmax(0).numpy().astype(np.uint8)
        truth = np.asarray(Image.open(scenes / "masks" / path.name))
        confusion += confusion_matrix(truth, labels, 14, ignore_index=255)
    assert result["metrics"]["miou"] == pytest.approx(mean_iou(confusion), abs=0.02)  # bf16 against fp32


def test_a_killed_driver_resumes_to_the_same_student(
    maskmill_here: Run, maskmill_environment: dict[str, str], student: Path, table: Path, tmp_path: Path
) -> None:
    output = tmp_path / "student"
    arguments = ["train", "maskclip-plus", "--labels", table, "--output", output, "--recipe", "toy", *_set()]
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    driver = subprocess.Popen(command, cwd=ROOT, env=maskmill_environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    # Kill it after the guided phase, which the resumed run must not repeat.
    while not (output / "checkpoints" / "step-0000018" / "manifest.json").exists():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = maskmill_here(*arguments)
    assert done.returncode == 0, done.stderr
    resumed = re.search(r"resumed from step (\d+)", done.stderr)
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


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.long)])
def test_zero_shot_training_never_sees_the_unseen(
    maskmill_here: Run, maskmill_joined: Run, table: Path, scenes: Path, tmp_path: Path, workers: int
) -> None:
    """Swapping the truth of the unseen classes yields the same student."""
    maskmill = maskmill_joined if workers else maskmill_here
    swapped = tmp_path / "masks"
    swapped.mkdir()
    sand, zebra = CLASSES.index("sand"), CLASSES.index("zebra")
    for path in (scenes / "masks").iterdir():
        mask = np.asarray(Image.open(path))
        other = np.where(mask == sand, zebra, np.where(mask == zebra, sand, mask)).astype(np.uint8)
        Image.fromarray(other).save(swapped / path.name)
    prints = []
    for number, masks in enumerate((scenes / "masks", swapped)):
        output = tmp_path / f"student-{number}"
        done = maskmill(
            "train", "maskclip-plus", "--labels", table, "--output", output, "--recipe", "toy",
            "--unseen", "sand, zebra", "--images", scenes / "images", "--truth", masks,
            "--workers", workers,
            *_set("batch_size=4", "iterations=8", "guided=[1, 5]", "self_train=[6, -1]"),
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        record = json.loads((output / "student.json").read_text())
        assert record["training"]["unseen"] == ["sand", "zebra"] and record["recipe"]["form"] == "zero-shot"
        prints.append(record["fingerprint"])
    assert prints[0] == prints[1]


def test_a_collapse_is_stopped_and_the_guided_student_kept(
    maskmill_here: Run, table: Path, tmp_path: Path
) -> None:
    # Over three seeds, the drift is 0.03 to 0.06 a step after the guided phase.
    command = (
        "train", "maskclip-plus", "--labels", table, "--output", tmp_path / "student", "--recipe", "toy",
        *_set("drift_bound=0.001", "drift_patience=1"),
    )  # fmt: skip
    done = maskmill_here(*command)
    assert done.returncode == 1 and "self_training_collapsed" in done.stderr, done.stderr
    record = json.loads((tmp_path / "student" / "student.json").read_text())
    assert record["training"]["iterations"] == 12 and "collapsed" in record["training"]["stopped"]
    assert "Stopped early" in (tmp_path / "student" / "report.html").read_text()
    again = maskmill_here(*command)
    assert again.returncode == 1 and "was stopped" in again.stderr


def test_a_run_in_an_object_store(maskmill_here: Run, table: Path, s3: dict[str, str]) -> None:
    boto3.client("s3").create_bucket(Bucket="students")
    command = (
        "train", "maskclip-plus", "--labels", table, "--output", "s3://students/student", "--recipe", "toy",
        *_set("iterations=4", "guided=[1, 2]", "self_train=[3, -1]", "checkpoint_every=2"),
    )  # fmt: skip
    done = maskmill_here(*command, **s3)
    assert done.returncode == 0, done.stderr
    assert s3["AWS_SECRET_ACCESS_KEY"] not in done.stderr
    assert "no page" in done.stderr
    record = read_student_record("s3://students/student")
    student = load_student(record, device=torch.device("cpu"), dtype=torch.float32)
    assert student.num_classes == 14 and record.training["iterations"] == 4
    storage = open_storage("s3://students/student")
    assert not storage.exists("lease.json") and len(storage.read_bytes("metrics.jsonl").splitlines()) == 2
    again = maskmill_here(*command, **s3)
    assert again.returncode == 0 and "Nothing to do" in again.stderr, again.stderr


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
def test_mistakes_are_reported_before_work_starts(
    maskmill_joined: Run, table: Path, tmp_path: Path, extra: list[str], says: str
) -> None:
    done = maskmill_joined("train", "maskclip-plus", "--labels", table, "--output", tmp_path / "x", *extra)
    assert done.returncode == 2, done.stderr
    assert says.lower() in done.stderr.lower() and "Traceback" not in done.stderr
