from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cluster.progress import Progress
from pipeline.tracking import load
from pipeline.tracking.journal import JOURNAL, Journal, pending
from pipeline.tracking.progress import ProgressLog
from pipeline.tracking.sender import KEY_TAG, Sender, flush, unsent_runs
from pipeline.tracking.tracker import TrackedDataset, Tracker, open_tracker

ROOT = Path(__file__).resolve().parents[3]
Stored = Callable[..., dict[str, Any]]


def _wait(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def _steps(values: list[tuple[int, float]]) -> list[int]:
    return sorted(step for step, _ in values)


def _fill(tracker: Tracker, folder: Path, steps: range, file: str) -> None:
    for step in steps:
        tracker.log_metrics({"images_done": step * 8, "images_per_second": 40 + step / 7}, step)
    (folder / file).write_text(f"content of {file}")
    tracker.log_artifact(folder / file, "notes")


@pytest.mark.slow
def test_everything_arrives_in_sqlite(sqlite: str, stored: Stored, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "table").mkdir()
    (tmp_path / "table" / "a.csv").write_text("x\n1\n")
    with open_tracker(sqlite, say=said.append) as tracker:
        tracker.start(
            "evaluate",
            "first",
            params={"recipe": {"head": "maskclip", "scale": [2048, 512]}, "long": "ab " * 3000},
            tags={"team": "b"},
            dataset=TrackedDataset("voc20", "f" * 64, source="s3://bucket/voc", profile={"images": 321}),
        )
        tracker.log_params({"recipe": {"head": "another"}})
        tracker.log_metrics({"miou": 0.5, "hiou": None, "loss": float("nan")})
        tracker.log_metrics({f"iou/class {i}": i / 1500 for i in range(1500)})
        tracker.log_artifact(tmp_path / "table")
        tracker.set_tags({"team": "c"})
    run = stored(sqlite, "maskmill-evaluate")
    assert run["status"] == "FINISHED" and run["info"].run_name == "first"
    assert run["params"]["recipe.head"] == "maskclip"  # the first value stays
    assert run["params"]["recipe.scale"] == "[2048, 512]"
    assert run["params"]["dataset.fingerprint"] == "f" * 64
    assert len(run["params"]["long"]) < 6000 and run["params"]["long"].endswith("(whole: params/long.txt)")
    assert run["tags"]["team"] == "c" and run["tags"]["mlflow.source.name"] == "maskmill evaluate"
    assert run["metrics"]["miou"] == 0.5 and "hiou" not in run["metrics"]
    assert run["metrics"]["loss"] != run["metrics"]["loss"]
    assert {k: v for k, v in run["metrics"].items() if k.startswith("iou/")} == {
        f"iou/class {i}": i / 1500 for i in range(1500)
    }
    assert run["files"] == ["params/long.txt", "table/a.csv"]
    whole = run["client"].download_artifacts(run["id"], "params/long.txt", str(tmp_path))
    assert Path(whole).read_text() == "ab " * 3000
    (dataset,) = run["datasets"]
    assert (dataset.name, dataset.digest, dataset.source_type) == ("voc20", "f" * 36, "s3")
    assert json.loads(dataset.source) == {"uri": "s3://bucket/voc"}
    assert json.loads(dataset.profile) == {"images": 321}
    assert said == [
        "Tracked: run first in maskmill-evaluate, sqlite:///mlruns.db. "
        "Look at it: mlflow ui --backend-store-uri sqlite:///mlruns.db"
    ]
    assert (tmp_path / "mlruns" / "maskmill-evaluate" / run["id"]).is_dir()
    assert pending() == []


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED"), (SystemExit, "KILLED")]
)
def test_a_run_that_breaks_off_says_so(
    sqlite: str, stored: Stored, error: type[BaseException], status: str
) -> None:
    with pytest.raises(error), open_tracker(sqlite) as tracker:
        tracker.start("train", "broken")
        raise error
    assert stored(sqlite, "maskmill-train")["status"] == status


