"""Atomic file writes: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a file atomically, creating its folder if necessary."""
    with new_file(path) as file:
        file.write(data)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file to be written piece by piece. It replaces ``path`` at the end, or is removed after an error."""
    with _temporary_file(path) as file:
        yield file
        _finish(file)
        os.replace(file.name, path)


@contextlib.contextmanager
def staged_file(path: Path, data: bytes) -> Iterator[str]:
    """A complete temporary file in the folder of ``path``, to be renamed or linked.

    It is removed at the end if it is still there.
    """
    with _temporary_file(path) as file:
        file.write(data)
        _finish(file)
        yield file.name


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[IO[bytes]]:
    path.parent.mkdir(parents=True, exist_ok=True)
    # The leading dot keeps it out of listings by Ray and of manifests if the process dies here. A name may
    # have 255 bytes, so not all of a long one fits. Opened like any new file, it gets the usual permissions.
    temporary = f"{path.parent}/.{path.name[:50]}.{secrets.token_hex(8)}.tmp"
    try:
        with open(temporary, "x+b") as file:
            yield file
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _finish(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
