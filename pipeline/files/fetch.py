"""Read the bytes of an image, from wherever it is, within limits of size and time.

Bad input is normal here. Any fault of one image raises ``ImageError``; see ``pipeline.files.images``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import queue
import random
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from pipeline.files.containers import inside, member_range, read_cell
from pipeline.files.images import MAX_PIXELS, MOST_PIXELS, ImageError
from pipeline.files.redaction import redact, without_signature
from pipeline.files.s3 import driver_options

_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
PIECE_BYTES = 8 << 20  # bytes read at a time
_PIECES_AHEAD = 8
_PATIENCE, _WAIT = 60.0, 0.5  # seconds
_PAST_END = re.compile(r"InvalidRange|\b416\b|not satisfiable", re.IGNORECASE)
_CREDENTIALS = re.compile(
    r"ExpiredToken|token has expired|RequestExpired|InvalidAccessKeyId|SignatureDoesNotMatch"
    r"|Invalid endpoint",
    re.IGNORECASE,
)


def max_bytes(max_pixels: int) -> int:
    """The size of the largest file that can hold an image of so many pixels, with 64 MB for metadata.

    Twelve bytes a pixel: three channels of 32 bits. RGBA of 16 bits, the largest that is read, has eight.
    """
    return 12 * max_pixels + (64 << 20)


def file_version(uri: str) -> str | None:
    """What tells a file from a later one of the same name, without reading it.

    Args:
        uri: as for :func:`fetch`. What is inside a file changes with it.

    Returns:
        Its size in bytes, and the ETag of an object or the time of the last change; None if there is no such
        file, or its storage cannot tell.
    """
    try:
        held = inside(uri)
        uri = uri if held is None else held.file
        if not _REMOTE.match(uri):
            status = os.stat(uri)
            return f"{status.st_size} {status.st_mtime_ns}"
        import fsspec

        # A listing that was cached tells of the past.
        filesystem, path = fsspec.core.url_to_fs(uri, use_listings_cache=False, **driver_options(uri))
        info = filesystem.info(path)
    except Exception:  # each driver has its own exceptions; reading the file will tell
        return None
    changed = next(
        (info[name] for name in ("ETag", "mtime", "LastModified", "updated") if info.get(name)), None
    )
    return None if changed is None else f"{info.get('size')} {changed}"


def local_path(uri: str) -> Path | None:
    """The path of an address that is a whole file of this machine; None for objects and parts of files."""
    if inside(uri) is not None:
        return None
    if _REMOTE.match(uri):
        from pipeline.files.storage import canonical_uri, is_remote

        try:
            uri = canonical_uri(uri)
        except Exception:  # reading it will tell
            return None
        if is_remote(uri):
            return None
    return Path(uri)


def fetch(
    uri: str,
    *,
    start: int = 0,
    length: int | None = None,
    max_bytes: int = max_bytes(MAX_PIXELS),
    patience: float = _PATIENCE,
    attempts: int = 4,
    wait: float = _WAIT,
    sleep: Callable[[float], object] = time.sleep,
) -> bytes:
    """Read a file or object, or a range of its bytes.

    Args:
        uri: a local path, or a URL of any scheme that fsspec knows (``s3://``, ``gs://``, ``file://``, …);
            with ``#…`` behind it what is in a tar archive or a Parquet file, see
            ``pipeline.files.containers``. The range of a member of an archive is that in the archive.
        start: the first byte to read.
        length: number of bytes; None reads to the end.
        max_bytes: larger files are not read.
        patience: seconds without any new byte after which a read is given up.
        attempts: tries after transient errors.
        wait: seconds before the second attempt; doubled each time, with up to 50 % of random jitter so that
            many workers do not retry at once.
        sleep: for tests.

    Returns:
        The bytes; fewer than ``length`` if the file ends first.

    Raises:
        ImageError: ``not_found``, ``permission``, ``unavailable``, ``unsupported_uri``, ``not_a_file``,
            ``too_many_bytes`` or ``unreadable``. Its message holds no secrets of the address.
        MaskMillError: ``storage_unreachable`` if credentials have expired, which is no fault of the image.
    """
    pieces: list[bytes] = []

    def read(chunks: _Chunks) -> None:
        pieces.clear()
        _gather(chunks, max_bytes, patience, pieces.append)

    _read(read, uri, start, length, max_bytes, attempts, wait, sleep)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def copy_to(
    file: IO[bytes],
    uri: str,
    *,
    start: int = 0,
    length: int | None = None,
    max_bytes: int,
    patience: float = _PATIENCE,
    attempts: int = 4,
    wait: float = _WAIT,
    sleep: Callable[[float], object] = time.sleep,
) -> None:
    """``fetch`` into a file, in little memory.

    Args:
        file: a new local file, open for writing.
        uri, start, length, max_bytes, patience, attempts, wait, sleep: see ``fetch``.

    Raises:
        ImageError, MaskMillError: as ``fetch``.
        OSError: the file cannot be written.
    """

    def read(chunks: _Chunks) -> None:
        file.seek(0)
        file.truncate()
        _gather(chunks, max_bytes, patience, file.write)

    _read(read, uri, start, length, max_bytes, attempts, wait, sleep)


def digest(uri: str, *, start: int = 0, length: int | None = None, attempts: int = 4) -> bytes:
    """SHA-256 (32 bytes) of what is at an address, in little memory: large images too are hashed.

    Args:
        uri, start, length, attempts: see ``fetch``.

    Raises:
        ImageError, MaskMillError: as ``fetch``.
    """
    # Of any image that is labelled in windows: a server may go on forever.
    found, most = hashlib.sha256(), max_bytes(MOST_PIXELS)

    def read(chunks: _Chunks) -> None:
        nonlocal found
        found = hashlib.sha256()
        _gather(chunks, most, _PATIENCE, found.update)

    _read(read, uri, start, length, most, attempts, _WAIT, time.sleep)
    return found.digest()


_Chunks = Callable[[], Iterator[bytes]]


def _read(
    read: Callable[[_Chunks], None],
    uri: str,
    start: int,
    length: int | None,
    most: int,
    attempts: int,
    wait: float,
    sleep: Callable[[float], object],
) -> None:
    """Let ``read`` take what is at an address, again after transient errors; see ``fetch``."""
    if length is not None and length > most:
        raise _too_many(length, most)
    chunks = _contained(uri, start, length, most) or _chunks(uri, start, length, most)
    for attempt in range(attempts):
        try:
            read(chunks)
            return
        except ImageError:
            raise
        except Exception as error:  # each driver has its own exceptions
            _refuse_credentials(uri, error)
            explained = _explain_io(error)
            if explained.code != "unavailable" or isinstance(error, _Stalled) or attempt == attempts - 1:
                raise explained from error
        delay = wait * 2**attempt
        sleep(delay + random.uniform(0, delay / 2))
    raise AssertionError("attempts must be positive")


class _Stalled(TimeoutError):
    """Nothing arrived for too long."""


def _contained(uri: str, start: int, length: int | None, most: int) -> Callable[[], Iterator[bytes]] | None:
    """As ``_chunks``, for what is inside a file; None if the address is that of a file."""
    held = inside(uri)
    if held is None:
        return None
    if held.kind == "parquet":

        def cell() -> Iterator[bytes]:
            data = read_cell(held.file, held.inside)
            yield data[start : None if length is None else start + length]

        return cell

    def member() -> Iterator[bytes]:
        if length is not None:
            first, size = start, length
        else:
            first, size = member_range(held.file, held.inside)
            if size > most:
                raise _too_many(size, most)
            first, size = first + start, max(0, size - start)
        yield from _chunks(held.file, first, size, most)()

    return member


def _chunks(uri: str, start: int, length: int | None, most: int) -> Callable[[], Iterator[bytes]]:
    """A function that reads the bytes piece by piece, from their beginning at each call."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", uri) is None:
        return functools.partial(_local_chunks, uri, start, length, most)
    from fsspec.core import url_to_fs

    from pipeline.files.storage import canonical_uri, is_remote

    try:
        place = canonical_uri(uri)
        if not is_remote(place):  # file://
            return functools.partial(_local_chunks, place, start, length, most)
        filesystem, path = url_to_fs(place, **driver_options(place))
    except Exception as error:  # a password, an unknown scheme, a missing driver, a malformed address
        raise ImageError("unsupported_uri", _text(error)) from error
    if place.startswith(("http://", "https://")) and start == 0 and length is None:
        return functools.partial(_streamed_chunks, filesystem, path)
    return functools.partial(_ranged_chunks, filesystem, path, start, length)


