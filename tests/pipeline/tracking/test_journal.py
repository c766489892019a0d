from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from pipeline.tracking.journal import (
    FILES,
    JOURNAL,
    Journal,
    copy_without_secrets,
    journal_folders,
    pending,
)

ROOT = Path(__file__).resolve().parents[3]
OPEN = {
    "do": "open",
    "time": 1,
    "name": "run",
    "experiment": "maskmill-label",
    "uri": "x",
    "key": "k",
    "tags": {},
}


def test_events_come_back_in_order_and_from_any_offset(spool: Path) -> None:
    journal = Journal.create(OPEN)
    events = [{"do": "metrics", "time": i, "values": {"näme\n": i / 3}} for i in range(5)]
    for event in events:
        journal.append(event)
    read = list(journal.read())
    assert [event for event, _ in read] == [OPEN, *events]
    assert [event for event, _ in journal.read(read[2][1])] == events[2:]
    assert pending() == [(journal.folder, OPEN)] and journal.folder.parent == spool


def test_what_cannot_be_written_as_utf_8_is_replaced(spool: Path) -> None:
    journal = Journal.create(OPEN)
    journal.append({"do": "tags", "values": {"path": "photo-\udc80.jpg", "place": Path("/x")}})
    assert [event for event, _ in journal.read()][1]["values"] == {"path": "photo-?.jpg", "place": "/x"}


def test_a_torn_line_is_left_out_and_does_not_swallow_the_next(spool: Path) -> None:
    journal = Journal.create(OPEN)
    journal.close()
    with open(journal.folder / JOURNAL, "ab") as file:
        file.write(b'{"do": "metrics", "tim')
    again = Journal.take(journal.folder)
    assert again is not None
    assert [event for event, _ in again.read()] == [OPEN]


def test_a_journal_has_one_holder(spool: Path) -> None:
    journal = Journal.create(OPEN)
    assert Journal.take(journal.folder) is None
    journal.close()
    first = Journal.take(journal.folder)
    assert first is not None
    assert Journal.take(journal.folder) is None
    first.discard()
    assert Journal.take(journal.folder) is None
    assert pending() == [] and not journal.folder.exists()


def test_the_lock_goes_with_the_process(spool: Path) -> None:
    code = (
        "import time; from pipeline.tracking.journal import Journal\n"
        f"journal = Journal.create({OPEN!r})\n"
        "print(journal.folder, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert Journal.take(folder) is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert Journal.take(folder) is not None


def test_copies_are_taken_when_asked_for_and_hold_no_secrets(spool: Path, tmp_path: Path) -> None:
    journal = Journal.create(OPEN)
    source = tmp_path / "result"
    (source / "pictures").mkdir(parents=True)
    (source / "pictures" / "a.png").write_bytes(b"\x89PNG\xff")
    (source / "evaluation.json").write_text(json.dumps({"command": "x --token hush", "n": 1}))
    (source / "odd.txt").write_bytes(b"\xff\xfe latin")
    number = journal.keep(partial(copy_without_secrets, source))
    (source / "evaluation.json").unlink()
    kept = journal.kept(number) / "result"
    assert json.loads((kept / "evaluation.json").read_text()) == {"command": "x --token ***", "n": 1}
    assert (kept / "pictures" / "a.png").read_bytes() == b"\x89PNG\xff"
    assert (kept / "odd.txt").read_bytes() == b"\xff\xfe latin"
    with pytest.raises(FileNotFoundError):
        journal.keep(partial(copy_without_secrets, tmp_path / "missing.json"))
    assert [path.name for path in (journal.folder / FILES).iterdir()] == [number]


def test_many_threads_write_whole_lines(spool: Path) -> None:
    journal = Journal.create(OPEN)

    def write(thread: int) -> None:
        for step in range(200):
            journal.append({"do": "metrics", "thread": thread, "step": step, "pad": "x" * (step % 97)})

    threads = [threading.Thread(target=write, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    seen = 0
    while any(thread.is_alive() for thread in threads):  # a reader meets whole events only
        seen = max(seen, sum(1 for _ in journal.read()))
    for thread in threads:
        thread.join()
    events = [event for event, _ in journal.read()][1:]
    assert len(events) == 800 >= seen - 1
    for thread_number in range(4):
        assert [e["step"] for e in events if e["thread"] == thread_number] == list(range(200))


def test_where_the_cache_cannot_be_written_the_temporary_folder_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MASKMILL_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    journal = Journal.create(OPEN)
    assert tmp_path / "tmp" in journal.folder.parents
    assert pending() == [(journal.folder, OPEN)]


@pytest.mark.parametrize(
    ("cache", "xdg", "expected"),
    [
        ("/a", "/b", "/a/tracking"),
        ("", "/b", "/b/maskmill/tracking"),
        ("", "", "/h/.cache/maskmill/tracking"),
    ],
)
def test_journal_folders(monkeypatch: pytest.MonkeyPatch, cache: str, xdg: str, expected: str) -> None:
    monkeypatch.setenv("MASKMILL_CACHE", cache)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)
    monkeypatch.setenv("HOME", "/h")
    assert str(journal_folders()[0]) == expected


def test_rubbish_is_cleared_away_but_no_new_run(spool: Path) -> None:
    for name in ("old", "new"):
        (spool / name).mkdir(parents=True)
        (spool / name / JOURNAL).touch()
    past = time.time() - 7200
    os.utime(spool / "old", (past, past))
    assert pending() == []
    assert [path.name for path in spool.iterdir()] == ["new"]
