"""The label job through its command line, on a real local Ray."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.errors import FailedWork, WrongUse
from pipeline.files.storage import Storage
from pipeline.labelling import prepare as preparation
from pipeline.review.desk import open_desk
from pipeline.review.queue import Entry, Queue
from pipeline.table.corrections import open_corrections
from pipeline.table.labels import LABEL_SCHEMA, iter_rows

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.cluster, pytest.mark.slow]

Run = Callable[..., subprocess.CompletedProcess[str]]
CLASSES = "grass, water, sand, brick, sky, wood, ladybug, zebra"


def read_table(output: Path) -> pa.Table:
    return pa.concat_tables(pq.read_table(path) for path in sorted((output / "labels").glob("*.parquet")))


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def toy(images: Path, output: Path, *more: object) -> list[object]:
    return ["label", "--images", images, "--classes", CLASSES, "--output", output, "--recipe", "toy", *more]


@pytest.fixture(scope="module")
def labelled(
    maskmill_joined: Run, toy_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, str]:
    """A folder of good and bad images, its table, and what the command said."""
    images = tmp_path_factory.mktemp("mixed") / "images"
    shutil.copytree(toy_images, images)
    good = (images / "scene_000.png").read_bytes()
    (images / "truncated.png").write_bytes(good[: len(good) // 2])
    (images / "empty.jpg").write_bytes(b"")
    (images / "text.jpg").write_text("this is no image")
    bomb = io.BytesIO()
    Image.new("1", (33_000, 33_000)).save(bomb, "PNG")  # more than windows may have
    (images / "bomb.png").write_bytes(bomb.getvalue())
    (images / "vanished.png").symlink_to(images / "nowhere.png")
    Image.open(images / "scene_001.png").convert("CMYK").resize((150, 61)).save(images / "cmyk.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(images / "scene_002.png").resize((120, 80)).save(images / "turned.jpg", exif=exif)
    listing = images.parent / "list.txt"
    listing.write_text("".join(f"{path}\n" for path in sorted(images.iterdir())))
    output = images.parent / "table"
    done = maskmill_joined(*toy(listing, output, "--max-failure-rate", "0.5"))
    assert done.returncode == 0, done.stderr
    return listing, output, done.stderr


def test_every_image_has_one_row_and_failures_have_codes(labelled: tuple[Path, Path, str]) -> None:
    listing, output, said = labelled
    table = read_table(output)
    assert sorted(table["uri"].to_pylist()) == sorted(listing.read_text().split())
    assert len(set(table["id"].to_pylist())) == table.num_rows
    status = dict(
        zip((Path(uri).name for uri in table["uri"].to_pylist()), table["status"].to_pylist(), strict=True)
    )
    failed = {name: code for name, code in status.items() if code != "ok"}
    assert failed == {
        "truncated.png": "truncated",
        "empty.jpg": "empty",
        "text.jpg": "not_an_image",
        "bomb.png": "too_large",
        "vanished.png": "not_found",
    }
    assert "5 failed" in said and "1 too_large" in said
    for row in table.to_pylist():
        if row["status"] != "ok":
            assert row["error"] and row["mask"] is None and row["segments"] is None


def test_schema_record_and_masks(labelled: tuple[Path, Path, str]) -> None:
    _, output, _ = labelled
    table = read_table(output)
    assert table.schema.names == LABEL_SCHEMA.names
    assert table.schema.types == LABEL_SCHEMA.types
    record = json.loads((output / "dataset.json").read_text())
    assert record["ontology"]["names"] == ["background", *(name.strip() for name in CLASSES.split(","))]
    assert record["recipe"]["name"] == "toy" and record["precision"] in ("bf16", "fp32", "fp16")
    assert len(record["weights"]["fingerprint"]) == 64
    assert "data_files: labels/*.parquet" in (output / "README.md").read_text()
    for row in table.to_pylist():
        if row["status"] != "ok":
            continue
        assert row["sha256"] == hashlib.sha256(Path(row["uri"]).read_bytes()).digest()
        mask = np.asarray(Image.open(io.BytesIO(row["mask"]["bytes"])))
        assert mask.shape == (row["height"], row["width"])
        assert np.asarray(Image.open(io.BytesIO(row["confidence"]["bytes"]))).shape == mask.shape
        assert {segment["class_id"] for segment in row["segments"]} == set(np.unique(mask).tolist()) - {255}
        assert sum(segment["area"] for segment in row["segments"]) == (mask != 255).sum()
        assert 0 <= row["quality"] <= 1
    turned = next(row for row in table.to_pylist() if row["uri"].endswith("turned.jpg"))
    assert (turned["height"], turned["width"]) == (120, 80)  # after its EXIF orientation


def test_nothing_new_is_said_at_once_and_new_images_are_added(
    maskmill_joined: Run, labelled: tuple[Path, Path, str], tmp_path: Path
) -> None:
    listing, original, _ = labelled
    output = tmp_path / "table"
    shutil.copytree(original, output)
    before = {path.name: path.read_bytes() for path in (output / "labels").iterdir()}
    again = maskmill_joined(*toy(listing, output))
    assert again.returncode == 0 and "Nothing new" in again.stderr
    assert {path.name: path.read_bytes() for path in (output / "labels").iterdir()} == before

    new = tmp_path / "new.png"
    shutil.copy(
        next(path for path in map(Path, listing.read_text().split()) if path.name == "scene_003.png"), new
    )
    grown = tmp_path / "list.txt"
    grown.write_text(listing.read_text() + f"{new}\n")
    added = maskmill_joined(*toy(grown, output))
    assert added.returncode == 0, added.stderr
    assert f"1 new of {len(listing.read_text().split()) + 1}" in added.stderr
    assert sorted(read_table(output)["uri"].to_pylist()) == sorted(grown.read_text().split())
    assert {name: (output / "labels" / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("cores", [None, pytest.param(1, marks=pytest.mark.long)])
def test_labels_do_not_depend_on_workers_or_batches(
    maskmill: Run, maskmill_joined: Run, labelled: tuple[Path, Path, str], tmp_path: Path, cores: int | None
) -> None:
    listing, output, _ = labelled
    other = tmp_path / "table"
    # Another order makes other parts; the batch of 5 other batches; one core other threads, on its own Ray.
    reverse = tmp_path / "list.txt"
    reverse.write_text("".join(f"{line}\n" for line in reversed(listing.read_text().split())))
    run = functools.partial(maskmill, cores=cores) if cores else maskmill_joined
    done = run(*toy(reverse, other, "--set", "batch_size=5", "--max-failure-rate", "1"))
    assert done.returncode == 0, done.stderr
    mine, theirs = (
        {row["uri"]: (row["mask"] and row["mask"]["bytes"], row["confidence"] and row["confidence"]["bytes"])
         for row in read_table(folder).select(["uri", "mask", "confidence"]).to_pylist()}
        for folder in (output, other)
    )  # fmt: skip
    assert mine == theirs


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--set", "pd_threshold=0.5"], "pd_threshold: 0.0 there, 0.5 here"),
        (["--no-background"], "classes (ontology) differ"),
    ],
)
def test_a_table_is_never_mixed(
    maskmill_here: Run, labelled: tuple[Path, Path, str], more: list[str], says: str
) -> None:
    listing, output, _ = labelled
    before = sorted(path.name for path in (output / "labels").iterdir())
    done = maskmill_here(*toy(listing, output, *more))
    assert done.returncode == 2
    assert says in done.stderr and "--overwrite" in done.stderr
    assert sorted(path.name for path in (output / "labels").iterdir()) == before


def test_overwriting_keeps_the_old_table_until_the_new_one_can_be_made(
    maskmill_joined: Run, labelled: tuple[Path, Path, str], tmp_path: Path
) -> None:
    listing, output, _ = labelled
    mine = tmp_path / "table"
    shutil.copytree(output, mine)
    before = sorted(path.name for path in (mine / "labels").iterdir())
    accepted = next(row["id"] for row in iter_rows(mine) if row["status"] == "ok")
    entries = (Entry(id=accepted, uri=""),)
    said = Queue(table=str(mine), corrections=str(mine / "corrections"), entries=entries)
    open_desk(said).save(accepted, "accepted", None, reviewer="Ann", follows=None)
    wrong = maskmill_joined(*toy(listing, mine, "--overwrite", "--set", "pretrained=wieghts.pt"))
    assert wrong.returncode == 2 and "wieghts.pt" in wrong.stderr
    assert sorted(path.name for path in (mine / "labels").iterdir()) == before
    done = maskmill_joined(
        *toy(listing, mine, "--overwrite", "--set", "head=plain", "--max-failure-rate", "0.5")
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((mine / "dataset.json").read_text())["recipe"]["maskclip"]["head"] == "plain"
    old, new = (
        dict(zip(*read_table(folder).select(["id", "mask"]).to_pydict().values(), strict=True))
        for folder in (output, mine)
    )
    assert old.keys() == new.keys() and old != new
    # What people said of the old labels stays, and counts instead of the new.
    corrections = open_corrections(str(mine))
    assert corrections is not None and corrections.ids.tolist() == [accepted]
    assert corrections.corrected({"id": accepted, "mask": new[accepted]})["mask"] == old[accepted]


WATCHED = """
import os, sys, threading
late = []
def hook(event, arguments):
    if event == "os.putenv" and os.fsdecode(arguments[0]) not in os.environ:
        threads = [thread.name for thread in threading.enumerate()]
        if threading.current_thread() is threading.main_thread() and "embedding_0" in threads:
            late.append(os.fsdecode(arguments[0]))