def test_nothing_heavy_is_imported_before_there_is_something_to_show(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pipeline.tracking.tracker import open_tracker\n"
        "import pipeline.tracking.results, pipeline.tracking.sender, pipeline.tracking.progress\n"
        "import jobs.runs, jobs.track\n"
        "tracker = open_tracker()\n"
        "tracker.start('label', 'x', params={'a': 1, 'classes': 'cat, ' * 2000})\n"
        "import time; time.sleep(0.5)\n"
        "print(sorted({'mlflow', 'matplotlib', 'torch', 'ray'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_off_and_unstarted_trackers_do_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with open_tracker("off", say=said.append) as tracker:
        tracker.start("label", "x", params={"a": 1})
        tracker.log_metrics({"x": 1})
        tracker.log_artifact(tmp_path / "missing")
        assert not tracker.on and tracker.wait_for_run(10) is None
    with open_tracker(say=said.append) as tracker:
        tracker.log_metrics({"x": 1})
    assert said == [] and pending() == [] and not (tmp_path / "mlruns.db").exists()


def test_the_state_of_git_is_recorded(sqlite: str, stored: Stored, tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@y"]
        done = subprocess.run(["git", *identity, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-b", "topic")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "one")
    (tmp_path / "a").write_text("2")
    with open_tracker(sqlite) as tracker:
        tracker.start("label", "x")
    run = stored(sqlite, "maskmill-label")
    assert run["tags"]["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert (run["params"]["git.branch"], run["params"]["git.dirty"]) == ("topic", "true")


def test_progress_becomes_step_metrics(sqlite: str, stored: Stored) -> None:
    with open_tracker(sqlite) as tracker:
        tracker.start("label", "x")
        log, began = ProgressLog(tracker, every_s=0.2), time.monotonic()
        for done in range(0, 300, 3):
            log.update(
                Progress(done=done, first_s=0.0, last_s=done / 30, failures={"not_found": done // 100})
            )
            time.sleep(0.005)
        most = (time.monotonic() - began) / 0.2 + 2
        last = Progress(done=300, first_s=0.0, last_s=10.0, failures={"not_found": 3})
        log.update(last, final=True)
        log.update(last, final=True)
    run = stored(sqlite, "maskmill-label")
    assert run["metrics"] == {
        "images_done": 300,
        "images_failed": 3,
        "images_per_second": 30,
        "failed/not_found": 3,
    }
    steps = _steps(run["history"]["images_done"])
    assert steps == [value for _, value in sorted(run["history"]["images_done"])]
    assert 3 <= len(steps) <= most and steps[-1] == 300


def test_the_load_of_the_machine_is_recorded_if_asked_for(
    sqlite: str, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "SAMPLE_EVERY_S", 0.05)
    with open_tracker(sqlite, system_metrics=True) as tracker:
        tracker.start("label", "x")
        tracker.log_metrics({"a": 1})
        [(folder, _)] = pending()
        _wait(lambda: (folder / JOURNAL).read_text().count("system/cpu_utilization_percentage") > 1)
    run = stored(sqlite, "maskmill-label")
    assert 0 <= run["metrics"]["system/cpu_utilization_percentage"] <= 100
    assert run["metrics"]["system/system_memory_usage_megabytes"] > 10
    assert len(run["history"]["system/cpu_utilization_percentage"]) > 1


@pytest.mark.slow
def test_a_black_hole_costs_the_caller_nothing(
    black_hole: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    importlib.import_module("mlflow.tracking")  # which takes seconds the first time
    said: list[str] = []
    tracker = open_tracker(black_hole, wait_s=0.5, say=said.append)
    tracker.start("label", "swallowed")
    calls = []
    for step in range(400):
        began = time.monotonic()
        tracker.log_metrics({"images_done": step}, step)
        calls.append(time.monotonic() - began)
        time.sleep(0.002)
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 2
    assert sorted(calls)[len(calls) // 2] < 0.02 and max(calls) < 1
    (line,) = said
    assert black_hole in line and "maskmill track --flush" in line and "\n" not in line
    [(folder, _)] = pending()
    assert str(folder) in line
    # The thread lets go when its last request has run out of time.
    _wait(lambda: [run.state for run in unsent_runs()] == ["waiting"], 60)
    (result,) = flush(black_hole)
    assert (result.state, result.detail) == ("kept", "no answer in time")


@pytest.mark.slow
def test_a_server_that_is_away_is_given_up_soon_after_the_end(dead_server: str) -> None:
    importlib.import_module("mlflow.tracking")  # which takes seconds the first time
    said: list[str] = []
    tracker = open_tracker(dead_server, say=said.append)
    tracker.start("label", "x")
    tracker.log_metrics({"a": 1})
    began = time.monotonic()
    tracker.close()
    assert time.monotonic() - began < 12  # it would wait for 15 s
    assert "connection refused" in said[0]


@pytest.mark.slow
def test_a_server_killed_in_the_middle(server: Any, stored: Stored, tmp_path: Path, spool: Path) -> None:
    said: list[str] = []
    tracker = open_tracker(server.uri, say=said.append)
    tracker.start(
        "label", "survivor", params={"recipe": {"head": "value"}}, dataset=TrackedDataset("d", "0" * 64)
    )
    _fill(tracker, tmp_path, range(10), "before.txt")
    _wait(lambda: tracker.run_id is not None)
    _wait(lambda: stored(server.uri, "maskmill-label", "survivor")["files"] == ["notes/before.txt"])
    server.kill()
    _fill(tracker, tmp_path, range(10, 20), "after.txt")
    tracker.close()
    assert "maskmill track --flush" in said[0]
    _wait(lambda: [run.state for run in unsent_runs()] == ["waiting"])
    assert [run.state for run in flush()] == ["kept"]

    server.start()
    assert [(run.state, run.name, run.detail) for run in flush()] == [("sent", "survivor", "")]
    assert list(flush()) == [] and list(spool.iterdir()) == []
    run = stored(server.uri, "maskmill-label", "survivor")
    assert run["status"] == "FINISHED" and run["params"]["recipe.head"] == "value"
    for key, values in run["history"].items():
        assert _steps(values) == list(range(20)), key
    assert run["files"] == ["notes/after.txt", "notes/before.txt"]
    assert len(run["datasets"]) == 1


@pytest.mark.slow
def test_every_lost_answer_is_asked_for_again_and_doubles_nothing(
    server: Any, stored: Stored, tmp_path: Path, lossy_proxy: Any
) -> None:
    tracker = open_tracker("http://127.0.0.1:9", wait_s=0.0, say=lambda _: None)
    tracker.start("label", "lossy", params={"a": 1}, dataset=TrackedDataset("d", "1" * 64))
    _fill(tracker, tmp_path, range(700), "one.txt")
    _fill(tracker, tmp_path, range(700, 705), "two.txt")
    tracker.close()
    _wait(lambda: [run.state for run in unsent_runs()] == ["waiting"])
    [(folder, _)] = pending()
    attempts = 0
    with lossy_proxy(server.port) as proxy:
        sender: Sender | None = None
        journal: Journal | None = None
        while True:
            attempts += 1
            assert attempts < 100
            if sender is None or journal is None:
                journal = Journal.take(folder)
                assert journal is not None
                sender = Sender(journal, proxy.uri)
            try:
                assert sender.send(died=True)
                break
            except Exception:
                # By turns the same sender goes on, or a new flush takes the journal up.
                if attempts % 2:
                    journal.close()
                    sender = None
        journal.discard()
    assert attempts - 1 == len(proxy.lost) > 12
    run = stored(server.uri, "maskmill-label", "lossy")
    assert run["status"] == "FINISHED"
    for key, values in run["history"].items():
        assert _steps(values) == list(range(705)), key
    assert run["files"] == ["notes/one.txt", "notes/two.txt"]
    assert len(run["datasets"]) == 1


def test_a_run_that_was_created_twice_stays_once(sqlite: str, stored: Stored, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    tracker = open_tracker("http://127.0.0.1:9", wait_s=0.0, say=lambda _: None)
    tracker.start("label", "twin")
    _fill(tracker, tmp_path, range(3), "a.txt")
    tracker.close()
    _wait(lambda: [run.state for run in unsent_runs()] == ["waiting"])
    key = json.loads((pending()[0][0] / "journal.jsonl").read_text().splitlines()[0])["key"]
    client = MlflowClient(sqlite)
    experiment = client.create_experiment("maskmill-label")
    # What a server does that answers too late: the request to create the run is carried out twice.
    for _ in range(3):
        client.create_run(experiment, tags={KEY_TAG: key}, run_name="twin")
    assert [run.state for run in flush(sqlite)] == ["sent"]
    run = stored(sqlite, "maskmill-label")
    assert _steps(run["history"]["images_done"]) == [0, 1, 2]
    assert run["files"] == ["notes/a.txt"]


def test_a_deleted_run_stays_deleted(sqlite: str) -> None:
    from mlflow.tracking import MlflowClient

    said: list[str] = []
    tracker = open_tracker(sqlite, say=said.append)
    tracker.start("label", "unwanted")
    tracker.log_metrics({"a": 1}, 1)
    _wait(lambda: tracker.run_id is not None)
    assert tracker.run_id is not None
    client = MlflowClient(sqlite)
    client.delete_run(tracker.run_id)
    tracker.log_metrics({"a": 2}, 2)
    tracker.close()
    assert "deleted in MLflow" in said[0]
    experiment = client.get_experiment_by_name("maskmill-label").experiment_id
    assert client.search_runs([experiment]) == [] and pending() == []


def test_what_mlflow_refuses_does_not_hold_up_the_rest(sqlite: str, stored: Stored) -> None:
    said: list[str] = []
    with open_tracker(sqlite, say=said.append) as tracker:
        tracker.start("label", "x")
        tracker.log_metrics({"good": 1.0, "bad,name": 2.0, "fine": 3.0})
    assert stored(sqlite, "maskmill-label")["metrics"] == {"good": 1.0, "fine": 3.0}
    assert "1 problem(s), first: bad,name" in said[0]


def test_what_was_recorded_survives_kill_9(sqlite: str, stored: Stored, dead_server: str) -> None:
    code = (
        "import itertools\n"
        "from pipeline.tracking.tracker import open_tracker\n"
        f"tracker = open_tracker({dead_server!r})\n"
        "tracker.start('label', 'killed', params={'a': 1})\n"
        "for step in itertools.count():\n"
        "    tracker.log_metrics({'x': step / 2}, step)\n"
        "    print(step, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for _ in range(200):
        process.stdout.readline()
    assert [run.state for run in unsent_runs()] == ["running"]
    assert [run.state for run in flush(sqlite)] == ["running"]  # a living run is left alone
    process.send_signal(signal.SIGKILL)
    written = [*range(200), *(int(line) for line in process.stdout if line.endswith("\n"))]
    process.wait()
    process.stdout.close()
    assert [run.state for run in flush(sqlite)] == ["sent"]
    run = stored(sqlite, "maskmill-label")
    assert run["status"] == "KILLED" and run["params"]["a"] == "1"
    steps = _steps(run["history"]["x"])
    # The last call may have been on disk before it was printed.
    assert steps in (written, [*written, written[-1] + 1])
    assert run["info"].end_time < time.time() * 1000


@pytest.mark.slow
def test_flushes_that_are_killed_and_repeated(sqlite: str, stored: Stored, tmp_path: Path) -> None:
    tracker = open_tracker("http://127.0.0.1:9", wait_s=0.0, say=lambda _: None)
    tracker.start("label", "patient")
    for part in range(8):
        _fill(tracker, tmp_path, range(part * 100, part * 100 + 100), f"{part}.txt")
    tracker.close("FAILED")
    _wait(lambda: [run.state for run in unsent_runs()] == ["waiting"])
    code = (
        "import os, sys\n"
        "from pipeline.tracking.journal import Journal, pending\n"
        "from pipeline.tracking.sender import Sender\n"
        "left = int(sys.argv[1])\n"
        "def stop():\n"
        "    global left\n"
        "    if not left: os.kill(os.getpid(), 9)\n"
        "    left -= 1\n"
        "    return False\n"
        "[(folder, _)] = pending()\n"
        f"Sender(Journal.take(folder), {sqlite!r}, stop=stop).send(died=True)\n"
    )
    for events in (150, 790):
        done = subprocess.run(
            [sys.executable, "-c", code, str(events)], cwd=ROOT, env=os.environ, capture_output=True
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert [run.state for run in flush(sqlite)] == ["sent"]
    run = stored(sqlite, "maskmill-label")
    assert run["status"] == "FAILED"
    assert _steps(run["history"]["images_done"]) == list(range(800))
    assert run["files"] == [f"notes/{part}.txt" for part in range(8)]


@pytest.mark.slow
def test_no_byte_of_a_secret_is_kept(
    server: Any, tmp_path: Path, spool: Path, monkeypatch: pytest.MonkeyPatch, stored: Stored
) -> None:
    secrets = {name: f"hush-{name}-71c9e2" for name in ("env", "uri", "query", "flag", "assign", "url")}
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secrets["env"])
    monkeypatch.setattr(
        sys,
        "argv",
        ["maskmill", "label", "--images", f"s3://id:{secrets['url']}@b/x", "--api-key", secrets["flag"]],
    )
    target = server.uri.replace("http://", f"http://me:{secrets['uri']}@")
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"command": f"X_TOKEN={secrets['assign']} maskmill --key-file {secrets['env']}"})
    )
    server.kill()
    said: list[str] = []
    tracker = open_tracker(target, say=said.append)
    tracker.start(
        "evaluate",
        f"run of {secrets['env']}",
        params={"db_password": secrets["assign"], "note": f"Bearer {secrets['flag']}"},
        tags={"from": f"https://h/?X-Amz-Signature={secrets['query']}"},
        dataset=TrackedDataset("d", "2" * 64, source=f"https://h/a.zip?sig={secrets['query']}"),
    )
    tracker.log_metrics({"a": 1.0})
    tracker.log_artifact(tmp_path / "evaluation.json")
    tracker.close()
    (tmp_path / "evaluation.json").unlink()

    def leaks(*folders: Path) -> list[tuple[str, str]]:
        found = []
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        assert len(files) >= 2
        for path in files:
            data = path.read_bytes()
            found += [(path.name, name) for name, value in secrets.items() if value.encode() in data]
        return found

    assert leaks(spool) == []
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", target)
    _wait(lambda: [run.state for run in unsent_runs()] == ["waiting"])
    (sent,) = flush()
    assert sent.state == "sent"
    assert not [value for value in secrets.values() if value in f"{said}{sent}"]
    assert stored(server.uri, "maskmill-evaluate")["params"]["command"] == (
        "maskmill label --images 's3://***@b/x' --api-key ***"
    )
    assert leaks(server.folder) == []
