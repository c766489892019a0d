import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.files.status import STATUS_FILE, Status, StatusFile, read_status, settle_status
from pipeline.files.storage import Storage, open_storage

RUN = "3f2a9c1be07d4410"


def shown(storage: Storage) -> Status:
    status = read_status(storage)
    assert status is not None
    return status


def eventually(told: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not told():
        assert time.monotonic() < end
        time.sleep(0.02)


def told(storage: Storage, stage: str) -> bool:
    status = read_status(storage)
    return status is not None and status.stage == stage


def test_a_job_says_what_it_does_and_how_it_ended(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with StatusFile(storage, "label", RUN, every_s=0.05) as status:
        status.update(stage="labelling", done=3, total=10, unit="images", failures={"not_found": 1})
        status.begin()
        eventually(lambda: told(storage, "labelling"))
        now = shown(storage)
        assert (now.job, now.run_id, now.host, now.pid) == ("label", RUN, socket.gethostname(), os.getpid())
        assert (now.done, now.total, now.unit, now.failures) == (3, 10, "images", {"not_found": 1})
        assert now.life() == "running" and now.finished is None
        status.update(stage="counting")
        eventually(lambda: told(storage, "counting"))
        assert shown(storage).done is None, "what was counted belongs to its stage"
    assert (shown(storage).finished, shown(storage).life()) == ("ok", "finished")


@pytest.mark.parametrize(
    ("error", "outcome", "code"),
    [
        (KeyboardInterrupt(), "stopped", None),
        (FailedWork("cluster_too_small", "Too few nodes.", "Add some."), "failed", "cluster_too_small"),
        (OSError(28, "No space left on device", "/x"), "failed", "disk_full"),
        (ZeroDivisionError("division by zero"), "failed", "internal"),
    ],
)
def test_an_end_is_told(tmp_path: Path, error: BaseException, outcome: str, code: str | None) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("labels/part.parquet", b"a result")
    with pytest.raises(type(error)), StatusFile(storage, "label", RUN) as status:
        status.begin()
        status.finish("ok", "too early")
        raise error
    ended = shown(storage)
    assert (ended.finished, ended.error) == (outcome, code)
    assert ended.message and ended.message != "too early"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), FailedWork("disk_full", "No room.", "Make some.")])
def test_a_job_that_made_nothing_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("lease.json", b"{}")
    with pytest.raises(type(error)), StatusFile(storage, "label", RUN, every_s=0.01) as status:
        status.begin()
        end = time.monotonic() + 30
        while not storage.exists(STATUS_FILE) and time.monotonic() < end:
            time.sleep(0.01)
        assert shown(storage).finished is None
        raise error
    assert not storage.exists(STATUS_FILE)


def test_a_refused_command_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(FailedWork), StatusFile(open_storage(tmp_path / "new"), "label", RUN) as status:
        status.update(stage="reading weights")
        raise FailedWork("weights_missing", "None there.", "Fetch them.")
    assert not (tmp_path / "new").exists()


def test_a_use_that_turns_out_wrong_leaves_what_was_there(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    contents: list[bytes | None] = [None]
    for earlier in (False, True):
        if earlier:
            with StatusFile(storage, "label", "an-earlier-run") as status:
                status.begin()
            contents.append((tmp_path / STATUS_FILE).read_bytes())
        with pytest.raises(WrongUse), StatusFile(storage, "label", RUN, every_s=0.01) as status:
            status.begin()
            eventually(lambda: (tmp_path / STATUS_FILE).exists() and shown(storage).run_id == RUN)
            raise WrongUse("output_differs", "Other weights.", "Give the same.")
        found = (tmp_path / STATUS_FILE).read_bytes() if (tmp_path / STATUS_FILE).exists() else None
        assert found == contents[-1]


def test_secrets_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "s3cr3t-of-mine")
    storage = open_storage(tmp_path)
    with StatusFile(storage, "label", RUN) as status:
        status.begin()
        status.update(stage="reading https://me:pa55word@host/x", message="Bearer s3cr3t-of-mine was refused")
        status.finish("failed", "https://host/x?sig=abcdefgh was refused for s3cr3t-of-mine")
    text = (tmp_path / STATUS_FILE).read_text()
    assert not any(secret in text for secret in ("pa55word", "s3cr3t", "abcdefgh"))