def _local_chunks(path: str, start: int, length: int | None, most: int) -> Iterator[bytes]:
    # Asked first: opening a pipe waits for a writer, and some devices act when they are opened.
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ImageError("not_a_file", f"the path is {kinds.get(stat.S_IFMT(status.st_mode), 'a device')}")
    left = max(0, status.st_size - start) if length is None else length
    if left > most:
        raise _too_many(left, most)
    with open(path, "rb") as file:
        file.seek(start)
        while length is None or left > 0:
            # One more than there should be, so that one call shows the end. Files in /proc have no size, and
            # others grow.
            want = min(PIECE_BYTES, left + (length is None)) if left > 0 else PIECE_BYTES
            piece = file.read(want)
            yield piece
            left -= len(piece)
            if len(piece) < want:
                return


def _streamed_chunks(filesystem: Any, path: str) -> Iterator[bytes]:
    """The answer of a web server, which may be without length, or without end."""
    # With a block size of 0 fsspec streams; with a size it does not ask for it.
    with filesystem.open(path, block_size=0, size=1) as file:
        while piece := file.read(PIECE_BYTES):
            yield piece


def _ranged_chunks(filesystem: Any, path: str, start: int, length: int | None) -> Iterator[bytes]:
    """An object in pieces, so that neither a large one nor a slow one goes unnoticed."""
    end = None if length is None else start + length
    while end is None or start < end:
        want = PIECE_BYTES if end is None else min(PIECE_BYTES, end - start)
        try:
            piece = bytes(filesystem.cat_file(path, start=start, end=start + want))
        except Exception as error:
            if _PAST_END.search(_text(error)):  # of an empty object, or of one that fills the last piece
                return
            raise
        yield piece
        if len(piece) != want:
            return
        start += want


