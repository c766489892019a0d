"""The first stage: an address becomes a decoded, resized image."""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from pipeline.corpus.manifest import ADDRESS
from pipeline.files import corruptions, images
from pipeline.files.fetch import fetch, file_version, local_path, max_bytes
from pipeline.files.images import ImageSettings
from pipeline.files.recognition import looks_like_image
from pipeline.labelling.attempts import (
    CRASHED,
    IMAGE_DEATHS,
    PART_DEATHS,
    AttemptBook,
    Attempts,
    crashed_row,
    part_key,
)
from pipeline.labelling.stages.columns import CHUNK_BYTES, DECODED

_T = TypeVar("_T")
_R = TypeVar("_R", bound=Sized)
_FETCHES_AHEAD = 16
_AHEAD_BYTES = 256 << 20
LARGE_FILE = 64 << 20
"""Bytes; of a local file above, the header is read before the rest."""
_HEAD = 64


@dataclass(frozen=True)
class _Fetched:
    """A file's content, or why there is none; ``version`` as ``file_version`` told it before.

    Attributes:
        large: it is to be read in windows, not here.
    """

    version: str | None
    data: bytes = b""
    error: images.ImageError | None = None
    large: bool = False

    def __len__(self) -> int:
        return len(self.data)


class Decode:
    """(id, uri) → decoded, resized images; an image that fails becomes a row with an error code."""

    def __init__(self, settings: ImageSettings, attempts: Attempts | None = None) -> None:
        self._settings = settings
        self._attempts = attempts or AttemptBook()

    def __call__(self, table: pa.Table) -> Iterator[pa.Table]:
        images.use_one_thread()
        rows: list[dict[str, Any]] = []
        size = 0
        entries = table.to_pylist()
        key = part_key("decode", table["id"].to_numpy())
        careful, crashed = self._attempts.begin(key) >= PART_DEATHS, False
        with ThreadPoolExecutor(_FETCHES_AHEAD) as pool:
            fetched: Iterator[Callable[[], _Fetched]] = (
                (functools.partial(self._fetch, entry) for entry in entries)
                if careful
                else (future.result for future in prefetch(pool, self._fetch, entries, _FETCHES_AHEAD))
            )
            for entry, fetch in zip(entries, fetched, strict=True):
                start = time.perf_counter()
                row = self._alone(entry, fetch) if careful else self._row(entry, fetch)
                crashed |= row["status"] == CRASHED
                row["decode_s"] = time.perf_counter() - start
                row["fetch_s"] = row["fetch_s"] or 0.0
                rows.append(row)
                size += len(row["pixels"] or b"")
                if size >= CHUNK_BYTES:
                    yield pa.Table.from_pylist(rows, schema=DECODED)
                    rows, size = [], 0
        if not crashed:
            self._attempts.end(key)
        if rows:
            yield pa.Table.from_pylist(rows, schema=DECODED)

    def _fetch(self, entry: dict[str, Any]) -> _Fetched:
        address = entry.get(ADDRESS) or entry["uri"]
        # The version first: of a file that changes meanwhile it is the older one, and the change is found
        # later.
        version = file_version(address)
        start, length = entry.get("offset") or 0, entry.get("length")
        most = max_bytes(self._settings.max_pixels)
        try:
            if self._windows and self._is_large_file(address, start, length):
                return _Fetched(version, large=True)
            data = fetch(address, start=start, length=length, max_bytes=most)
        except images.ImageError as error:
            if self._windows and error.code == "too_many_bytes" and _begins_as_image(address, start):
                return _Fetched(version, large=True)
            return _Fetched(version, error=error)
        return _Fetched(version, data)

    @property
    def _windows(self) -> bool:
        """Whether large images are labelled in windows. Corruptions are of whole images."""
        return self._settings.large_window > 0 and not self._settings.corruption

    def _is_large_file(self, address: str, start: int, length: int | None) -> bool:
        """Whether a local file holds an image above the limit, of which then only the header is read."""
        path = local_path(address) if start == 0 and length is None else None
        try:
            if path is None or not path.is_file() or path.stat().st_size < LARGE_FILE:
                return False
        except OSError:  # fetch tells
            return False
        return images.exceeds(path, self._settings.max_pixels)

    def _alone(self, entry: dict[str, Any], fetch: Callable[[], _Fetched]) -> dict[str, Any]:
        """The row of an image of a part that killed processes."""
        key = f"decode {entry['id']}"
        if self._attempts.begin(key) >= IMAGE_DEATHS:
            known = {"id": entry["id"], "uri": entry["uri"]}
            return dict.fromkeys(DECODED.names) | known | crashed_row("decode")
        row = self._row(entry, fetch)
        self._attempts.end(key)
        return row

    def _row(self, entry: dict[str, Any], fetch: Callable[[], _Fetched]) -> dict[str, Any]:
        settings = self._settings
        row_id = entry["id"]
        row: dict[str, Any] = dict.fromkeys(DECODED.names) | {"id": row_id, "uri": entry["uri"]}
        try:
            start = time.perf_counter()
            fetched = fetch()
            row["fetch_s"] = time.perf_counter() - start
            row["version"] = fetched.version
            if fetched.error is not None:
                raise fetched.error
            if fetched.large:
                return row | _large(entry)
            row["sha256"] = hashlib.sha256(fetched.data).digest()
            image = images.decode(fetched.data, max_pixels=settings.max_pixels)
        except images.ImageError as error:
            if (
                error.code == "too_large"
                and self._windows
                and images.exceeds(fetched.data, settings.max_pixels)
            ):
                return row | _large(entry)
            return row | {"status": error.code, "error": error.message}
        if settings.corruption:
            # Seeded by the image's id, so that its noise is reproducible.
            name, level = corruptions.parse(settings.corruption)
            image = corruptions.corrupt(image, name, level, seed=row_id % 2**64)  # ids are signed
        height, width = image.shape[:2]
        resized = images.fit(image, settings)
        return row | {
            "status": "ok",
            "height": height,
            "width": width,
            "pixels": np.ascontiguousarray(resized).tobytes(),
            "network_height": resized.shape[0],
            "network_width": resized.shape[1],
        }


def _begins_as_image(address: str, start: int) -> bool:
    try:
        return looks_like_image(fetch(address, start=start, length=_HEAD, max_bytes=_HEAD))
    except images.ImageError:
        return False


def _large(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        "status": "ok",
        "address": entry.get(ADDRESS) or entry["uri"],
        "offset": entry.get("offset"),
        "length": entry.get("length"),
    }


def prefetch(
    pool: ThreadPoolExecutor,
    work: Callable[[_T], _R],
    items: Iterable[_T],
    depth: int,
    most_bytes: int = _AHEAD_BYTES,
) -> Iterator[Future[_R]]:
    """Futures of ``work`` in order, at most ``depth`` of them pending.

    Fewer are pending once a result was so large that ``depth`` of them would have more than ``most_bytes``.
    """
    waiting: deque[Future[_R]] = deque()
    source = iter(items)
    largest = 1
    while True:
        ahead = max(1, min(depth, most_bytes // largest))
        for item in itertools.islice(source, max(0, ahead - len(waiting))):
            waiting.append(pool.submit(work, item))
        if not waiting:
            return
        future = waiting.popleft()
        yield future
        if future.exception() is None:
            largest = max(largest, len(future.result()))
