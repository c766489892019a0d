"""The on-disk journal of a run: written first, sent later, deleted once fully delivered.

A tracked run is a folder below ``journal_folders()``:

    journal.jsonl   one event per line; the first opens the run, an ``end`` event closes it
    files/ID/       copies of the files of an ``artifact`` event

An event is on disk when the call that records it returns, so it survives the process. A call takes well under
a millisecond. (MLflow's own SQLite store would take seconds to import and create, some 25 ms per call, and a
second copy of everything to reconcile with the server.)

The process that writes or sends a journal holds a lock on it, which ends with the process. An unlocked
journal is therefore complete or belongs to a dead run.
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
"""A folder without a first line that is older than this belongs to a run that died at its start."""
TEXT_SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".md", ".log", ".toml"})
PAGE_SUFFIXES = frozenset({".html", ".htm", ".svg", ".xml"})

Event = dict[str, Any]


def journal_folders() -> list[Path]:
    """Where journals are stored: in the cache, or in the temporary folder if the cache is read-only."""
    folders = [cache_dir(), Path(tempfile.gettempdir(), f"maskmill-{os.getuid()}")]
    return [folder.absolute() / "tracking" for folder in folders]


class Journal:
    """A journal locked by this process; thread-safe. Use ``create`` or ``take``.

    Args:
        folder: folder of the run.
        descriptor: of the locked journal file, open for reading and appending.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor: int | None = descriptor
        self._lock = threading.Lock()

    @classmethod
    def create(cls, opening: Event) -> Journal:
        """Create a journal with its first event.

        Raises:
            OSError: none of the folders is writable.
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
        """Open the journal of a finished run; None if a process holds it or it is gone."""
        try:
            return cls(folder, _open_locked(folder / JOURNAL))
        except (BlockingIOError, FileNotFoundError):
            return None

    def append(self, event: Event) -> None:
        """Write an event, with secrets redacted.

        Raises:
            OSError: the disk is full, or the journal is closed.
        """
        line = json.dumps(redact_tree(event), ensure_ascii=False, default=str) + "\n"
        # Lone surrogates, from non-UTF-8 paths, cannot be sent.
        data = line.encode("utf-8", "replace")
        with self._lock:
            if self._descriptor is None:
                raise OSError("the journal is closed")
            start = os.fstat(self._descriptor).st_size
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                os.ftruncate(self._descriptor, start)  # a partial line would corrupt the next one
                raise

    def keep(self, fill: Callable[[Path], object]) -> str:
        """Store files for an ``artifact`` event; ``fill`` writes them to a given folder, removed if it fails.

        Returns:
            The id for ``kept``.
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
        """The complete events from a byte offset on, each with the offset after it.

        Skips an incomplete last line, which was being written when the process died.
        """
        with open(self.folder / JOURNAL, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield json.loads(line), offset

    def close(self) -> None:
        """Release the journal; it stays on disk for ``maskmill track --flush``."""
        with self._lock:
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def discard(self) -> None:
        """Delete the run's folder once everything has been delivered."""
        with contextlib.suppress(OSError):
            (self.folder / JOURNAL).unlink()  # first: without it, the rest is garbage
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def pending() -> list[tuple[Path, Event]]:
    """Folders of runs that are not fully sent, oldest first, each with its first event.

    Also deletes the folders of runs that died before their first event.
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
    """Copy a file or folder into a folder, with secrets redacted in text files."""
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
    """Redact the text of a file. JSON stays valid; a text without secrets is unchanged."""
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
