"""What a job does now, told by what lies beside its output."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.files.status import STATUS_FILE, StatusFile, read_status
from pipeline.files.storage import open_storage
from pipeline.retraining.ledger import Ledger
from pipeline.table.lease import Lease
from pipeline.tracking.tracker import open_tracker
from tests.pipeline.formats.tables import toy_table

ROOT = Path(__file__).resolve().parents[2]
RUN = "3f2a9c1be07d4410"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    toy_table(tmp_path / "table", 8)
    return tmp_path / "table"


def ended(output: Path, **changes: Any) -> None:
    """Write the status of a job that has ended, with other fields."""
    with StatusFile(open_storage(output), "label", RUN) as status:
        status.begin()
        status.update(
            stage="labelling", done=40, total=200, unit="images", per_second=12.5, failures={"not_found": 2}
        )
    file = output / STATUS_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def asked(maskmill_here: Run, *arguments: object) -> tuple[int, dict[str, Any]]:
    done = maskmill_here("status", *arguments, "--json")
    return done.returncode, json.loads(done.stdout)


def test_a_running_job_says_how_far_it_is(maskmill_here: Run, table: Path) -> None:
    ended(table, finished=None, eta_s=300.0, host="node-7", mlflow_run="abc123")
    done = maskmill_here("status", table)
    assert done.returncode == 0
    for words in (
        "label is running (process", "on node-7", f"run {RUN}", "labelling",
        "40 of 200 images (20%), 12.5 images/s, about 5 min left", "2: 2 not_found", "s ago", "abc123",
        "8 images, 1 failed",
    ):  # fmt: skip
        assert words in done.stdout, done.stdout
    code, found = asked(maskmill_here, table)
    assert (code, found["state"], found["schema_version"]) == (0, "running", 1)
    assert found["job"]["done"] == 40 and 0 <= found["job"]["age_s"] < 60
    assert found["table"]["images"] == 8 and sum(found["table"]["failures"].values()) == 1
    assert found["lease"] is None and found["retraining"] is None


@pytest.mark.parametrize(
    ("changes", "state", "code", "words"),
    [
        ({}, "finished", 0, "has ended well"),
        ({"finished": "failed", "error": "disk_full", "message": "full"}, "failed", 1, "full [disk_full]"),
        ({"finished": "stopped"}, "stopped", 1, "Run the same command again"),
        ({"finished": None, "host": "node-7", "updated": "2020-01-01T00:00:00Z"}, "dead", 1, "no sign of"),
        ({"finished": None, "process_started": 1.0}, "dead", 1, "it was probably killed"),
    ],
)  # fmt: skip
def test_an_end_is_told_with_what_to_do(
    maskmill_here: Run, table: Path, changes: dict[str, Any], state: str, code: int, words: str
) -> None:
    ended(table, **changes)
    done = maskmill_here("status", table)
    assert (done.returncode, words in done.stdout) == (code, True), done.stdout
    assert asked(maskmill_here, table)[1]["state"] == state


def test_a_table_without_a_job_is_counted(maskmill_here: Run, table: Path) -> None:
    code, found = asked(maskmill_here, table)
    assert (code, found["state"], found["job"], found["table"]["images"]) == (0, "idle", None, 8)


def test_a_run_that_has_just_begun_is_not_taken_for_the_one_before(maskmill_here: Run, table: Path) -> None:
    ended(table, finished="failed")
    with Lease.acquire(open_storage(table), on_lost=lambda _reason: None) as lease:
        done = maskmill_here("status", table)
        assert done.returncode == 0 and "a job is starting" in done.stdout
        assert asked(maskmill_here, table)[1]["lease"]["run_id"] == lease.run_id
    assert asked(maskmill_here, table)[1]["state"] == "failed"


def test_a_retraining_says_its_tick_and_its_champion(maskmill_here: Run, tmp_path: Path) -> None:
    output = open_storage(tmp_path / "loop")
    output.write_json("runs/0001/state.json", {"run": "0001", "outcome": "promoted", "created": "earlier"})
    steps = [{"name": "intake", "state": "done"}, {"name": "train pets", "state": "running"}]
    output.write_json("runs/0002/state.json", {"run": "0002", "steps": steps, "created": "later"})
    with Lease.acquire(output, on_lost=lambda _reason: None) as lease:
        ledger = Ledger(output)
        ledger.append(lease, "promoting", "pets", "3", run="0001")
        ledger.append(lease, "promoted", "pets", "3", run="0001")
        ledger.append(lease, "refused", "pets", "4", previous="3", run="0001", why="cat fell by 8 %")
    ended(tmp_path / "loop", job="retrain", finished=None)
    done = maskmill_here("status", tmp_path / "loop")
    for words in (
        "retrain is running", "0002: step train pets (running), 1 of 2 steps done",
        "pets version 3", "refused pets version 4: cat fell by 8 %",
    ):  # fmt: skip
        assert words in done.stdout, done.stdout
    found = asked(maskmill_here, tmp_path / "loop")[1]["retraining"]
    assert found["tick"]["run"] == "0002" and found["champions"] == {"pets": "3"}
    assert found["last"]["kind"] == "refused"


def test_a_tracked_run_is_known_by_its_id(maskmill_here: Run, table: Path, tmp_path: Path) -> None:
    place = f"sqlite:///{tmp_path}/runs.db"
    with open_tracker(place) as tracker:
        tracker.start("label", "a run", params={"output": str(table)})
        run_id = tracker.wait_for_run(240)
    assert run_id is not None
    code, found = asked(maskmill_here, run_id, "--tracking", place)
    assert (code, found["output"]) == (0, str(table))


@pytest.mark.slow
def test_it_is_looked_at_until_the_end(maskmill_here: Run, table: Path) -> None:
    with StatusFile(open_storage(table), "label", RUN, every_s=0.05) as status:
        status.begin()
        while read_status(open_storage(table)) is None:
            time.sleep(0.01)
        watching = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", "status", str(table), "--json", "--watch", "0.1"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["state"] == "running"
    rest = watching.communicate(timeout=240)[0].splitlines()
    assert watching.returncode == 0 and json.loads(rest[-1])["state"] == "finished"


def test_an_output_in_an_object_store_is_asked_from_anywhere(maskmill_here: Run, s3: dict[str, str]) -> None:
    import boto3

    boto3.client("s3").create_bucket(Bucket="results")
    storage = open_storage("s3://results/run")
    with StatusFile(storage, "label", RUN) as status:
        status.begin()
        status.update(done=3, total=9, unit="images")
        status.finish("failed", "Too few nodes.", error="cluster_too_small")
    done = maskmill_here("status", "s3://results/run", **s3)
    assert done.returncode == 1 and "Too few nodes. [cluster_too_small]" in done.stdout
    assert s3["AWS_SECRET_ACCESS_KEY"] not in json.dumps(storage.read_json(STATUS_FILE))
