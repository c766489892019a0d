"""The maps of a large image, written and read in strips of rows: no map is ever held whole.

A map is stored like any other, as a grey PNG whose rows are filtered by their difference from the row above.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from models.errors import Damaged
from pipeline.table.statistics import Confidence, Labels, MapStatistics

MOST_BYTES = 1 << 30
"""Of a map as PNG. Arrow holds 2 GiB of them in one column of a batch."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
STRIP_PIXELS = 1 << 22  # worked on at a time
_UP = 2  # the filter of a row: its difference from the row above


class MapTooLarge(Exception):
    """A map whose PNG has more than ``MOST_BYTES``."""


class PngWriter:
    """Encodes a grey PNG from strips of rows.

    Args:
        height, width: of the whole.
        dtype: uint8 or uint16.
        runs: whether its values come in runs, as class ids do.
    """

    def __init__(self, height: int, width: int, dtype: npt.DTypeLike, *, runs: bool) -> None:
        self._shape, self._dtype = (height, width), np.dtype(dtype)
        header = struct.pack(">IIBBBBB", width, height, 8 * self._dtype.itemsize, 0, 0, 0, 0)
        self._file = io.BytesIO()  # which gives away what it holds: no copy of the whole
        self._file.write(_SIGNATURE + _chunk(b"IHDR", header))
        strategy = zlib.Z_RLE if runs else zlib.Z_DEFAULT_STRATEGY
        self._packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, strategy)
        self._above = np.zeros(width * self._dtype.itemsize, np.uint8)
        self._rows = 0

    def add(self, rows: npt.NDArray[Any]) -> None:
        """Encode the next rows (rows, W).

        Raises:
            MapTooLarge: see there.
        """
        assert rows.dtype == self._dtype and rows.shape[1] == self._shape[1], (rows.dtype, rows.shape)
        data = np.ascontiguousarray(rows.astype(self._dtype.newbyteorder(">"), copy=False)).view(np.uint8)
        filtered = np.empty((len(rows), 1 + data.shape[1]), np.uint8)
        filtered[:, 0] = _UP
        filtered[0, 1:] = data[0] - self._above
        np.subtract(data[1:], data[:-1], out=filtered[1:, 1:])
        self._above = data[-1].copy()
        self._rows += len(rows)
        self._put(self._packer.compress(filtered.data))

    def finish(self) -> bytes:
        """The PNG, once all rows are there."""
        assert self._rows == self._shape[0], (self._rows, self._shape)
        self._put(self._packer.flush())
        self._file.write(_chunk(b"IEND", b""))
        with self._file:
            return self._file.getvalue()

    def _put(self, data: bytes) -> None:
        if data:
            self._file.write(_chunk(b"IDAT", data))
        if self._file.tell() > MOST_BYTES:
            raise MapTooLarge(f"its map takes more than {MOST_BYTES >> 30} GiB as PNG")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


class MapWriter:
    """Encodes and counts both maps of an image from strips of rows.

    Args:
        height, width: of the image.
        dtype: of the labels.
        ignore_index: id of pixels without a label.
    """

    def __init__(self, height: int, width: int, dtype: npt.DTypeLike, *, ignore_index: int) -> None:
        self._mask = PngWriter(height, width, dtype, runs=True)
        self._confidence = PngWriter(height, width, np.uint8, runs=False)
        self._statistics = MapStatistics(ignore_index)
        self._top = 0

    def add(self, labels: Labels, confidence: Confidence) -> None:
        """Take the next rows.

        Raises:
            MapTooLarge: see there.
        """
        step = max(1, STRIP_PIXELS // labels.shape[1])
        for start in range(0, len(labels), step):
            rows = slice(start, start + step)
            self._mask.add(labels[rows])
            self._confidence.add(confidence[rows])
            self._statistics.add(labels[rows], confidence[rows], self._top)
            self._top += len(labels[rows])

    def finish(self) -> dict[str, Any]:
        """``mask`` and ``confidence`` as PNG, ``segments`` as a row has them, and ``softmin``."""
        return {
            "mask": self._mask.finish(),
            "confidence": self._confidence.finish(),
            "segments": self._statistics.segments(),
            "softmin": self._statistics.softmin(),
        }


def png_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a PNG by its header; None if it has none."""
    if not data.startswith(_SIGNATURE) or len(data) < 33:
        return None
    width, height = struct.unpack_from(">II", data, 16)
    return height, width


def read_strips(data: bytes) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Read what ``PngWriter`` wrote, or OpenCV as ``pipeline.table.labels.encode_mask`` calls it.

    Args:
        data: the PNG.

    Yields:
        The first row, and rows as uint8 or uint16 (rows, W), from top to bottom.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    size = png_size(data)
    if size is None or data[25:29] != b"\0\0\0\0" or data[24] not in (8, 16):
        raise _damaged("its header is none of a grey PNG of 8 or 16 bits")
    (height, width), bits = size, data[24]
    row_bytes = width * bits // 8
    above = np.zeros(row_bytes, np.uint8)
    step = max(1, STRIP_PIXELS // width)
    top, packed = 0, _packed(data)
    unpacker = zlib.decompressobj()
    try:
        while top < height:
            rows = min(step, height - top)
            raw = _exactly(rows * (1 + row_bytes), unpacker, packed)
            filtered = np.frombuffer(raw, np.uint8).reshape(rows, 1 + row_bytes)
            if not np.isin(filtered[:, 0], (0, _UP)).all():
                raise _damaged("its rows are filtered in another way")
            lines = np.empty((rows, row_bytes), np.uint8)
            for index, line in enumerate(filtered):
                np.add(line[1:], above if line[0] else 0, out=lines[index])
                above = lines[index]
            yield top, lines if bits == 8 else lines.view(">u2").astype(np.uint16)
            above = lines[-1].copy()
            top += rows
    except zlib.error as error:
        raise _damaged(str(error)) from error


def sample(data: bytes, most: int) -> npt.NDArray[Any]:
    """Every n-th row and column of a map, so that at most about ``most`` pixels come out.

    Raises:
        MaskMillError: ``table_damaged``.
    """
    height, width = png_size(data) or (1, 1)
    step = max(1, math.ceil(math.sqrt(height * width / most)))
    parts = [rows[-top % step :: step, ::step].copy() for top, rows in read_strips(data)]
    return np.concatenate(parts)


def _exactly(size: int, unpacker: Any, packed: Iterator[bytes]) -> bytearray:
    """The next ``size`` bytes; a bomb is unpacked no further."""
    out = bytearray()
    while len(out) < size:
        waiting = unpacker.unconsumed_tail or next(packed, b"")
        if not waiting:
            raise _damaged("it ends before its last row")
        out += unpacker.decompress(waiting, size - len(out))
    return out


def _packed(data: bytes) -> Iterator[bytes]:
    """The contents of the IDAT chunks."""
    at = 8
    while at + 8 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        kind = data[at + 4 : at + 8]
        content = memoryview(data)[at + 8 : at + 8 + length]
        if kind == b"IEND":
            return
        if len(content) < length or data[at + 8 + length : at + 12 + length] != struct.pack(
            ">I", zlib.crc32(content, zlib.crc32(kind))
        ):
            raise _damaged("a chunk is cut off or changed")
        if kind == b"IDAT":
            for start in range(0, length, 1 << 20):
                yield bytes(content[start : start + (1 << 20)])
        at += 12 + length


def _damaged(why: str) -> Damaged:
    return Damaged(
        "table_damaged", f"a map cannot be decoded: {why}", "Label the image again into a new output."
    )
