"""Regions of a large JPEG or PNG, by libvips, which decodes them from top to bottom and keeps a strip.

The package ``pyvips`` is an extra: TIFFs, which most large images are, need none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.files.images import ImageError
from pipeline.files.large.picture import Picture

_PNG = b"\x89PNG\r\n\x1a\n"
_INTERLACE = 28  # the byte of a PNG that says it
_TURNED = (3, 4, 5, 6, 7, 8)  # orientations whose rows do not come from top to bottom


def refuse_whole(head: bytes) -> None:
    """Refuse what can only be decoded as a whole.

    Args:
        head: the file's beginning, with the frame header of a JPEG.

    Raises:
        ImageError: ``too_large``.
    """
    if head.startswith(_PNG) and head[_INTERLACE : _INTERLACE + 1] == b"\1":
        kind = "an interlaced PNG"
    elif _is_progressive(head):
        kind = "a progressive JPEG"
    else:
        return
    raise ImageError("too_large", f"{kind} has to be decoded whole; write it anew as a tiled TIFF")


def _is_progressive(head: bytes) -> bool:
    start = 2
    while head[:2] == b"\xff\xd8" and start + 4 <= len(head) and head[start] == 0xFF:
        marker = head[start + 1]
        if marker in (0xC2, 0xC6, 0xCA, 0xCE):
            return True
        if marker == 0xDA or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            return False
        start += 2 + int.from_bytes(head[start + 2 : start + 4], "big")
    return False


class VipsPicture(Picture):
    """See the module.

    Args:
        path: of a local file.

    Raises:
        ImageError: ``too_large`` without pyvips; ``unreadable`` or ``unsupported_format``.
    """

    def __init__(self, path: Path) -> None:
        try:
            import pyvips
        except (ImportError, OSError) as error:
            raise ImageError(
                "too_large",
                "JPEGs and PNGs of this size are read by libvips, which is not installed: pip install "
                '"pyvips[binary]", or write the image anew as a tiled TIFF',
            ) from error
        self._error: type[Exception] = pyvips.Error
        try:
            image = pyvips.Image.new_from_file(str(path), access="sequential", fail_on="truncated")
            orientation, self._turned = 1, False
            if "orientation" in image.get_fields():
                orientation = int(image.get("orientation"))
            if orientation in _TURNED:
                # Decoded once, into a temporary file.
                self._turned = True
                image = pyvips.Image.new_from_file(str(path), access="random", fail_on="truncated")
            super().__init__((image.height, image.width), orientation)
            if image.interpretation in ("cmyk", "lab", "labs", "xyz") or image.bands > 4:
                raise ImageError("unsupported_format", f"its colours are {image.interpretation}")
            if image.format not in ("uchar", "ushort"):
                raise ImageError("unsupported_format", f"its samples are {image.format}")
            self._bands, self._dtype = image.bands, {"uchar": np.uint8, "ushort": np.uint16}[image.format]
            self._region: Any = pyvips.Region.new(image)
            self._top, self._band = 0, np.empty((0, image.width, 3), np.uint8)
        except pyvips.Error as error:
            raise self._told(error) from error

    def close(self) -> None:
        """See ``Picture``."""
        self._region = None

    def read_stored(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """See ``Picture``; no row may lie above the first one of the region before."""
        if self._turned:
            return self._fetch(top, left, height, width)
        # Rows come once, so those of this row of windows are held.
        assert top >= self._top, "regions from top to bottom"
        end = self._top + len(self._band)
        if top + height > end:
            begin = max(top, end)
            new = self._fetch(begin, 0, top + height - begin, self._stored[1])
            self._band = np.concatenate([self._band[top - self._top :], new])
            self._top = top
        return self._band[top - self._top : top - self._top + height, left : left + width]

    def _fetch(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        try:
            data = self._region.fetch(left, top, width, height)
        except self._error as error:
            raise self._told(error) from error
        pixels = np.frombuffer(data, self._dtype).reshape(height, width, self._bands)
        if self._dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        if self._bands in (2, 4):
            return _over_white(pixels)
        return np.ascontiguousarray(np.broadcast_to(pixels, (height, width, 3)))

    @staticmethod
    def _told(error: Exception) -> ImageError:
        text = " ".join(str(error).split())
        cut = any(word in text.lower() for word in ("premature", "truncated", "end of"))
        return ImageError("truncated" if cut else "unreadable", text)


def _over_white(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Blend (h, w, 2 or 4) over white, as ``pipeline.files.images`` does."""
    rgba = Image.fromarray(pixels, "LA" if pixels.shape[2] == 2 else "RGBA").convert("RGBA")
    page = Image.new("RGB", rgba.size, "white")
    page.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(page)
