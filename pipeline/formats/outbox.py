"""A storage that writes in the background and remembers what it wrote: for many small files."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO

from pipeline.files.storage import Storage

WRITERS = 16
"""A file costs a disk milliseconds to make sure of, and an object store a round trip; many side by side cost
hardly more than one."""
MOST_WAITING = 256
MOST_BYTES = 64 << 20


class Writes:
    """What is being written; leaving it waits for all of it, and raises what went wrong."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self._pool = ThreadPoolExecutor(WRITERS)
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._bytes = 0

    def write(self, storage: Storage, name: str, data: bytes) -> None:
        """Write a file soon; waits while too much is waiting."""
        while self._waiting and (len(self._waiting) >= MOST_WAITING or self._bytes > MOST_BYTES):
            self._settle_first()
        self._waiting.append((self._pool.submit(storage.write_bytes, name, data), len(data)))
        self._bytes += len(data)

    def _settle_first(self) -> None:
        future, size = self._waiting.popleft()
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
            while error is None and self._waiting:
                self._settle_first()
        finally:
            self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class Outbox(Storage):
    """A storage whose ``write_bytes`` returns before the file is there; see ``Writes``.

    Attributes:
        writes: shared with the storages of its folders.
        folder: of this storage within the first one.
    """

    writes: Writes = field(default_factory=Writes)
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
        self.writes.names.append(f"{self.folder}{name}")
        self.writes.write(Storage(self.uri, self.fs, self.root), name, data)

    @contextlib.contextmanager
    def new_file(self, name: str) -> Iterator[IO[bytes]]:
        """See ``Storage``; the file is there at the end."""
        self.writes.names.append(f"{self.folder}{name}")
        with super().new_file(name) as file:
            yield file
