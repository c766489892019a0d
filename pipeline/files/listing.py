"""Listing what is below a place, name by name: there may be more than fit into memory."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.files.storage import Storage, storage_errors

LISTERS = 16
"""Folders of an S3 bucket that are listed at once; a page of 1,000 names takes some 0.1 s."""
_LEVELS = 3
"""Levels of folders that are looked at to find so many."""
_PAGES_AHEAD = 64


def list_below(storage: Storage, *, in_order: bool = False) -> Iterator[str]:
    """Yield the relative names of all files below the root of a storage.

    On S3, folders are listed in parallel, page by page. Other storages list all at once, and sorted.

    Args:
        storage: what to list.
        in_order: of the names, also on S3, one page after the other.

    Raises:
        MaskMillError: ``storage_unreachable``.
    """
    if not storage.uri.startswith("s3://"):
        yield from storage.list(recursive=True)
        return
    bucket, _, root = storage.root.partition("/")
    prefix = f"{root}/" if root else ""
    found = False
    with storage_errors(storage.uri):
        pages = (
            (keys for keys, _ in _pages(storage, bucket, prefix))
            if in_order
            else _parallel(storage, bucket, prefix)
        )
        try:
            for keys in pages:
                found = found or bool(keys)
                # Consoles put an empty object "name/" in the place of a folder.
                yield from (key[len(prefix) :] for key in keys if not key.endswith("/"))
        except FileNotFoundError:  # there is no such bucket
            if found:
                raise


def _pages(
    storage: Storage, bucket: str, prefix: str, delimiter: str = ""
) -> Iterator[tuple[list[str], list[str]]]:
    """Yield pages of keys, and of folders if there is a delimiter."""
    more: dict[str, Any] = {}
    while True:
        page = storage.fs.call_s3(
            "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **more, **storage.fs.req_kw
        )
        yield (
            [each["Key"] for each in page.get("Contents", ())],
            [each["Prefix"] for each in page.get("CommonPrefixes", ())],
        )
        if not page.get("IsTruncated"):
            return
        more = {"ContinuationToken": page["NextContinuationToken"]}


def _parallel(storage: Storage, bucket: str, prefix: str) -> Iterator[list[str]]:
    """Yield pages of the keys below a prefix, in any order."""
    folders, level = [prefix], 0
    while folders and len(folders) < LISTERS and level < _LEVELS:
        below: list[str] = []
        for folder in folders:
            for keys, found in _pages(storage, bucket, folder, "/"):
                yield keys
                below += found
        folders, level = below, level + 1
    pages: queue.Queue[list[str]] = queue.Queue(_PAGES_AHEAD)
    ended = threading.Event()

    def list_folder(folder: str) -> None:
        for keys, _ in _pages(storage, bucket, folder):
            while not ended.is_set():
                with contextlib.suppress(queue.Full):
                    pages.put(keys, timeout=1)
                    break
            if ended.is_set():
                return

    with ThreadPoolExecutor(LISTERS) as pool:
        listing = [pool.submit(list_folder, folder) for folder in folders]
        try:
            while not (all(one.done() for one in listing) and pages.empty()):
                with contextlib.suppress(queue.Empty):
                    yield pages.get(timeout=0.05)
            for one in listing:
                one.result()
        finally:
            ended.set()
            for one in listing:
                one.cancel()
