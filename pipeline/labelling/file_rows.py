"""How many rows a file of a large run gets."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pyarrow as pa

from pipeline.corpus.corpus import ADDRESS
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError, pixels

MOST_ROWS: Final = 1024
"""So many are labelled again after a kill, beside those that workers have."""
MOST_PIXELS: Final = 1 << 28
"""Pixels of the images of a file: its rows are in memory together, and take up to a byte for each."""
_LOOKED_AT = 64
_AT_ONCE = 8
_HEAD = 1 << 18
_MOST_BYTES = 64 << 20


def rows_per_file(todo: pa.Table) -> int:
    """``MOST_ROWS``, or as many as have ``MOST_PIXELS`` by the sizes of some of the images.

    Args:
        todo: manifest of the images.
    """
    step = max(1, todo.num_rows // _LOOKED_AT)
    entries = todo.take(pa.array(range(0, todo.num_rows, step)[:_LOOKED_AT])).to_pylist()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        sizes = [size for size in pool.map(_pixels, entries) if size]
    if not sizes:
        return MOST_ROWS
    return max(1, min(MOST_ROWS, MOST_PIXELS * len(sizes) // sum(sizes)))


def _pixels(entry: dict[str, Any]) -> int | None:
    """Pixels of an image; None if it cannot be read."""
    width, height = entry.get("width"), entry.get("height")
    if width and height:
        return int(width * height)
    address, start, length = entry.get(ADDRESS) or entry["uri"], entry.get("offset") or 0, entry.get("length")
    head = _HEAD if length is None else min(length, _HEAD)
    try:
        # Most formats begin with the size; a TIFF may end with it.
        found = pixels(fetch(address, start=start, length=head, attempts=2))
        return found or pixels(fetch(address, start=start, length=length, max_bytes=_MOST_BYTES, attempts=2))
    except ImageError as error:
        return MOST_PIXELS if error.code == "too_many_bytes" else None
