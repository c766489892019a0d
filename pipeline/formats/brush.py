"""Label Studio's run-length encoding of brush masks: bits, in the format of rle-pack.

    32 bits  number of values: four for each pixel (red, green, blue, alpha), row by row
    5 bits   bits of a value, less one
    4 × 4    bits of the four sizes of runs, less one
    then, until all values are there:
      1 bit  1 if one value is repeated
      2 bits which of the sizes the run has
      …      its length, less one
      …      the value, or as many values

Label Studio shows a pixel as strongly as its alpha: masks of 0 and 1 are there, and nobody sees them. Here
all four values are 0 or 255.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_CHANNELS = 4
_VALUE_BITS = 8
_SIZES = (3, 4, 8, 16)
_LONGEST = 1 << _SIZES[-1]
_HEADER = 32 + 5 + 4 * len(_SIZES)


def encode_brush(mask: npt.NDArray[np.bool_]) -> list[int]:
    """Encode a mask (H, W) as bytes, 0 to 255.

    Raises:
        OverflowError: it has 2**30 pixels or more.
    """
    values = mask.size * _CHANNELS
    if values >= 1 << 32:
        raise OverflowError("a brush mask has less than 2**30 pixels")
    flat = mask.ravel()
    ends = np.append(np.flatnonzero(flat[1:] != flat[:-1]) + 1, flat.size)
    lengths = np.diff(ends, prepend=0) * _CHANNELS
    # Long runs are cut.
    pieces = -(-lengths // _LONGEST)
    painted = np.repeat(flat[ends - 1], pieces)
    counts = np.full(len(painted), _LONGEST, np.int64)
    counts[pieces.cumsum() - 1] = lengths - (pieces - 1) * _LONGEST
    size = np.searchsorted(1 << np.array(_SIZES), counts)
    bits = np.array(_SIZES)[size]
    # 1, size, length, value, each run as one number.
    codes = ((4 | size) << bits | (counts - 1)) << _VALUE_BITS | np.where(painted, 255, 0)
    total = 3 + bits + _VALUE_BITS
    places = np.arange(int(total.max()))[::-1]
    table = (codes[:, None] >> places & 1).astype(np.uint8)
    runs = table[places < total[:, None]]
    packed = np.packbits(np.concatenate([_bits(values, 32), _header(), runs]))
    encoded: list[int] = packed.tolist()
    return encoded


def _header() -> npt.NDArray[np.uint8]:
    return np.concatenate([_bits(_VALUE_BITS - 1, 5), *(_bits(size - 1, 4) for size in _SIZES)])


def _bits(value: int, count: int) -> npt.NDArray[np.uint8]:
    return np.array([value >> place & 1 for place in reversed(range(count))], np.uint8)


def decode_brush(encoded: Sequence[int], height: int, width: int) -> npt.NDArray[np.bool_]:
    """Decode a mask (H, W): where alpha is above 0.

    Raises:
        ValueError: it is damaged, or of another size.
    """
    data = np.asarray(encoded)
    if (
        data.ndim != 1
        or data.dtype.kind not in "iu"
        or (data.size and not 0 <= data.min() <= data.max() < 256)
    ):
        raise ValueError("it is not a list of bytes")
    text = np.unpackbits(data.astype(np.uint8)).astype(np.uint8) + ord("0")
    bits = text.tobytes().decode("ascii")
    if len(bits) < _HEADER or int(bits[:32], 2) != height * width * _CHANNELS:
        raise ValueError(f"it is not a mask of {height} x {width} pixels")
    value_bits = int(bits[32:37], 2) + 1
    sizes = [int(bits[place : place + 4], 2) + 1 for place in range(37, _HEADER, 4)]
    values = np.zeros(height * width * _CHANNELS, bool)
    place, filled = _HEADER, 0
    while filled < len(values):
        if place + 3 > len(bits):
            raise ValueError("it ends before the mask does")
        repeated, size = bits[place] == "1", sizes[int(bits[place + 1 : place + 3], 2)]
        begin = place + 3 + size
        count = int(bits[place + 3 : begin] or "0", 2) + 1
        place = begin + value_bits * (1 if repeated else count)
        if place > len(bits) or filled + count > len(values):
            raise ValueError("its runs do not fit the mask")
        if repeated:
            values[filled : filled + count] = "1" in bits[begin:place]
        else:
            single = text[begin:place].reshape(count, value_bits) != ord("0")
            values[filled : filled + count] = single.any(1)
        filled += count
    return values.reshape(height, width, _CHANNELS)[:, :, _CHANNELS - 1]
