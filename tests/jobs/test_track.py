from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
from rich.console import Console

from jobs.track import Track
from pipeline.tracking.runs import list_runs
from pipeline.tracking.tracker import open_tracker


@pytest.fixture(autouse=True)
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


def _run(*, send: bool, tracking: str | None = None) -> tuple[int, list[str]]:
    text = io.StringIO()
    status = Track(flush=send, tracking=tracking).run(Console(file=text, width=60))
    return status, text.getvalue().splitlines()


def test_nothing_waits() -> None:
    assert _run(send=False) == _run(send=True) == (0, ["Nothing waits to be sent."])


@pytest.mark.slow
def test_what_waits_is_listed_kept_and_sent(tmp_path: Path) -> None:
    tracker = open_tracker("http://me:hush@127.0.0.1:9", say=lambda _: None)
    tracker.start("label", "photos [1]")
    tracker.log_metrics({"images_done": 5}, 5)
    assert [line.split()[0] for line in _run(send=False)[1]] == ["running"]
    tracker.close()
    end = time.monotonic() + 60
    while _run(send=False)[1][0].startswith("running"):  # until the thread has let go of it
        assert time.monotonic() < end
        time.sleep(0.05)

    status, lines = _run(send=False)
    assert status == 0 and len(lines) == 2
    assert lines[0].startswith("waiting   maskmill-label/photos [1] of ")
    assert "for http://***@127.0.0.1:9, in " in lines[0]
    assert lines[1] == "Send them with: maskmill track --flush"

    status, lines = _run(send=True)
    assert status == 1 and lines[0].startswith("kept ") and lines[0].endswith("connection refused")
    assert lines[1] == "1 could not be sent and are kept; try again later."

    uri = f"sqlite:///{tmp_path}/mlruns.db"
    status, lines = _run(send=True, tracking=uri)
    assert status == 0 and lines[0].startswith("sent ")
    assert [(entry.name, dict(entry.metrics)) for entry in list_runs(uri)] == [
        ("photos [1]", {"images_done": 5})
    ]
    assert _run(send=True) == (0, ["Nothing waits to be sent."])
