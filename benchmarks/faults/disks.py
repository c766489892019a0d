"""Small disks of their own, to be filled."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


class NoDisk(Exception):
    """No disk can be mounted here; the text says why."""


@contextlib.contextmanager
def mounted(place: Path, options: str) -> Iterator[Path]:
    """A disk in memory at a new folder, with options of ``mount``. Only root may mount.

    Raises:
        NoDisk: it cannot be mounted.
    """
    place.mkdir()
    try:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise NoDisk(str(error)) from None
    if made.returncode:
        raise NoDisk(made.stderr.strip())
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def refuse_without_mounts() -> None:
    """Raise ``NoDisk`` where a process cannot have mounts of its own."""
    try:
        made = subprocess.run(
            ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise NoDisk(str(error)) from None
    if made.returncode:
        raise NoDisk(made.stderr.strip())


def fill(filler: Path) -> None:
    """Take all room that is left on a disk."""
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