def _gather(chunks: _Chunks, most: int, patience: float, take: Callable[[bytes], object]) -> None:
    """Read all pieces in a thread, which is left behind if nothing arrives for ``patience`` seconds.

    Nothing else ends a read from a network share that is gone.
    """
    arrived: queue.Queue[bytes | Exception | None] = queue.Queue(_PIECES_AHEAD)
    abandoned = threading.Event()

    def put(item: bytes | Exception | None) -> None:
        while not abandoned.is_set():
            with contextlib.suppress(queue.Full):
                arrived.put(item, timeout=1)
                return

    def read() -> None:
        size = 0
        try:
            for piece in chunks():
                size += len(piece)
                if size > most:
                    raise _too_many(size, most)
                if abandoned.is_set():
                    return
                put(piece)
            put(None)
        except Exception as error:
            put(error)

    threading.Thread(target=read, name="fetch", daemon=True).start()
    try:
        while True:
            try:
                item = arrived.get(timeout=patience)
            except queue.Empty:
                raise _Stalled(f"nothing arrived for {patience:g} s") from None
            if item is None:
                return
            if isinstance(item, Exception):
                raise item
            take(item)
    finally:
        abandoned.set()


def _too_many(size: int, most: int) -> ImageError:
    return ImageError("too_many_bytes", f"{size:,} bytes or more; the limit is {most:,}")


def _refuse_credentials(uri: str, error: Exception) -> None:
    """Stop at credentials that have expired or name no server: every other image would fail alike."""
    if not uri.lower().startswith(("http://", "https://")) and _CREDENTIALS.search(
        f"{error} {error.__cause__ or ''}"
    ):
        from pipeline.files.faults import unreachable

        raise unreachable(without_signature(uri), error) from error


def _explain_io(error: Exception) -> ImageError:
    """Translate an exception of a file system. Errors not known to be permanent count as transient."""
    text = _text(error)
    number, status = getattr(error, "errno", None), getattr(error, "status", None)
    if isinstance(error, FileNotFoundError | NotADirectoryError) or status in (404, 410):
        return ImageError("not_found", text)
    if isinstance(error, PermissionError) or status in (401, 403) or "Credential" in type(error).__name__:
        return ImageError("permission", text)
    lasting = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EIO, errno.EISDIR)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 425, 429)
    if isinstance(error, ValueError | NotImplementedError) or number in lasting or refused:
        return ImageError("unreadable", text)
    return ImageError("unavailable", text)


def _text(error: Exception) -> str:
    return redact(f"{type(error).__name__}: {error}", assignments=False)
