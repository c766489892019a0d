"""The files of a folder, a glob or a prefix of an object store."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections.abc import Sequence

from models.errors import WrongUse
from pipeline.corpus.sources.found import PathsByReason, leave_out, missing
from pipeline.files.storage import open_storage

_WILDCARDS = frozenset("*?[")


def is_pattern(name: str) -> bool:
    """Whether a path, or a part of one, is a glob."""
    return not _WILDCARDS.isdisjoint(name)


def _is_file(path: str, left_out: PathsByReason) -> bool:
    """Whether a path is a regular file, or a link to one; else it is left out."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        leave_out(left_out, _link_trouble(error), path)
        return False
    if not stat.S_ISREG(mode):
        leave_out(left_out, "neither file nor folder", path)
    return stat.S_ISREG(mode)


def _link_trouble(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "broken link"
    return "link to itself" if error.errno == errno.ELOOP else f"unreadable ({error.strerror})"


def _files_below(folders: Sequence[str], left_out: PathsByReason) -> list[str]:
    """List files recursively, following symbolic links but entering each real folder only once.

    Hidden names are skipped, as a shell does; what is neither a file nor a folder is left out.
    """
    files: list[str] = []
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
                            leave_out(left_out, "hidden", entry.path)
                    elif entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        files.append(entry.path)
                    elif os.path.isdir(entry.path):
                        linked.append(entry.path)
                    elif _is_file(entry.path, left_out):
                        files.append(entry.path)
        except PermissionError:
            raise WrongUse(
                "source_missing",
                f"no permission to read the folder {folder}",
                "Grant read access to it, or give a source without it.",
            ) from None
        except OSError as error:
            if folder in folders:
                raise
            leave_out(left_out, f"folder that cannot be read ({error.strerror})", folder)
        linked.sort()
    return files


def local_files(uri: str, left_out: PathsByReason) -> list[str]:
    """The files of a local folder or glob.

    Raises:
        WrongUse: ``source_missing``.
    """
    if os.path.isdir(uri):
        return _files_below([uri], left_out)
    if not is_pattern(uri):
        raise missing(uri, "there is no")
    matches = sorted(glob.glob(uri, recursive=True))
    if not matches:
        raise missing(uri, "nothing matches")
    files = [match for match in matches if not os.path.isdir(match) and _is_file(match, left_out)]
    if "**" not in uri:  # "**" has already matched the files in folders
        files += _files_below([match for match in matches if os.path.isdir(match)], left_out)
    return files


def remote_files(uri: str, left_out: PathsByReason) -> list[str]:
    """The files of a prefix or a glob of an object store; the address itself if it is that of a file.

    Raises:
        WrongUse: ``source_missing``.
    """
    parts = uri.split("/")
    fixed = next((n for n, part in enumerate(parts) if is_pattern(part)), len(parts))
    storage, pattern = open_storage("/".join(parts[:fixed])), "/".join(parts[fixed:])
    if pattern:
        names = storage.glob(pattern)
    else:
        names = []
        for name in storage.list(recursive=True):
            if "/." in f"/{name}":
                leave_out(left_out, "hidden", name)
            else:
                names.append(name)
        if not names and not left_out and storage.exists():
            return [uri]
    if not names:
        raise missing(uri, "there is nothing at")
    return [storage.uri_of(name) for name in names]
