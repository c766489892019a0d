"""Images and masks as the formats want them: JPEG, PNG, and PNG with a palette."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from models.errors import WrongUse
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError, decode
from pipeline.formats.masks import check_png_size, unreadable

Colors = npt.NDArray[np.uint8]
"""(C, 3) sRGB."""


def as_jpeg(image: bytes, quality: int) -> bytes:
    """An encoded image as JPEG; one that is a JPEG stays as it is.

    Args:
        image: encoded, upright, without EXIF orientation.
        quality: 1 to 100, for images of other formats.
    """
    if image.startswith(b"\xff\xd8\xff"):
        return image
    return _saved(Image.fromarray(decode(image)), "JPEG", quality=quality, subsampling=0)


def as_png(image: bytes) -> bytes:
    """An encoded image as PNG, RGB of 8 bits; one that is a PNG stays as it is."""
    if image.startswith(b"\x89PNG"):
        return image
    import cv2

    done, data = cv2.imencode(
        ".png", cv2.cvtColor(decode(image), cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1]
    )
    assert done
    return bytes(data)


def palette_png(indices: npt.NDArray[np.uint8], palette: Colors) -> bytes:
    """A PNG of palette indices.

    Args:
        indices: (H, W).
        palette: up to 256 colours.
    """
    picture = Image.fromarray(indices)
    picture.putpalette(np.ascontiguousarray(palette).tobytes())
    return _saved(picture, "PNG")


def painted_png(indices: npt.NDArray[np.uint8], palette: Colors) -> bytes:
    """An RGB PNG of the colours of indices (H, W)."""
    import cv2

    table = np.zeros((256, 3), np.uint8)
    table[: len(palette)] = palette[:, ::-1]  # OpenCV's order is BGR
    done, data = cv2.imencode(".png", table[indices], [cv2.IMWRITE_PNG_COMPRESSION, 6])
    assert done
    return bytes(data)


def _saved(picture: Image.Image, format: str, **options: int) -> bytes:
    data = io.BytesIO()
    picture.save(data, format, **options)
    return data.getvalue()


def image_size(uri: str) -> tuple[int, int]:
    """Height and width of an image, upright.

    Raises:
        MaskMillError: ``dataset_invalid``, naming the file.
    """
    try:
        height, width, _ = decode(fetch(uri)).shape
    except ImageError as error:
        raise unreadable(uri, str(error)) from error
    return height, width


def is_painted(data: bytes) -> bool:
    """Whether an encoded image is a PNG of colours, not of grey values or palette indices."""
    return data.startswith(b"\x89PNG") and len(data) > 25 and data[25] in (2, 6)


def decode_painted(data: bytes, uri: str, colors: Colors) -> npt.NDArray[np.int64]:
    """The indices of a mask of colours.

    Args:
        data: an RGB or RGBA PNG of 8 bits.
        uri: its address, for errors.
        colors: those that it may have, all different.

    Returns:
        (H, W), the index of each pixel's colour.

    Raises:
        MaskMillError: ``dataset_invalid``; ``mask_invalid`` for another colour.
    """
    check_png_size(data, uri, None)
    try:
        # Not OpenCV: it believes the length of a chunk, and takes up to 4 GB of memory for it.
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            picture = np.asarray(opened.convert("RGB"))
    except Exception as error:  # Pillow raises all sorts of exceptions on damaged files
        raise unreadable(uri, f"it is not a whole picture ({type(error).__name__})") from error
    red, green, blue = np.moveaxis(picture.astype(np.int64), -1, 0)
    packed = red << 16 | green << 8 | blue
    known = colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    order = known.argsort(kind="stable")
    place = np.searchsorted(known[order], packed).clip(max=len(known) - 1)
    found: npt.NDArray[np.int64] = order[place]
    strange = known[found] != packed
    if strange.any():
        value = int(packed[strange][0])
        raise WrongUse(
            "mask_invalid",
            f"{uri} has the colour {value >> 16},{value >> 8 & 255},{value & 255}, which is no class's.",
            "Use the labelmap.txt of these masks, and masks that were never resized or smoothed.",
        )
    return found
