"""Open an image that is too large to be decoded whole, from wherever it is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pipeline.files.fetch import copy_to, local_path, max_bytes
from pipeline.files.images import MOST_PIXELS, ImageError
from pipeline.files.large.picture import Picture
from pipeline.files.large.tiff import TiffPicture, is_tiff
from pipeline.files.large.vips import VipsPicture, refuse_whole
from pipeline.files.recognition import looks_like_image

_HEAD = 1 << 20
SPARE_BYTES = 1 << 30  # bytes that a temporary copy leaves free


@contextlib.contextmanager
def local_file(uri: str, *, start: int = 0, length: int | None = None) -> Iterator[tuple[Path, bytes]]:
    """An image as a file of this machine, and its SHA-256.

    Local files are read where they are. Objects, members of archives and byte ranges are copied to a
    temporary file first, as every byte of them is needed.

    Args:
        uri: as for ``pipeline.files.fetch.fetch``.
        start: the image's first byte in the file.
        length: its number of bytes; None reads to the end.

    Raises:
        ImageError: as ``fetch``; ``too_many_bytes`` for a file larger than any image that is read, or if the
            temporary folder has no room.
    """
    path = local_path(uri) if start == 0 and length is None else None
    if path is not None:
        size = path.stat().st_size
        if size > max_bytes(MOST_PIXELS):  # hashing it would take hours
            raise ImageError(
                "too_many_bytes",
                f"{size:,} bytes; the limit is {max_bytes(MOST_PIXELS):,}: cut the image into pieces",
            )
        yield path, _digest(path)
        return
    folder = tempfile.gettempdir()
    most = min(max_bytes(MOST_PIXELS), max(0, shutil.disk_usage(folder).free - SPARE_BYTES))
    handle, name = tempfile.mkstemp(prefix="maskmill-")
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                copy_to(file, uri, start=start, length=length, max_bytes=most)
            except ImageError as error:
                if error.code != "too_many_bytes" or most == max_bytes(MOST_PIXELS):
                    raise
                raise ImageError(
                    "too_many_bytes",
                    f"{error.message}: what {folder} has room for (TMPDIR names another folder)",
                ) from error
        yield Path(name), _digest(Path(name))
    finally:
        os.unlink(name)


def open_picture(path: Path, *, band: int) -> Picture:
    """Open an image for reading by regions, from top to bottom.

    Args:
        path: of a local file.
        band: the height of regions, in pixels.

    Raises:
        ImageError: ``too_large`` for a format that cannot be read so, or an image beyond all limits;
            ``not_an_image``, ``unsupported_format``, ``truncated`` or ``unreadable``.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if is_tiff(head):
        return TiffPicture(path, band=band)
    if head.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
        refuse_whole(head)
        return VipsPicture(path)
    if not looks_like_image(head):
        raise ImageError("not_an_image", f"a large file that begins with {repr(head[:8])[1:]}")
    raise ImageError(
        "too_large",
        "images of this size are read in windows if they are TIFF, JPEG or PNG: write it anew as a tiled "
        "TIFF (gdal_translate -of COG, or vips tiffsave --tile)",
    )


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_HEAD):
            digest.update(piece)
    return digest.digest()
