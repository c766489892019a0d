"""Perceptual hash of an image: 64 bits that hardly change when it is resized, compressed or made brighter."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_SIDE = 32
_KEPT = 8


def perceptual_hash(image: npt.NDArray[np.uint8]) -> int:
    """Signs of the lowest spatial frequencies (the "pHash" of Zauner, "Implementation and Benchmarking of
    Perceptual Image Hash Functions", 2010).

    The grey image is averaged to 32 x 32 pixels; of its DCT-II the 8 x 8 lowest coefficients are compared
    with their median. The constant one, which is the brightness, gives way to the next in its row.

    Args:
        image: (H, W, 3) RGB.

    Returns:
        In [0, 2**64); compare two by the number of bits that differ.
    """
    import cv2
    from scipy.fft import dctn

    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    waves = dctn(small, norm="ortho")
    low = waves[:_KEPT, :_KEPT].copy()
    low[0, 0] = waves[0, _KEPT]
    bits = (low > np.median(low)).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
