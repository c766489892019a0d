"""An image that is read by regions, because it is too large to be decoded whole.

Shapes: H W pixels of the upright image. Regions are uint8 RGB (h, w, 3), as ``pipeline.files.images.decode``
would have decoded them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from pipeline.files.images import MAX_SIDE, MOST_PIXELS, UPRIGHT, ImageError

_SWAPPED = (5, 6, 7, 8)  # orientations that exchange rows and columns
_ROWS_TURNED, _COLUMNS_TURNED = (3, 4, 6, 7), (2, 3, 7, 8)


class Picture(ABC):
    """Reads regions; a context manager.

    Args:
        stored: (height, width) as the file stores the image.
        orientation: of its EXIF data, 1 to 8.

    Attributes:
        height, width: of the upright image.

    Raises:
        ImageError: ``too_large`` above ``MOST_PIXELS``, or with a side above ``MAX_SIDE``.
    """

    def __init__(self, stored: tuple[int, int], orientation: int) -> None:
        self._stored, self._orientation = stored, orientation
        height, width = stored
        if height * width > MOST_PIXELS or max(stored) > MAX_SIDE:
            raise ImageError(
                "too_large",
                f"{width} x {height} pixels are more than {MOST_PIXELS:,}, or a side is longer than "
                f"{MAX_SIDE:,}: cut the image into pieces",
            )
        self.height, self.width = (width, height) if orientation in _SWAPPED else (height, width)

    def read(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """Decode a region.

        Args:
            top, left, height, width: within the upright image.

        Returns:
            uint8 (height, width, 3), C-contiguous.

        Raises:
            ImageError: ``truncated`` or ``unreadable``.
        """
        rows, columns = (top, height), (left, width)
        if self._orientation in _SWAPPED:
            rows, columns = columns, rows
        if self._orientation in _ROWS_TURNED:
            rows = self._stored[0] - rows[0] - rows[1], rows[1]
        if self._orientation in _COLUMNS_TURNED:
            columns = self._stored[1] - columns[0] - columns[1], columns[1]
        region = self.read_stored(rows[0], columns[0], rows[1], columns[1])
        turn = UPRIGHT.get(self._orientation)
        return np.ascontiguousarray(region if turn is None else turn(region))

    @abstractmethod
    def read_stored(self, top: int, left: int, height: int, width: int) -> NDArray[np.uint8]:
        """``read``, in the rows and columns that the file stores."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
