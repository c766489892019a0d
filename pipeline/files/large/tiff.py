"""Regions of a TIFF (tiled or in strips, BigTIFF, COG), a tile at a time.

Each tile or strip is decoded as a small TIFF of its own: the image's own tags, and that one tile. So every
kind of sample and of compression that ``pipeline.files.images`` reads is read here, to the same pixels, and
nothing else.
"""

from __future__ import annotations

import struct
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pipeline.files import images
from pipeline.files.images import ImageError
from pipeline.files.large.picture import Picture

CACHE_BYTES = 128 << 20
"""Of decoded tiles: those of a row of windows, mostly."""

BAND_BYTES = 512 << 20
"""Of decoded strips, at most: strips are as wide as the image, and a row of windows needs all of them."""

TILE_PIXELS = 1 << 26
"""A tile or strip of more pixels is not read."""

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SUBFILE, _ORIENTATION, _SAMPLES, _ROWS_PER_STRIP, _PLANAR = 254, 274, 277, 278, 284
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = (273, 279, 324, 325)
_TILE_WIDTH, _TILE_LENGTH = 322, 323
_OLD_JPEG = 6
#: Tags that say how samples are stored: fill order, T4 and T6 options, predictor, colour map, ink set, extra
#: samples, sample format, JPEG tables, sub-sampling and its position.
_ABOUT_SAMPLES: tuple[int, ...] = (_BITS, _COMPRESSION, _PHOTOMETRIC, 266, _SAMPLES, _PLANAR)
_ABOUT_SAMPLES += (292, 293, 317, 320, 332, 338, 339, 347, 530, 531)
_SHORT, _LONG, _UNDEFINED = 3, 4, 7
_CODES = {1: "B", _SHORT: "H", _LONG: "I", 6: "b", _UNDEFINED: "B", 8: "h", 9: "i"}


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins so is a TIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class TiffPicture(Picture):
    """See the module.

    Args:
        path: of a local file.
        band: rows of the image, at most, that are read together (the height of a window).

    Raises:
        ImageError: ``unreadable``, ``unsupported_format``, ``truncated`` or ``too_large``.
    """

    def __init__(self, path: Path, *, band: int) -> None:
        self._file = path.open("rb")
        self._size = path.stat().st_size
        try:
            self._tags = tags = self._read_tags()
            stored = int(tags[_LENGTH]), int(tags[_WIDTH])
            super().__init__(stored, int(tags.get(_ORIENTATION, 1)))
            self._lay_out(band)
        except ImageError:
            self.close()
            raise
        except Exception as error:  # a damaged directory, in any of many ways
            self.close()
            raise ImageError("unreadable", f"{type(error).__name__}: {error}") from error
        self._cache: OrderedDict[tuple[int, int], NDArray[np.uint8]] = OrderedDict()
        self._cached = 0
        try:
            self._range = self._find_range()
        except ImageError:
            self.close()
            raise

    def close(self) -> None:
        """See ``Picture``."""
        self._file.close()

    @property
    def cached_bytes(self) -> int:
        """Of decoded tiles that are held."""
        return self._cached

    def read_stored(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """See ``Picture``."""
        out = np.empty((height, width, 3), np.uint8)
        for row in range(top // self._tile[0], -(-(top + height) // self._tile[0])):
            for column in range(left // self._tile[1], -(-(left + width) // self._tile[1])):
                tile = self._decoded(row, column)
                y, x = row * self._tile[0], column * self._tile[1]
                y0, y1 = max(top, y), min(top + height, y + len(tile))
                x0, x1 = max(left, x), min(left + width, x + tile.shape[1])
                out[y0 - top : y1 - top, x0 - left : x1 - left] = tile[y0 - y : y1 - y, x0 - x : x1 - x]
        return out

    def _read_tags(self) -> ImageFileDirectory_v2:
        """The first directory. Pillow would refuse to open an image of so many pixels."""
        head = self._file.read(16)
        self._order = "<" if head[:2] == b"II" else ">"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = ImageFileDirectory_v2(head if b"+" in head[2:4] else head[:8])
            self._file.seek(tags.next)
            tags.load(self._file)
            for tag in list(tags):
                tags[tag]  # unpacked, with the warnings of today
        if int(tags.get(_SUBFILE, 0)) & 1:
            raise ImageError("unsupported_format", "its first image is a thumbnail")
        if tags.get(_COMPRESSION) == _OLD_JPEG:
            raise ImageError("unsupported_format", "a TIFF with JPEG compression of the old kind")
        return tags

    def _lay_out(self, band: int) -> None:
        """Where tiles are, and how many."""
        tags, (height, width) = self._tags, self._stored
        self._tiled = _TILES in tags
        if self._tiled:
            self._tile = int(tags[_TILE_LENGTH]), int(tags[_TILE_WIDTH])
        else:
            self._tile = min(height, int(tags.get(_ROWS_PER_STRIP, height))), width
        if min(*self._tile, height, width) < 1:
            raise ImageError("unreadable", f"tiles of {self._tile[1]} x {self._tile[0]} pixels")
        self._across, self._down = -(-width // self._tile[1]), -(-height // self._tile[0])
        remedy = "write it anew in tiles (gdal_translate -of COG, or vips tiffsave --tile)"
        if self._tile[0] * self._tile[1] > TILE_PIXELS:
            kind = "tile" if self._tiled else "strip"
            raise ImageError(
                "too_large", f"one {kind} has {self._tile[0] * self._tile[1]:,} pixels: {remedy}"
            )
        self._most_bytes = CACHE_BYTES
        if not self._tiled:
            needed = (band + 2 * self._tile[0]) * width * 3
            if needed > BAND_BYTES:
                raise ImageError("too_large", f"its strips are {width:,} pixels wide: {remedy}")
            self._most_bytes = max(CACHE_BYTES, needed)
        self._planes = int(tags.get(_SAMPLES, 1)) if int(tags.get(_PLANAR, 1)) == 2 else 1
        places = (_TILES, _TILE_BYTES) if self._tiled else (_STRIPS, _STRIP_BYTES)
        self._offsets, self._lengths = (np.atleast_1d(np.asarray(tags[tag], np.uint64)) for tag in places)
        count = self._across * self._down * self._planes
        if min(len(self._offsets), len(self._lengths)) < count:
            raise ImageError("unreadable", f"{len(self._offsets):,} tiles of {count:,} have a place")

    def _decoded(self, row: int, column: int) -> NDArray[np.uint8]:
        key = row, column
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        data = self._small_tiff(row, column)
        if data is None:
            tile = np.zeros((*self._shape(row), 3), np.uint8)
        else:
            try:
                tile = images.decode(data, max_pixels=TILE_PIXELS, value_range=self._range)
            except ImageError as error:
                raise self._told(row, column, error) from error
            if tile.shape[:2] != self._shape(row):
                raise ImageError("unreadable", f"a tile of {tile.shape[1]} x {tile.shape[0]} pixels")
        self._cache[key] = tile
        self._cached += tile.nbytes
        while self._cached > self._most_bytes and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return tile

    def _told(self, row: int, column: int, error: ImageError) -> ImageError:
        code = error.code if error.code in ("truncated", "unsupported_format") else "unreadable"
        place = f"row {row * self._tile[0]:,}, column {column * self._tile[1]:,}"
        return ImageError(code, f"the tile at {place}: {error.message}")

    def _shape(self, row: int) -> tuple[int, int]:
        """Of a tile, which is whole even at the image's end; the last strip is not."""
        if self._tiled:
            return self._tile
        return min(self._tile[0], self._stored[0] - row * self._tile[0]), self._tile[1]

    def _small_tiff(self, row: int, column: int) -> bytes | None:
        """A tile or strip as a file of its own; None if the file has left it out, which means zeros."""
        plane = self._across * self._down
        indices = [row * self._across + column + number * plane for number in range(self._planes)]
        if not any(int(self._lengths[index]) for index in indices):
            return None
        chunks = [self._chunk(row, column, index) for index in indices]
        height, width = self._shape(row)
        entries: dict[int, tuple[int, tuple[int, ...]]] = {
            _WIDTH: (_LONG, (width,)),
            _LENGTH: (_LONG, (height,)),
        }
        for tag in _ABOUT_SAMPLES:
            if tag in self._tags:
                entry = _entry(self._tags.tagtype[tag], self._tags[tag])
                if entry is not None:
                    entries[tag] = entry
        lengths = tuple(len(chunk) for chunk in chunks)
        if self._tiled:
            entries |= {_TILE_WIDTH: (_LONG, (width,)), _TILE_LENGTH: (_LONG, (height,))}
        else:
            entries[_ROWS_PER_STRIP] = (_LONG, (height,))
        places, sizes = (_TILES, _TILE_BYTES) if self._tiled else (_STRIPS, _STRIP_BYTES)
        entries |= {places: (_LONG, (0,) * len(chunks)), sizes: (_LONG, lengths)}
        begin = len(_directory(entries, self._order))
        starts = np.cumsum([begin, *lengths[:-1]]).tolist()
        entries[places] = (_LONG, tuple(starts))
        return b"".join([_directory(entries, self._order), *chunks])

    def _chunk(self, row: int, column: int, index: int) -> bytes:
        start, length = int(self._offsets[index]), int(self._lengths[index])
        if start + length > self._size:
            raise self._told(row, column, ImageError("truncated", "the file ends before it does"))
        if length > 16 * TILE_PIXELS:
            raise self._told(row, column, ImageError("unreadable", f"{length:,} bytes"))
        self._file.seek(start)
        return self._file.read(length)

    def _find_range(self) -> tuple[float, float] | None:
        """The lowest and the highest value of all tiles, if they are of a kind that is stretched by them."""
        low, high = np.inf, -np.inf
        for row, column in self._places():
            data = self._small_tiff(row, column)
            if data is None:
                low, high = min(low, 0.0), max(high, 0.0)
                continue
            height = min(self._tile[0], self._stored[0] - row * self._tile[0])
            width = min(self._tile[1], self._stored[1] - column * self._tile[1])
            try:
                found = images.value_extremes(data, height, width)
            except ImageError as error:
                raise self._told(row, column, error) from error
            if found is None:  # all tiles are of one kind
                return None
            low, high = min(low, found[0]), max(high, found[1])
        return low, high

    def _places(self) -> Iterator[tuple[int, int]]:
        for row in range(self._down):
            for column in range(self._across):
                yield row, column


def _entry(kind: int, value: Any) -> tuple[int, tuple[int, ...]] | None:
    """A tag's type and values; None for types that no tag about samples has."""
    if kind not in _CODES:
        return None
    if isinstance(value, bytes):
        return kind, tuple(value)
    return kind, tuple(int(each) for each in value) if isinstance(value, tuple) else (int(value),)


def _directory(entries: dict[int, tuple[int, tuple[int, ...]]], order: str) -> bytes:
    """A TIFF of 32 bits up to its samples: header, directory, and values that do not fit into it."""
    start = 8 + 2 + 12 * len(entries) + 4
    fields, outside = [], b""
    for tag, (kind, values) in sorted(entries.items()):
        data = struct.pack(f"{order}{len(values)}{_CODES[kind]}", *values)
        if len(data) > 4:
            place = struct.pack(f"{order}I", start + len(outside))
            outside += data + b"\0" * (len(data) % 2)
            data = place
        fields.append(struct.pack(f"{order}HHI", tag, kind, len(values)) + data.ljust(4, b"\0"))
    magic = b"II" if order == "<" else b"MM"
    head = magic + struct.pack(f"{order}HIH", 42, 8, len(fields))
    return head + b"".join(fields) + struct.pack(f"{order}I", 0) + outside
