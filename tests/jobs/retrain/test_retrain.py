"""Whole ticks on the toy world: promoted, nothing new, killed in the training, refused."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from PIL import Image

from pipeline.files.storage import open_storage
from pipeline.retraining.decision import read_decision
from pipeline.retraining.ledger import Ledger
from pipeline.retraining.state import Tick, read_tick
from pipeline.review.desk import open_desk
from pipeline.review.queue import Entry, Queue
from pipeline.table.corrections import CORRECTIONS_DIR
from pipeline.table.labels import read_ids
from pipeline.toyworld.scenes import generate

ROOT = Path(__file__).resolve().parents[3]
SIZE = 48
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@dataclass
class World:
    """Scenes that arrive, scenes with truth, and a configuration."""

    folder: Path
    config: dict[str, Any]

    @property
    def file(self) -> Path:
        return self.folder / "retrain.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def arrive(self, count: int, seed: int) -> None:
        (self.folder / "photos").mkdir(exist_ok=True)
        for index, scene in enumerate(generate(seed, count, SIZE).images):
            Image.fromarray(scene).save(self.folder / "photos" / f"{seed}_{index:02}.png")

    def write(self, **changes: Any) -> None:
        self.config |= changes
        self.file.write_text(yaml.safe_dump(self.config))

    def tick(self, run: str) -> Tick:
        return read_tick(open_storage(self.output), run)

    def say(self, decision: Literal["accepted", "rejected"]) -> None:
        """A person reviews an image of the table that nobody has reviewed."""
        table = open_storage(self.output / "table")
        ids = sorted(read_ids(table).tolist())
        entries = tuple(Entry(id=row_id, uri="") for row_id in ids)
        queue = Queue(table=table.uri, corrections=table.uri_of(CORRECTIONS_DIR), entries=entries)
        desk = open_desk(queue)
        new = next(row_id for row_id in ids if desk.saves.read(row_id) is None)
        desk.save(new, decision, None, reviewer="Ann", follows=None)

    @property
    def ledger(self) -> Ledger:
        return Ledger(open_storage(self.output))


def training(iterations: int, **more: Any) -> list[dict[str, Any]]:
    knobs = {"iterations": iterations, "batch_size": 4, "width": 8, **more}
    knobs |= {"augment.scale": [SIZE, SIZE], "crop": [SIZE, SIZE], "log_every": 2}
    return [{"kind": "maskclip-plus", "recipe": "toy", "set": knobs}]


@dataclass
class Story:
    """What was seen while the ticks ran."""

    world: World
    first: str
    killed: Tick
    second_holder: subprocess.CompletedProcess[str]
    holder: int
    too_early: subprocess.CompletedProcess[str]
    alone: subprocess.CompletedProcess[str]
    trained: Tick
    resumed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory,
    maskmill_environment: dict[str, str],
    maskmill_here: Run,
    maskmill_joined: Run,
    registry_database: str,
) -> Iterator[Story]:
    world = World(
        tmp_path_factory.mktemp("retraining"),
        {
            "name": "toys",
            "output": "out",
            "images": "photos",
            "ontology": "toyworld",
            "tracking": "sqlite:///runs.db",
            "label": {"recipe": "toy"},
            "evaluation": {"images": "test/images", "truth": "test/masks"},
            # A student of a few steps is no good, which is not what is tested here.
            "gate": {
                "min_images": 2,
                "min_classes": 0,
                "max_excess": 1,
                "max_divergence": 1,
                "max_label_drift": None,
            },
        },
    )
    # Making a database takes seconds.
    shutil.copy(registry_database.removeprefix("sqlite:///"), world.folder / "runs.db")
    found = generate(5, 6, SIZE)
    for name, maps in (("images", found.images), ("masks", found.labels)):
        (world.folder / "test" / name).mkdir(parents=True)
        for index, pixels in enumerate(maps):
            Image.fromarray(pixels).save(world.folder / "test" / name / f"{index}.png")
    world.arrive(8, 6)
    # An evaluation image under another name, and another one by its own address.
    shutil.copy(world.folder / "test/images/3.png", world.folder / "photos/copy.png")
    world.write(models=training(4))

    def alone(step: str, run: Run = maskmill_joined) -> subprocess.CompletedProcess[str]:
        return run("retrain", world.file, "--step", step)

    # A cluster that is there already labels and measures; the training needs none. Each start takes seconds.
    first = [alone(step) for step in ("intake", "label", "verify")]
    first += [alone("train", maskmill_here), maskmill_joined("retrain", world.file)]

    world.say("accepted")
    world.say("rejected")
    world.arrive(4, 7)
    world.write(models=training(24, checkpoint_every=2), gate=world.config["gate"] | {"min_miou": 0.99})
    prepared = [alone(step) for step in ("intake", "label", "verify")]
    assert [one.returncode for one in (*first, *prepared)] == [0] * 8, prepared[-1].stderr
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", "retrain", str(world.file)],
        cwd=ROOT,
        env=maskmill_environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    checkpoint = world.output / "runs/0002/student/checkpoints/step-0000004/manifest.json"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGSTOP)
    other = maskmill_here("retrain", world.file)
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    killed = world.tick("0002")
    world.say("rejected")  # too late for this tick, which goes on with what it has begun
    too_early = alone("gate", maskmill_here)
    train = alone("train", maskmill_here)
    trained = world.tick("0002")
    resumed = maskmill_joined("retrain", world.file)
    said = "".join(one.stderr for one in first)
    yield Story(world, said, killed, other, driver.pid, too_early, train, trained, resumed)


pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def test_the_first_candidate_is_promoted(story: Story) -> None:
    said, world = story.first, story.world
    assert "toys version 1 is champion." in said
    assert "copies of evaluation images" in said and "copy.png" in said
    tick = world.tick("0001")
    assert tick.outcome == "promoted" and tick.images == 8
    assert [(step.state, step.attempts) for step in tick.steps] == [("done", 1)] * 9
    assert [(entry.kind, entry.version) for entry in world.ledger.entries()[:2]] == [
        ("promoting", "1"),
        ("promoted", "1"),
    ]
    page = (world.output / "runs/0001/report.html").read_text()
    assert "Promoted" in page and "there was no champion" in page
    assert page.count("<figcaption>candidate</figcaption>") == 4
    # What the jobs said is kept, and does not fill the terminal.
    assert "Labelled 8 images" in (world.output / "runs/0001/logs/label-1.txt").read_text()
    assert "Labelled 8 images" not in said


def test_a_second_run_is_told_who_has_the_output(story: Story) -> None:
    other = story.second_holder
    assert other.returncode == 1
    assert f"process {story.holder} on" in other.stderr and "output_in_use" in other.stderr


def test_a_killed_tick_goes_on_in_its_training(story: Story) -> None:
    assert story.killed.outcome is None
    assert (
        story.killed.step("label").state == "done" and story.killed.step("train student").state == "running"
    )
    tick = story.world.tick("0002")
    assert "Going on with tick 0002, at step train student." in story.alone.stderr
    assert "Going on with tick 0002, at step evaluate student." in story.resumed.stderr
    attempts = {step.name: step.attempts for step in tick.steps}
    assert attempts.pop("train student") == 2 and set(attempts.values()) == {1}
    log = (story.world.output / "runs/0002/logs/train-student-2.txt").read_text()
    assert "resumed from step" in log
    # Every image has one row, and no evaluation image has any.
    ids = read_ids(open_storage(story.world.output / "table"))
    assert len(ids) == len(set(ids.tolist())) == 12


def test_what_people_say_of_its_labels_is_trained_on(story: Story) -> None:
    folder = story.world.output / "runs/0002"
    said = "2 corrections from " + (folder / "corrections").as_uri() + ", 1 of them rejected"
    record = json.loads((folder / "student/student.json").read_text())
    assert record["teacher"]["corrections"].replace("file://", "") == said.replace("file://", "")
    assert "1 images have known labels" in (folder / "logs/train-student-2.txt").read_text()
    tick = story.world.tick("0002")
    assert tick.step("label").outputs["teacher"] == "toy (toyclip), 2 corrected by people"
    assert tick.step("train student").command.endswith(f"--output {folder}/student")
    assert f"--corrections {folder}/corrections" in tick.step("train student").command
    assert (
        "corrections"
        not in json.loads((story.world.output / "runs/0001/student/student.json").read_text())["teacher"]
    )


def test_a_step_can_be_done_alone_once_those_before_it_are_done(story: Story) -> None:
    assert story.too_early.returncode == 2
    assert "Step train student of tick 0002 comes before step gate student" in story.too_early.stderr
    assert story.alone.returncode == 0
    assert "Step train student is done. Next: --step 'evaluate student'" in story.alone.stderr
    assert story.trained.outcome is None and story.trained.step("evaluate student").state == "pending"
    # Those that no other job does say how.
    tick = story.world.tick("0002")
    for name in ("intake", "gate student", "register student", "promote student", "report"):
        asked = f"maskmill retrain {story.world.file} --step {shlex.quote(name)}"
        assert tick.step(name).command == asked
    page = (story.world.output / "runs/0002/report.html").read_text()
    assert "--step &#39;promote student&#39;" in page


def test_a_candidate_that_is_not_good_enough_is_refused(story: Story) -> None:
    done, world = story.resumed, story.world
    assert done.returncode == 3, done.stderr
    assert "toys version 2 is refused." in done.stderr and "at least 99.00 % is asked for" in done.stderr
    decision = read_decision(open_storage(world.output), "runs/0002/student-verdict.json")
    assert decision is not None and not decision.promotes and decision.champion == "champion version 1"
    assert world.tick("0002").outcome == "refused"
    assert world.ledger.current("toys") == "1"
    assert [entry.kind for entry in world.ledger.entries()] == ["promoting", "promoted", "refused"]
    # The champion was measured on these images before.
    outputs = world.tick("0002").step("evaluate student").outputs
    assert outputs["champion"]["reused"] and "/runs/0001/" in outputs["champion"]["folder"]
    page = (world.output / "runs/0002/report.html").read_text()
    assert "Refused" in page and "against champion version 1" in page
    assert page.count("<figcaption>champion</figcaption>") == 4


def test_the_registry_says_what_each_version_is(story: Story, maskmill_here: Run) -> None:
    from pipeline.tracking.destination import connect

    # What the killed training had not sent yet waits in its journal.
    maskmill_here("track", "--flush")
    client = connect(f"sqlite:///{story.world.folder}/runs.db")
    model = client.get_registered_model("toys")
    assert {name: str(version) for name, version in model.aliases.items()} == {
        "champion": "1",
        "challenger": "2",
    }
    tags = client.get_model_version("toys", "2").tags
    assert tags["maskmill.verdict"] == "refuse" and "99.00 %" in tags["maskmill.reasons"]
    assert tags["maskmill.key"] == "toys/0002/student" and tags["maskmill.teacher"].startswith(
        "toy (toyclip), 2 corr"
    )
    assert tags["maskmill.page"].endswith("/runs/0002/report.html")

    parents = client.search_runs([client.get_experiment_by_name("maskmill-retrain").experiment_id])
    assert len(parents) == 2 and {run.info.status for run in parents} == {"FINISHED"}
    second = next(run for run in parents if run.data.tags["maskmill.tick"] == "0002")
    assert {"student/candidate_miou", "student/champion_miou", "student/gain", "label_drift"} <= set(
        second.data.metrics
    )
    assert second.data.tags["maskmill.verdict.student"] == "refuse"
    for kind, count in (("label", 1), ("train", 2), ("evaluate", 1)):
        experiment = client.get_experiment_by_name(f"maskmill-{kind}").experiment_id
        runs = client.search_runs([experiment], "tags.`maskmill.tick` = '0002'")
        assert len(runs) == count, kind
        assert {run.data.tags["mlflow.parentRunId"] for run in runs} == {second.info.run_id}


def test_without_new_images_it_ends_at_once(story: Story) -> None:
    before = {path: path.stat().st_mtime_ns for path in story.world.output.rglob("*")}
    code = (
        "import sys; from jobs.cli import main\n"
        f"try: main(['retrain', {str(story.world.file)!r}])\n"
        "except SystemExit as end: print(end.code)\n"
        "print(sorted({'torch', 'ray', 'mlflow', 'open_clip', 'scipy', 'matplotlib'} & set(sys.modules)))"
    )
    light = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert light.stdout.split() == ["0", "[]"]
    assert "Nothing to do for toys: no new images." in light.stderr
    after = {path: path.stat().st_mtime_ns for path in story.world.output.rglob("*")}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"out"}  # the folder that held the lease


def test_the_status_is_that_of_the_last_tick(story: Story) -> None:
    status = json.loads((story.world.output / "status.json").read_text())
    assert status["job"] == "retrain" and status["finished"] == "ok" and "refused" in status["message"]