sys.addaudithook(hook)
from jobs.cli import main
try:
    main()
finally:
    print("new variables:", late)
"""


@pytest.mark.long
def test_no_variable_is_new_while_names_are_embedded(
    toy_images: Path, maskmill_environment: dict[str, str], tmp_path: Path
) -> None:
    """torch looks up variables there, and would crash while a new one moves the environment."""
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(sorted(toy_images.iterdir())[0], images)
    made = ("RAY_", "MASKMILL_RUN", "GLIBC_", "TOKENIZERS_", "PYTHONBREAKPOINT")  # in this process, perhaps
    kept = {name: value for name, value in maskmill_environment.items() if not name.startswith(made)}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *map(str, toy(images, tmp_path / "table"))],
        cwd=ROOT,
        env=kept,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and "new variables: []" in done.stdout, done.stdout + done.stderr


def test_foreign_folders_are_left_alone(maskmill_here: Run, toy_images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    theirs = tmp_path / "labels" / "mine.parquet"
    pq.write_table(pa.table({"a": [1]}), theirs)
    done = maskmill_here(*toy(toy_images, tmp_path))
    assert done.returncode == 2 and "no dataset.json" in done.stderr
    assert theirs.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--classes", "cat"], "--images"),
        (["--images", "IMAGES"], "--classes"),
        (["--images", "IMAGES", "--classes", "cat, cat"], "cat"),
        (["--images", "IMAGES", "--classes", "cat", "--recipe", "nobody"], "nobody"),
        (["--images", "IMAGES", "--classes", "cat", "--min-confidence", "7"], "between 0 and 1"),
        (["--images", "nowhere-at-all", "--classes", "cat"], "nowhere-at-all"),
    ],
)
def test_wrong_use_is_told_before_work_starts(
    maskmill_here: Run, toy_images: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    given = [str(toy_images) if argument == "IMAGES" else argument for argument in arguments]
    done = maskmill_here("label", "--output", tmp_path / "table", *given)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "table").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        ["--classes", "cat"],  # weights that would have to be downloaded
        ["--classes", "cat", "--set", "pretrained=wieghts.pt"],
        ["--classes", "cat", "--model", "wieghts.pt"],
    ],
)
def test_missing_weights_are_told_before_anything_is_made(
    maskmill_here: Run, toy_images: Path, tmp_path: Path, wrong: list[str]
) -> None:
    done = maskmill_here(
        "label", "--images", toy_images, "--output", tmp_path / "table", *wrong,
        HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"), MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/runs.db",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr and "starting Ray" not in done.stderr
    assert "wieghts.pt" in done.stderr or "ViT-B-16" in done.stderr
    assert not (tmp_path / "table").exists() and not (tmp_path / "runs.db").exists()


def _lose_words(*_arguments: Any, **_settings: Any) -> NoReturn:
    raise WrongUse("wrong_use", "The words were lost.", "Find them.")


def test_preparing_in_vain_leaves_all_that_was_there(
    maskmill_joined: Run,
    labelled: tuple[Path, Path, str],
    toy_images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a table, and of folders that only have the names of a table's."""
    table = shutil.copytree(labelled[1], tmp_path / "table")
    for theirs in ("checkpoint/epoch1/weights.pt", "manifest/mine/list.txt"):
        (tmp_path / "data" / theirs).parent.mkdir(parents=True)
        (tmp_path / "data" / theirs).write_text("mine")
    before = contents(tmp_path)

    monkeypatch.setattr(preparation, "prepare_labeller", _lose_words)
    for output in (table, tmp_path / "data"):
        done = maskmill_joined(*toy(toy_images, output))
        assert done.returncode == 2 and "The words were lost." in done.stderr
    assert contents(tmp_path) == before


