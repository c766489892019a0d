"""Atomic file writes: a reader sees the old content or the new, never a part."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


def write_file(path: Path, data: bytes) -> None:
    """Write or replace a file atomically, creating its folder if necessary."""
    with staged_file(path, data) as temporary:
        os.replace(temporary, path)


@contextlib.contextmanager
def staged_file(path: Path, data: bytes) -> Iterator[str]:
    """A complete temporary file in the folder of ``path``, to be renamed or linked.

    It is removed at the end if it is still there.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The leading dot keeps it out of listings by Ray and of manifests if the process dies here.
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _umask() -> int:
    # os.umask can only set it, and setting and restoring it would race with other threads.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o022
