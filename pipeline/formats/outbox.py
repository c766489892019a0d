"""A storage that writes in the background and remembers what it wrote: for many small files."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import IO, Any
from zlib import crc32

from pipeline.files.storage import Storage

WRITERS = 16
"""Making sure of a file costs a disk milliseconds, and an object store a round trip; many side by side cost
hardly more than one."""
SMALL = 64 << 10
"""Bytes of a file that a disk is not made sure of at once: that takes longer than to write it."""
FILES_AT_ONCE = 16
"""Small files that a thread is woken for."""
MOST_WAITING = 256
MOST_BYTES = 64 << 20


class Writes:
    """What is being written; leaving it waits for all of it, and raises what went wrong.

    Small files on a disk are written without making sure of it, and their checksums kept, so that it can be
    found out later whether they are there.

    Args:
        storage: where to.
        sync: make sure of small files too.

    Attributes:
        names: of all files, relative to the storage.
        sums: CRC-32 of each file that the disk was not made sure of, None for the others.
    """

    def __init__(self, storage: Storage, *, sync: bool) -> None:
        self.names: list[str] = []
        self.sums: list[int | None] = []
        self._largest = SMALL if storage.is_local and not sync else -1
        self._storage = storage
        self._pool = ThreadPoolExecutor(WRITERS)
        self._small: list[tuple[str, bytes]] = []
        self._waiting: deque[tuple[Future[None], int, int]] = deque()
        self._files = self._bytes = 0

    def write(self, name: str, data: bytes) -> None:
        """Write a file soon; waits while too much is waiting."""
        if len(data) > self._largest:
            self.add(name)
            self._submit(1, len(data), self._storage.write_bytes, name, data)
            return
        self.add(name, crc32(data))
        self._small.append((name, data))
        if len(self._small) >= FILES_AT_ONCE:
            self._submit_small()

    def add(self, name: str, checksum: int | None = None) -> None:
        """Remember a file."""
        self.names.append(name)
        self.sums.append(checksum)

    def _submit_small(self) -> None:
        files, self._small = self._small, []
        self._submit(len(files), SMALL * len(files), self._storage.write_unsynced, files)

    def _submit(self, files: int, size: int, write: Callable[..., None], *arguments: Any) -> None:
        while self._waiting and (self._files >= MOST_WAITING or self._bytes > MOST_BYTES):
            self._settle_first()
        self._waiting.append((self._pool.submit(write, *arguments), files, size))
        self._files += files
        self._bytes += size

    def _settle_first(self) -> None:
        future, files, size = self._waiting.popleft()
        self._files -= files
        self._bytes -= size
        future.result()

    def __enter__(self) -> Writes:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None and self._small:
                self._submit_small()
            while error is None and self._waiting:
                self._settle_first()
        finally:
            self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Outbox(Storage):
    """A storage whose ``write_bytes`` returns before the file is there; see ``Writes``.

    Attributes:
        writes: shared with the storages of its folders.
        folder: of this storage within that of ``writes``.
    """

    writes: Writes
    folder: str = ""

    @classmethod
    def of(cls, storage: Storage, writes: Writes) -> Outbox:
        """An outbox of a storage."""
        return cls(storage.uri, storage.fs, storage.root, writes)

    def child(self, name: str) -> Outbox:
        """See ``Storage``."""
        return Outbox(self.uri_of(name), self.fs, self.path(name), self.writes, f"{self.folder}{name}/")

    def write_bytes(self, name: str, data: bytes) -> None:
        """See the class."""
        self.path(name)  # refuses names that lead out, at once
        self.writes.write(f"{self.folder}{name}", data)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[IO[bytes]]:
        """See ``Storage``; the file is there at the end."""
        self.writes.add(f"{self.folder}{name}")
        with super().new_file(name) as file:
            yield file
