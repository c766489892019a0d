"""The examples for cron and Airflow: read by those who run them."""

from __future__ import annotations

import datetime
import fcntl
import subprocess
from pathlib import Path

import pytest

from tests.jobs.deploy.deployments import run_deployer

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "jobs/deploy"


@pytest.fixture
def line() -> list[str]:
    """The five fields of the only entry, and its command."""
    lines = [text for text in (FOLDER / "crontab").read_text().splitlines() if text and text[0] != "#"]
    (entry,) = [text for text in lines if not text.startswith("SHELL=")]
    *fields, command = entry.split(" ", 5)
    assert "%" not in command  # cron would make a line break of it
    return [" ".join(fields), command]


def test_cron_runs_it_once_a_night(line: list[str]) -> None:
    croniter = pytest.importorskip("croniter")
    begin = datetime.datetime(2026, 3, 1)
    turns = croniter.croniter(line[0], begin)
    runs = [turns.get_next(datetime.datetime) for _ in range(3)]
    assert runs == [datetime.datetime(2026, 3, day, 3, 17) for day in (1, 2, 3)]


@pytest.mark.parametrize(
    ("status", "held", "printed"), [(0, False, ""), (3, False, ""), (0, True, ""), (1, False, "the reason\n")]
)
def test_cron_mails_failures_only(
    line: list[str], tmp_path: Path, status: int, held: bool, printed: str
) -> None:
    program = tmp_path / ".venv/bin/maskmill"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\necho "$@" >> asked\necho the reason >&2\nexit {status}\n')
    program.chmod(0o755)
    command = line[1].replace("/srv/pets", str(tmp_path))
    assert command != line[1]
    with (tmp_path / "retrain.lock").open("w") as lock:
        if held:
            fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == (printed, "")
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("" if held else "retrain retrain.yaml\n")


def test_airflow_reads_the_dag(tmp_path: Path) -> None:
    told = run_deployer("airflow", str(FOLDER / "airflow"), home=tmp_path)
    assert told["errors"] == {} and list(told["dags"]) == ["maskmill_retrain"]
    dag = told["dags"]["maskmill_retrain"]
    assert dag["catchup"] is False and dag["max_active_runs"] == 1 and dag["schedule"] == "17 3 * * *"
    task = dag["tasks"]["retrain"]
    assert task["kind"] == "BashOperator" and task["command"].endswith("maskmill retrain retrain.yaml")
    assert task["skip_on_exit_code"] == [3] and task["retries"] == 2
