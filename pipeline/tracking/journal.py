"""The journal of a run on disk: written first, sent later, deleted once all of it has arrived.

A tracked run is a folder below ``journal_folders()``:

    journal.jsonl   one event a line; the first opens the run, an ``end`` event closes it
    files/ID/       copies of what an ``artifact`` event attaches

An event is on disk when the call that records it returns, so it survives the process; a call takes well under
a millisecond. (MLflow's own SQLite store would need seconds to import and to create, some 25 ms a call, and
a second copy of everything to be compared with the server's.)
Whoever writes or sends a journal holds a lock on it. The lock ends with the process, so a journal without
one is complete or belongs to a run that died.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.files.redaction import redact, redact_tree
from pipeline.files.storage import cache_dir

JOURNAL, FILES = "journal.jsonl", "files"
ABANDONED_S = 3600.0
"""A folder without a first line belongs to a run that died at birth, if it is older than this."""
TEXT_SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".md", ".log", ".toml"})
PAGE_SUFFIXES = frozenset({".html", ".htm", ".svg", ".xml"})

Event = dict[str, Any]


def journal_folders() -> list[Path]:
    """Where journals may lie: in the cache, or where that is read-only in the folder for temporary files."""
    folders = [cache_dir(), Path(tempfile.gettempdir(), f"maskmill-{os.getuid()}")]
    return [folder.absolute() / "tracking" for folder in folders]


class Journal:
    """A journal that this process holds; thread-safe. Made by ``create`` or ``take``.

    Args:
        folder: of the run.
        descriptor: of the locked journal file, open for reading and appending.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor: int | None = descriptor
        self._lock = threading.Lock()

    @classmethod
    def create(cls, opening: Event) -> Journal:
        """Begin a journal with its first event.

        Raises:
            OSError: no folder for it is writable.
        """
        problem = OSError("no folder for the journal")
        for parent in journal_folders():
            folder = parent / f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:12]}"
            try:
                folder.mkdir(parents=True, mode=0o700)
                journal = cls(folder, _open_locked(folder / JOURNAL, os.O_CREAT))
                journal.append(opening)
                return journal
            except OSError as error:
                problem = error
                shutil.rmtree(folder, ignore_errors=True)
        raise problem

    @classmethod
    def take(cls, folder: Path) -> Journal | None:
        """Take up the journal of a run that has ended; None if a process holds it, or it is gone."""
        try:
            return cls(folder, _open_locked(folder / JOURNAL))
        except (BlockingIOError, FileNotFoundError):
            return None

    def append(self, event: Event) -> None:
        """Write an event, without any secrets in it.

        Raises:
            OSError: the disk is full, or the journal is closed.
        """
        line = json.dumps(redact_tree(event), ensure_ascii=False, default=str) + "\n"
        # Lone surrogates, from paths that are not UTF-8, could not be sent.
        data = line.encode("utf-8", "replace")
        with self._lock:
            if self._descriptor is None:
                raise OSError("the journal is closed")
            start = os.fstat(self._descriptor).st_size
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                os.ftruncate(self._descriptor, start)  # a torn line would swallow the next one
                raise

    def keep(self, fill: Callable[[Path], object]) -> str:
        """Keep files for an ``artifact`` event; ``fill`` puts them into the folder that it is given.

        Returns:
            The id for ``kept``. A folder that could not be filled is removed.
        """
        identity = uuid.uuid4().hex[:12]
        folder = self.kept(identity)
        folder.mkdir(parents=True)
        try:
            fill(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return identity

    def kept(self, identity: str) -> Path:
        """The folder that ``keep`` filled."""
        return self.folder / FILES / identity

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The whole events from an offset in bytes on, each with the offset behind it.

        A last line without its end was being written when the process died; it is left out.
        """
        with open(self.folder / JOURNAL, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield json.loads(line), offset

    def close(self) -> None:
        """Let go of the journal; it stays for ``maskmill track --flush``."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def discard(self) -> None:
        """Delete the run's folder, because all of it has arrived."""
        with contextlib.suppress(OSError):
            (self.folder / JOURNAL).unlink()  # first: without it the rest counts as rubbish
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def pending() -> list[tuple[Path, Event]]:
    """Folders of runs that are not wholly sent, oldest first, each with its first event.

    Clears away what runs left that died before their first event.
    """
    found = []
    for parent in journal_folders():
        for folder in sorted(parent.glob("*")):
            with contextlib.suppress(OSError):
                head = b""
                if (folder / JOURNAL).exists():
                    with open(folder / JOURNAL, "rb") as file:
                        head = file.readline()
                if head.endswith(b"\n"):
                    found.append((folder, json.loads(head)))
                elif time.time() - folder.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
    return found


def copy_without_secrets(source: Path, folder: Path) -> None:
    """Copy a file or a folder into a folder; copies of text files lose their secrets."""
    target = folder / source.name
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_copy)
    else:
        _copy(source, target)


def _copy(source: str | Path, target: str | Path) -> None:
    suffix = Path(source).suffix.lower()
    if suffix not in TEXT_SUFFIXES | PAGE_SUFFIXES:
        shutil.copyfile(source, target)
        return
    data = Path(source).read_bytes()
    with contextlib.suppress(UnicodeDecodeError):
        data = _without_secrets(data.decode(), suffix).encode()
    Path(target).write_bytes(data)


def _without_secrets(text: str, suffix: str) -> str:
    """The text of a file without secrets; JSON stays valid, and a file without secrets stays as it is."""
    if suffix == ".json":
        with contextlib.suppress(ValueError):
            content = json.loads(text)
            clean = redact_tree(content)
            return text if clean == content else json.dumps(clean, indent=1, ensure_ascii=False)
    return redact(text, assignments=suffix in TEXT_SUFFIXES)


def _open_locked(path: Path, flags: int = 0) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not path.exists():  # its holder sent and deleted it between open and lock
            raise FileNotFoundError(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