def test_other_weights_than_the_table_s_are_refused(
    maskmill_here: Run, labelled: tuple[Path, Path, str], toy_images: Path, tmp_path: Path
) -> None:
    _, output, _ = labelled
    shutil.copytree(output, tmp_path / "table")
    record = json.loads((output / "dataset.json").read_text())
    record["weights"]["fingerprint"] = "f" * 64
    (tmp_path / "table" / "dataset.json").write_text(json.dumps(record))
    before = contents(tmp_path)
    done = maskmill_here(*toy(toy_images, tmp_path / "table"))
    assert done.returncode == 2 and "other weights" in done.stderr and "ffffffffffff" in done.stderr
    assert "starting Ray" not in done.stderr
    assert contents(tmp_path) == before


def test_a_record_that_cannot_be_written_is_told(
    maskmill_joined: Run, toy_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Storage.write_json

    def refuse(storage: Storage, name: str, value: Any) -> None:
        if name == "dataset.json":
            raise FailedWork("storage_unreachable", "The disk is full.", "Make room.")
        write(storage, name, value)

    monkeypatch.setattr(Storage, "write_json", refuse)
    done = maskmill_joined(*toy(toy_images, tmp_path / "table"))
    assert done.returncode == 1 and "The disk is full." in done.stderr
    assert not (tmp_path / "table").exists()


def test_labels_of_others_in_folders_are_left_alone(
    maskmill_here: Run, toy_images: Path, tmp_path: Path
) -> None:
    theirs = tmp_path / "labels" / "train" / "a.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("0 0.5 0.5 1 1")
    done = maskmill_here(*toy(toy_images, tmp_path))
    assert done.returncode == 2 and "no dataset.json" in done.stderr
    assert theirs.exists()


def test_ctrl_c_while_names_are_embedded(
    maskmill_joined: Run, toy_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = preparation.prepare_labeller

    def interrupted(*arguments: Any, **settings: Any) -> Any:
        prepared = prepare(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        return prepared

    monkeypatch.setattr(preparation, "prepare_labeller", interrupted)
    done = maskmill_joined(*toy(toy_images, tmp_path / "table"))
    assert done.returncode == 130
    assert "Stopped." in done.stderr
    assert not (tmp_path / "table").exists(), "a run that was stopped writes no more"


@pytest.mark.parametrize(
    ("number", "stage", "after_s"),
    [
        (signal.SIGINT, "reading weights", 0.5),
        (signal.SIGTERM, "starting Ray", 1.5),
        pytest.param(signal.SIGINT, "CLIP worker", 0.2, marks=pytest.mark.long),
    ],
)
def test_a_stop_while_ray_and_the_flow_start(
    maskmill_environment: dict[str, str],
    toy_images: Path,
    tmp_path: Path,
    number: signal.Signals,
    stage: str,
    after_s: float,
) -> None:
    """By someone impatient, who presses it twice."""
    large = ("--set", "scale=[1024, 512]")  # so that it takes some time
    run = _start(toy_images, tmp_path / "table", maskmill_environment, *large)
    assert run.stderr is not None
    before = ""
    while stage not in before:
        line = run.stderr.readline()
        assert line, before
        before += line
    time.sleep(after_s)
    started = psutil.Process(run.pid).children(recursive=True)
    run.send_signal(number)
    time.sleep(0.05)
    run.send_signal(number)
    _, said = run.communicate(timeout=300)
    assert run.returncode == 130, said
    # The interpreter itself tells of a Ctrl-C that falls into a destructor, where it cannot be raised.
    said = re.sub(r"Exception ignored in: .*?\nKeyboardInterrupt: *\n", "", said, flags=re.DOTALL)
    assert "Stopped." in said and "Traceback" not in said
    assert not psutil.wait_procs(started, timeout=60)[1], "left behind"


@pytest.fixture(scope="module")
def unsure(
    maskmill_joined: Run, toy_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A table without background of six scenes, unsure pixels left out, and of six broken files."""
    images = tmp_path_factory.mktemp("unsure") / "images"
    images.mkdir()
    for path in sorted(toy_images.iterdir())[:6]:
        shutil.copy(path, images)
        (images / f"{path.stem}.jpg").write_text("no image")
    output = images.parent / "table"
    return output, maskmill_joined(*toy(images, output, "--no-background", "--min-confidence", "0.6"))


def test_exit_status_tells_failed_work(unsure: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, done = unsure
    assert done.returncode == 1
    assert "50.0% of the images failed" in done.stderr
    assert read_table(output).num_rows == 12


def test_no_background_and_min_confidence(unsure: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, _ = unsure
    record = json.loads((output / "dataset.json").read_text())
    assert record["ontology"]["names"][0] == "grass"
    ignored = labelled = 0
    for row in read_table(output).to_pylist():
        if row["status"] != "ok":
            continue
        mask, confidence = (
            np.asarray(Image.open(io.BytesIO(row[name]["bytes"]))) for name in ("mask", "confidence")
        )
        assert (mask[confidence < 152] == 255).all() and (
            mask[confidence > 154] != 255
        ).all()  # 0.6 * 255 = 153
        ignored += int((mask == 255).sum())
        labelled += 1
    assert ignored and labelled == 6


def test_a_large_image_among_small_ones_is_one_row_made_of_its_windows(
    maskmill_joined: Run, toy_images: Path, tmp_path: Path
) -> None:
    images, side = tmp_path / "images", 96
    images.mkdir()
    scenes = [np.asarray(Image.open(path)) for path in sorted(toy_images.iterdir())[:6]]
    for number, scene in enumerate(scenes):
        Image.fromarray(scene).save(images / f"{number}.png")
    rows = [np.concatenate(scenes[start : start + 3], 1) for start in (0, 3)]
    Image.fromarray(np.concatenate(rows)).save(images / "large.tif")
    # Each window is one of the small images.
    windows = (f"large_window={side}", "large_overlap=0", "max_pixels=10000")
    done = maskmill_joined(
        *toy(images, tmp_path / "table", *(word for one in windows for word in ("--set", one)))
    )
    assert done.returncode == 0, done.stderr
    found = {Path(row["uri"]).name: row for row in read_table(tmp_path / "table").to_pylist()}
    assert len(found) == 7 and {row["status"] for row in found.values()} == {"ok"}
    large = found.pop("large.tif")
    assert (large["height"], large["width"]) == (2 * side, 3 * side)
    mask, confidence = (
        np.asarray(Image.open(io.BytesIO(large[name]["bytes"]))) for name in ("mask", "confidence")
    )
    areas = {each["class_id"]: each["area"] for each in large["segments"]}
    assert areas == {int(i): int((mask == i).sum()) for i in np.unique(mask)}
    for number in range(6):
        top, left = number // 3 * side, number % 3 * side
        window = np.s_[top : top + side, left : left + side]
        small = found[f"{number}.png"]
        # Sums in another order: ties may differ, and confidence by a step.
        labels = np.asarray(Image.open(io.BytesIO(small["mask"]["bytes"])))
        assert (mask[window] == labels).mean() > 0.999
        sure = np.asarray(Image.open(io.BytesIO(small["confidence"]["bytes"]))).astype(int)
        assert np.abs(confidence[window] - sure).max() <= 1


def _start(images: Path, output: Path, environment: dict[str, str], *more: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *map(str, toy(images, output, *more))],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait_for_parts(output: Path, process: subprocess.Popen[str], count: int = 1) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if len(list((output / "labels").glob("*.parquet"))) >= count:
            return
        time.sleep(0.05)


def test_ctrl_c_stops_cleanly_and_the_lease_keeps_others_off(
    maskmill_here: Run,
    maskmill_joined: Run,
    toy_images: Path,
    maskmill_environment: dict[str, str],
    tmp_path: Path,
) -> None:
    output, images = tmp_path / "table", sorted(toy_images.iterdir())[:48]
    listing = tmp_path / "some.txt"
    listing.write_text("".join(f"{path}\n" for path in images))
    slow = ("--set", "scale=[1024, 256]")
    process = _start(listing, output, maskmill_environment, *slow)
    _wait_for_parts(output, process)
    # In this process: until another one has started, the first may have ended.
    refused = maskmill_here(*toy(listing, output, *slow))
    assert refused.returncode == 1 and "Another run" in refused.stderr
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "run the same command again to continue" in said and "Traceback" not in said
    assert not (output / "lease.json").exists()
    some = read_table(output).num_rows
    assert 0 < some < len(images)
    done = maskmill_joined(*toy(listing, output, *slow))
    assert done.returncode == 0, done.stderr
    counts = Counter(read_table(output)["uri"].to_pylist())
    assert sorted(counts) == sorted(map(str, images)) and set(counts.values()) == {1}