@pytest.mark.parametrize("content", ["[1, 2]", '{"ours": false}', "not JSON", '{"schema_version": 99}'])
def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / STATUS_FILE).write_text(content)
    said: list[str] = []
    with StatusFile(open_storage(tmp_path), "label", RUN, notice=said.append) as status:
        status.begin()
    assert (tmp_path / STATUS_FILE).read_text() == content
    assert len(said) == 1 and STATUS_FILE in said[0]


def test_a_run_that_lost_its_output_writes_no_more(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with StatusFile(storage, "label", "the-other-run") as status:
        status.begin()

    def refuse() -> None:
        raise FailedWork("output_in_use", "Another run has it.", "Wait.")

    with StatusFile(storage, "label", RUN, fence=refuse) as status:
        status.begin()
    assert shown(storage).run_id == "the-other-run"


def test_figures_that_are_no_numbers_do_not_silence_it(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with StatusFile(storage, "train clipseg", RUN) as status:
        status.begin()
        status.update(figures={"loss": float("nan"), "data_wait": 0.25})
    assert shown(storage).figures == {"loss": None, "data_wait": 0.25}


class _Stuck(Storage):
    """A store whose requests never end, as when packets are dropped."""

    def read_bytes(self, name: str) -> bytes:
        threading.Event().wait()
        raise AssertionError


def test_a_store_that_hangs_or_fails_neither_stops_nor_holds_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.files.status.LAST_WRITE_S", 0.1)
    stuck = open_storage(tmp_path)
    with StatusFile(_Stuck(stuck.uri, stuck.fs, stuck.root), "label", RUN) as status:
        status.begin()
        for count in range(1000):
            status.update(stage="labelling", done=count)
    closed = open_storage("s3://bucket/out")  # nothing listens there
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with StatusFile(closed, "label", RUN) as status:
        status.begin()


def test_a_killed_process_is_known_for_dead(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pipeline.files.status import StatusFile\n"
        "from pipeline.files.storage import open_storage\n"
        f"with StatusFile(open_storage(sys.argv[1]), 'label', {RUN!r}, every_s=0.05) as status:\n"
        "    status.update(stage='labelling')\n"
        "    status.begin()\n"
        "    time.sleep(600)\n"
    )
    job = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        storage = open_storage(tmp_path)
        eventually(lambda: told(storage, "labelling"))
        assert shown(storage).life() == "running"
    finally:
        job.send_signal(signal.SIGKILL)
        job.wait()
    assert (shown(storage).finished, shown(storage).life()) == (None, "dead")
    (tmp_path / f".{STATUS_FILE}.0123456789abcdef.tmp").write_text("{")  # killed while it wrote
    with StatusFile(storage, "label", "the-next-run") as status:
        status.begin()
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]


def test_work_that_turns_out_to_be_done_is_told(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with StatusFile(storage, "label", RUN) as status:
        status.begin()
    record = json.loads((tmp_path / STATUS_FILE).read_text()) | {"finished": None, "process_started": 1.0}
    storage.write_json(STATUS_FILE, record)
    assert shown(storage).life() == "dead"
    settle_status(storage)
    assert shown(storage).finished == "ok"


def test_elsewhere_the_heartbeat_tells(tmp_path: Path) -> None:
    with StatusFile(open_storage(tmp_path), "label", RUN) as status:
        status.begin()
    there = json.loads((tmp_path / STATUS_FILE).read_text()) | {"host": "elsewhere", "finished": None}
    assert Status(**there).life() == "running"
    assert Status(**there | {"updated": "2020-01-01T00:00:00Z"}).life() == "dead"
    ahead = Status(**there | {"updated": "2999-01-01T00:00:00Z"})
    assert ahead.life() == "running" and ahead.age_s < 0


def test_a_damaged_status_is_refused_in_words(tmp_path: Path) -> None:
    assert read_status(open_storage(tmp_path)) is None
    (tmp_path / STATUS_FILE).write_text('{"job": "label"}')
    with pytest.raises(MaskMillError, match=STATUS_FILE) as caught:
        read_status(open_storage(tmp_path))
    assert caught.value.code == "file_damaged"
