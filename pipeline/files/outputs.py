"""Outputs on a local disk, checked before anything is made. Remote places show their faults when written."""

from __future__ import annotations

import os
from pathlib import Path

from models.errors import WrongUse
from pipeline.files.storage import canonical_uri, is_remote


def check_output_folder(output: str | os.PathLike[str]) -> None:
    """Refuse an output that can be no folder: a file, a place below one, or one that may not be written.

    Raises:
        MaskMillError: ``output_not_ours``.
    """
    place = canonical_uri(output)
    if not is_remote(place):
        _check_folder(Path(place), output)
    elif place.startswith(("http://", "https://")):
        raise _invalid(f"{place} can be read, but not written to.")


def check_output_file(output: str | os.PathLike[str]) -> None:
    """Refuse an output that can be no file: a folder, a place below a file, or one that may not be written.

    Raises:
        MaskMillError: ``output_not_ours``.
    """
    path = Path(canonical_uri(output))
    if path.is_dir():
        raise _invalid(f"{output} is a folder, and the output is a file.")
    _check_folder(path.parent, output)


def _check_folder(folder: Path, output: str | os.PathLike[str]) -> None:
    for path in (folder, *folder.parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # a name that is too long, a folder that may not be entered
            raise _invalid(f"{output} cannot be made: {error.strerror}.") from error
        if not path.is_dir():
            itself = path == Path(canonical_uri(output))
            what = "is a file" if itself else f"lies below {path}, which is a file"
            raise _invalid(f"{output} {what}.")
        if not os.access(path, os.W_OK | os.X_OK):
            raise _invalid(f"{output} cannot be written: no permission for {path}.")
        return


def _invalid(message: str) -> WrongUse:
    return WrongUse("output_not_ours", message, "Name another --output.")
