"""The journal of a run on disk: written first, sent later, deleted when all of it has arrived.

A run that is tracked is a folder below ``spool_folders()``:

    journal.jsonl   one event a line; the first line opens the run, an ``end`` line closes it
    files/N/        copies of what event N attaches
    sent.json       how far a server has confirmed the journal

Events are on disk when the call that records them returns, so they survive the process. Whoever writes to a
journal or sends it holds a lock on it; the lock goes with the process, so a journal without one is complete
or belongs to a run that died.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.files.redaction import redact, redact_tree

JOURNAL, FILES, SENT = "journal.jsonl", "files", "sent.json"
ABANDONED_S = 3600.0
"""A folder without a first line is a run that died at birth, if it is older than this."""
TEXT_SUFFIXES = frozenset({".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".md", ".log", ".toml"})
PAGE_SUFFIXES = frozenset({".html", ".htm", ".svg", ".xml"})

Event = dict[str, Any]


def spool_folders() -> list[Path]:
    """Where journals may lie: below ``$MASKMILL_CACHE``, else ``$XDG_CACHE_HOME`` or ``~/.cache``.

    The last one, in the folder for temporary files, is for machines where the others cannot be written.
    """
    own = os.environ.get("MASKMILL_CACHE")
    folders = []
    if own:
        folders.append(Path(own))
    elif os.environ.get("XDG_CACHE_HOME"):
        folders.append(Path(os.environ["XDG_CACHE_HOME"], "maskmill"))
    else:
        with contextlib.suppress(RuntimeError):  # no home
            folders.append(Path.home() / ".cache" / "maskmill")
    folders.append(Path(tempfile.gettempdir()) / f"maskmill-{os.getuid()}")
    return [folder.absolute() / "tracking" for folder in folders]


class Journal:
    """A journal that this process holds; made by ``create`` or ``take``.

    Safe to use from several threads.

    Args:
        folder: of the run.
        descriptor: of the journal file, locked, opened for reading and appending.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder = folder
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._closed = False

    @classmethod
    def create(cls, opening: Event) -> Journal:
        """Begin a journal with its first event.

        Raises:
            OSError: no place for it can be written to.
        """
        problem: OSError | None = None
        for parent in spool_folders():
            folder = parent / f"{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:12]}"
            try:
                folder.mkdir(parents=True, mode=0o700)
                journal = cls(folder, _open_locked(folder / JOURNAL, os.O_CREAT | os.O_EXCL))
                journal.append(opening)
            except OSError as error:
                problem = error
                shutil.rmtree(folder, ignore_errors=True)
                continue
            return journal
        assert problem is not None
        raise problem

    @classmethod
    def take(cls, folder: Path) -> Journal | None:
        """Take up the journal of a run that has ended; None if a process holds it, or it is gone."""
        try:
            return cls(folder, _open_locked(folder / JOURNAL))
        except (BlockingIOError, FileNotFoundError):
            return None

    def append(self, event: Event) -> None:
        """Write an event, without the secrets that it may hold."""
        line = json.dumps(redact_tree(event), ensure_ascii=False, default=str) + "\n"
        with self._lock:
            if self._closed:
                raise OSError("the journal is closed")
            # Halves of surrogate pairs, from paths that are no UTF-8, could not be sent.
            data = line.encode("utf-8", "replace")
            # A line that was cut short would swallow the next one.
            start = os.fstat(self._descriptor).st_size
            try:
                while data:
                    data = data[os.write(self._descriptor, data) :]
            except OSError:
                os.ftruncate(self._descriptor, start)
                raise

    def keep(self, path: Path) -> str:
        """Copy a file or folder into the spool; returns the name for an event of it.

        Copies of text files are without secrets.
        """
        number = uuid.uuid4().hex[:12]
        files = self.folder / FILES
        files.mkdir(exist_ok=True)
        unfinished = files / f".{number}"
        unfinished.mkdir()
        try:
            if path.is_dir():
                shutil.copytree(path, unfinished / path.name, copy_function=_copy)
            else:
                _copy(path, unfinished / path.name)
            os.rename(unfinished, files / number)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
        return number

    def kept(self, number: str) -> Path:
        """The folder that holds what ``keep`` copied."""
        return self.folder / FILES / number

    def read(self, offset: int = 0) -> Iterator[tuple[Event, int]]:
        """The whole events from an offset on, each with the offset behind it.

        A last line without its end was being written when the process died: it is left out.
        """
        with open(self.folder / JOURNAL, "rb") as file:
            file.seek(offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                offset += len(line)
                yield json.loads(line), offset

    @property
    def sent(self) -> dict[str, Any]:
        """What has been confirmed: ``run_id`` and ``offset``."""
        try:
            return dict(json.loads((self.folder / SENT).read_text()))
        except (FileNotFoundError, ValueError):
            return {"run_id": None, "offset": 0}

    @sent.setter
    def sent(self, value: dict[str, Any]) -> None:
        temporary = self.folder / f".{SENT}"
        temporary.write_text(json.dumps(value))
        os.replace(temporary, self.folder / SENT)

    @property
    def size(self) -> int:
        """Bytes of the journal so far."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Let go of the journal; it stays for ``maskmill track --flush``."""
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self._descriptor)

    def discard(self) -> None:
        """Delete the run's folder: all of it has arrived. Without a journal the rest counts as rubbish."""
        with contextlib.suppress(OSError):
            (self.folder / JOURNAL).unlink()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.close()


def pending() -> list[Path]:
    """Folders of runs that are not wholly sent, oldest first; rubbish is cleared away."""
    found = []
    for parent in spool_folders():
        for folder in sorted(parent.glob("*")) if parent.is_dir() else []:
            journal = folder / JOURNAL
            with contextlib.suppress(OSError):
                if journal.exists() and b"\n" in _head(journal):
                    found.append(folder)
                elif time.time() - folder.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(folder, ignore_errors=True)
    return found


def opening(folder: Path) -> Event | None:
    """The first event of a run; None if the run was sent and deleted meanwhile."""
    try:
        with open(folder / JOURNAL, "rb") as file:
            return dict(json.loads(file.readline()))
    except FileNotFoundError:
        return None


def _open_locked(path: Path, flags: int = 0) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between open and lock its holder may have sent and deleted it.
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(path)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.readline()


def _copy(source: str | Path, target: str | Path) -> str:
    suffix = Path(source).suffix.lower()
    if suffix in TEXT_SUFFIXES or suffix in PAGE_SUFFIXES:
        data = Path(source).read_bytes()
        with contextlib.suppress(UnicodeDecodeError):
            data = _without_secrets(data.decode(), suffix).encode()
        Path(target).write_bytes(data)
    else:
        shutil.copyfile(source, target)
    return str(target)


def _without_secrets(text: str, suffix: str) -> str:
    """The text of a file; JSON stays JSON, and what holds no secret stays as it is."""
    if suffix == ".json":
        with contextlib.suppress(ValueError):
            content = json.loads(text)
            clean = redact_tree(content)
            return text if clean == content else json.dumps(clean, indent=1, ensure_ascii=False)
    return redact(text, assignments=suffix in TEXT_SUFFIXES)
