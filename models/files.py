"""Atomic file writes: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a file atomically, creating its folder if necessary."""
    with new_file(path) as file:
        file.write(data)


def write_unsynced(files: Iterable[tuple[str, bytes]]) -> None:
    """Write or replace files, each of them atomically for readers, creating their folders if necessary.

    The disk is not made sure of: if the machine fails within the next minute, they may be empty or missing.
    That takes a small part of the time. Whoever relies on them checks them, or calls ``os.sync``.

    Args:
        files: path and content of each.
    """
    made = set()
    for path, data in files:
        folder = os.path.dirname(path) or "."
        if folder not in made:
            os.makedirs(folder, exist_ok=True)
            made.add(folder)
        with _temporary_file(path) as file:
            file.write(data)
            file.flush()
            os.replace(file.name, path)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written piece by piece. It replaces ``path`` at the end, or is removed after an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(str(path)) as file:
        yield file
        _finish(file)
        os.replace(file.name, path)


@contextlib.contextmanager
def staged_file(path: Path, data: bytes) -> Iterator[str]:
    """A complete temporary file in the folder of ``path``, to be renamed or linked.

    It is removed at the end if it is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_file(str(path)) as file:
        file.write(data)
        _finish(file)
        yield file.name


@contextlib.contextmanager
def _temporary_file(path: str) -> Iterator[IO[bytes]]:
    # The leading dot keeps it out of listings by Ray and of manifests if the process dies here. A name may
    # have 255 bytes, so not all of a long one fits. Opened like any new file, it gets the usual permissions.
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name[:50]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b") as file:
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
