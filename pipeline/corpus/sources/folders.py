"""The files of a folder, a glob or a prefix of an object store."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Iterator, Sequence

from models.errors import WrongUse
from pipeline.corpus.sources.found import LeftOut, missing
from pipeline.files.listing import list_below
from pipeline.files.storage import open_storage

_WILDCARDS = frozenset("*?[")


def is_pattern(name: str) -> bool:
    """Whether a path, or a part of one, is a glob."""
    return not _WILDCARDS.isdisjoint(name)


def _is_file(path: str, left_out: LeftOut) -> bool:
    """Whether a path is a regular file, or a link to one; else it is left out."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        left_out.add(_link_trouble(error), path)
        return False
    if not stat.S_ISREG(mode):
        left_out.add("neither file nor folder", path)
    return stat.S_ISREG(mode)


def _link_trouble(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "broken link"
    return "link to itself" if error.errno == errno.ELOOP else f"unreadable ({error.strerror})"


def _files_below(folders: Sequence[str], left_out: LeftOut) -> Iterator[str]:
    """Yield files recursively, following symbolic links but entering each real folder only once.

    Hidden names are skipped, as a shell does; what is neither a file nor a folder is left out.
    """
    visited: set[tuple[int, int]] = set()
    pending = list(reversed(folders))
    linked: list[str] = []
    while pending or linked:
        # Real folders first, so that a file reachable both ways keeps its real path.
        folder = pending.pop() if pending else linked.pop(0)
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        if not entry.is_dir(follow_symlinks=False):
                            left_out.add("hidden", entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        yield entry.path
                    elif os.path.isdir(entry.path):
                        linked.append(entry.path)
                    elif _is_file(entry.path, left_out):
                        yield entry.path
        except PermissionError:
            raise WrongUse(
                "input_missing",
                f"no permission to read the folder {folder}",
                "Grant read access to it, or give a source without it.",
            ) from None
        except OSError as error:
            if folder in folders:
                raise
            left_out.add(f"folder that cannot be read ({error.strerror})", folder)
        linked.sort()


def local_files(uri: str, left_out: LeftOut) -> Iterator[str]:
    """Yield the files of a local folder or glob.

    Raises:
        WrongUse: ``input_missing``.
    """
    if os.path.isdir(uri):
        yield from _files_below([uri], left_out)
        return
    if not is_pattern(uri):
        raise missing(uri, "there is no")
    folders, found = [], False
    for match in glob.iglob(uri, recursive=True):
        found = True
        if os.path.isdir(match):
            folders.append(match)
        elif _is_file(match, left_out):
            yield match
    if not found:
        raise missing(uri, "nothing matches")
    if "**" not in uri:  # "**" has already matched the files in folders
        yield from _files_below(sorted(folders), left_out)


def remote_files(uri: str, left_out: LeftOut, *, in_order: bool = False) -> Iterator[str]:
    """Yield the files of a prefix or a glob of an object store; the address itself if it is that of a file.

    Args:
        uri: canonical.
        left_out: is told what is not taken.
        in_order: of their keys, which takes longer.

    Raises:
        WrongUse: ``input_missing``.
    """
    parts = uri.split("/")
    fixed = next((n for n, part in enumerate(parts) if is_pattern(part)), len(parts))
    storage, pattern = open_storage("/".join(parts[:fixed])), "/".join(parts[fixed:])
    found = False
    for name in storage.glob(pattern) if pattern else list_below(storage, in_order=in_order):
        found = True
        if not pattern and "/." in f"/{name}":
            left_out.add("hidden", name)
        else:
            yield storage.uri_of(name)
    if found:
        return
    if pattern or not storage.exists():
        raise missing(uri, "there is nothing at")
    yield uri
