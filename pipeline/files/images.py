"""Fetch, decode and resize images.

Bad input is normal here. Any fault of an image raises :class:`ImageError` with a code from
:data:`ERROR_CODES`, which goes into the image's row of the label table; no other exception escapes.

Shapes: H, W pixels. Images are uint8 RGB (H, W, 3), C-contiguous, upright.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from models.errors import WrongUse
from models.settings import Settings
from pipeline.files import corruptions
from pipeline.files.conversion import extremes, to_rgb
from pipeline.files.recognition import FORMATS, SUFFIXES, explain_failure, reading_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The codes of :class:`ImageError`. Label tables store them for years: never rename one.
ERROR_CODES: Mapping[str, str] = MappingProxyType(
    {
        "not_found": "there is no such file or object",
        "permission": "the file or object may not be read with the present rights",
        "unavailable": "the storage did not answer after several attempts; another run may succeed",
        "unsupported_uri": "nothing here can read from this kind of address",
        "not_a_file": "the path is a folder, a pipe or a device, not a file",
        "too_many_bytes": "the file has more bytes than an image within the limit of pixels can have",
        "empty": "the file has no content",
        "not_an_image": "the content is not an image",
        "unsupported_format": "the content is an image of a format that is not read here",
        "too_large": "the image has more pixels, or a longer side, than the limit",
        "truncated": "the file ends before the image does",
        "unreadable": "the content is damaged, or an image of a kind that cannot be read",
    }
)

#: 100 megapixels: 300 MB as uint8 RGB; see :func:`decode` for the memory that decoding takes.
MAX_PIXELS = 100_000_000

#: Images of more pixels are not read in windows either: OpenCV, and so many a program, reads no mask that is
#: larger.
MOST_PIXELS = 1 << 30

#: Libpng, and so most readers of PNG, refuse longer sides: such an image could have no mask.
MAX_SIDE = 1_000_000

_EXIF_ORIENTATION = 0x0112
#: What turns an image with this EXIF orientation upright.
UPRIGHT: Mapping[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = MappingProxyType(
    {
        2: lambda image: image[:, ::-1],
        3: lambda image: image[::-1, ::-1],
        4: lambda image: image[::-1],
        5: lambda image: image.transpose(1, 0, 2),
        6: lambda image: image[::-1].transpose(1, 0, 2),
        7: lambda image: image[::-1, ::-1].transpose(1, 0, 2),
        8: lambda image: image[:, ::-1].transpose(1, 0, 2),
    }
)


class ImageError(Exception):
    """An image that cannot be used.

    Args:
        code: a key of :data:`ERROR_CODES`.
        message: what is wrong, without the URI (which is in the same row).
    """

    def __init__(self, code: str, message: str) -> None:
        assert code in ERROR_CODES, code
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        # For pickling: the default would pass only one argument.
        return type(self), (self.code, self.message)


def decode(
    data: bytes, *, max_pixels: int = MAX_PIXELS, value_range: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Decode an encoded image to upright RGB.

    Uses the first frame of an animation. Applies the EXIF orientation. Blends transparency over white, as a
    web page would. Keeps the upper 8 of 16 bits per channel. Values of 32-bit and floating-point images are
    assumed to lie in the narrowest of [0, 1], [0, 255] and [0, 65535] that holds them all, and are otherwise
    stretched from minimum to maximum; NaN is black. Ignores colour profiles, as CLIP's training does.
    Memory beside the encoded file, result included: at most 8 bytes a pixel, for AVIF 10, for WebP 16 and for
    JPEG 2000 20, whose readers hold further copies.

    Args:
        data: the encoded file, in one of ``pipeline.files.recognition.FORMATS``.
        max_pixels: limit of height times width, checked before decoding, as is ``MAX_SIDE``. Above about 179
            million, Pillow's own limit applies.
        value_range: of an image of which this is a part: the lowest and the highest of its values if they are
            of 32 bits or floating-point. None takes them from the image itself.

    Returns:
        uint8 (H, W, 3), C-contiguous and writable, owned by the caller.

    Raises:
        ImageError: ``empty``, ``not_an_image``, ``unsupported_format``, ``too_large``, ``truncated`` or
            ``unreadable``.

    Note:
        libtiff writes a line to stderr about damaged TIFFs, which Python cannot suppress.
    """
    if len(data) == 0:
        raise ImageError("empty", "the file has 0 bytes")
    try:
        return _decode(data, max_pixels, value_range)
    except ImageError:
        raise
    except Exception as error:  # on hostile files, readers raise anything: struct.error, KeyError, …
        bare = _without_metadata(data)
        if bare is None:
            raise ImageError(*explain_failure(error, data)) from error
    try:
        return _decode(bare, max_pixels, value_range)
    except ImageError:
        raise
    except Exception as error:
        raise ImageError(*explain_failure(error, bare)) from error


def exceeds(image: bytes | Path, max_pixels: int) -> bool:
    """Whether an image has more pixels than ``max_pixels``, by its header; False if that cannot be read."""
    try:
        with _open(image) as opened:
            return opened.width * opened.height > max_pixels
    except Image.DecompressionBombError:
        return True
    except Exception:  # readers raise anything; decoding will tell
        return False


def pixels(data: bytes) -> int | None:
    """Height times width of an encoded image, by its header; None if that cannot be read.

    Of an image that Pillow takes for a bomb, the fewest that it may have.
    """
    try:
        with _open(data) as image:
            return image.width * image.height
    except Image.DecompressionBombError:
        return 2 * (Image.MAX_IMAGE_PIXELS or 0)
    except Exception:  # readers raise anything; decoding will tell
        return None


def upright(data: bytes) -> tuple[bytes, str]:
    """An encoded image that lies as it is shown, for programs that do not heed the EXIF orientation.

    A JPEG stays one, of high quality, with its colour profile; other formats become PNGs, as ``decode`` reads
    them. Other EXIF data is dropped.

    Args:
        data: an image that ``decode`` reads.

    Returns:
        The image and the suffix of its file, such as ".jpg"; ``data`` itself and "" if it lies so already.

    Raises:
        ImageError: as ``decode``.
    """
    try:
        with _open(data) as image:
            kind = image.format
            # Pillow shows a TIFF's orientation only until it has loaded it.
            if _orientation(image) not in UPRIGHT:
                return data, ""
            made = io.BytesIO()
            if kind in ("JPEG", "MPO"):
                turned = ImageOps.exif_transpose(image)
                profile = image.info.get("icc_profile")
                turned.info.clear()
                turned.save(made, "JPEG", quality=95, subsampling=0, icc_profile=profile)
                return made.getvalue(), ".jpg"
    except Exception as error:  # readers raise anything
        raise ImageError(*explain_failure(error, data)) from error
    Image.fromarray(decode(data)).save(made, "PNG")
    return made.getvalue(), ".png"


def suffix_of_content(data: bytes) -> str:
    """The suffix of a file with this image, such as ".jpg"; "" if it is none of ``FORMATS``."""
    try:
        with _open(data) as image:
            return SUFFIXES.get(image.format or "", "")
    except Exception:  # readers raise anything
        return ""


def _decode(data: bytes, max_pixels: int, value_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    with _open(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                "too_large", f"{width} x {height} pixels are more than the limit of {max_pixels:,}"
            )
        if max(width, height) > MAX_SIDE:
            raise ImageError("too_large", f"a side of {width} x {height} pixels is longer than {MAX_SIDE:,}")
        if _is_thumbnail(image):
            raise ImageError("unsupported_format", "a raw photograph, whose first image is a thumbnail")
        _load(image)
        # After load(): Pillow itself rotates TIFFs upright and then removes the tag.
        turn = UPRIGHT.get(_orientation(image))
        rgb = to_rgb(image, value_range)
    return rgb if turn is None else np.ascontiguousarray(turn(rgb))


def _without_metadata(data: bytes) -> bytes | None:
    """A PNG without the chunks that say nothing about its pixels; None if there are none, or for others.

    Pillow refuses a whole image for a text or a colour profile of more than a megabyte.
    """
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return None
    kept, start = [data[:8]], 8
    while start + 8 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        if data[start + 4 : start + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[start:end])
        start = end
    bare = b"".join(kept)
    return bare if len(bare) < len(data) else None


def _is_thumbnail(image: Image.Image) -> bool:
    """Whether a TIFF begins with a reduced image (tag NewSubfileType), as NEF, ARW and DNG do."""
    tags = getattr(image, "tag_v2", None)
    return image.format == "TIFF" and tags is not None and bool(tags.get(254, 0) & 1)


def _open(data: bytes | Path) -> Image.Image:
    """Read the header only."""
    with reading_header():
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)


def _load(image: Image.Image) -> None:
    """Decode the pixels."""
    if image.format != "TIFF":
        image.load()
        return
    # The only reader that warns here too: it reads the EXIF data again.
    with reading_header():
        image.load()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the block is damaged."""
    try:
        with reading_header():
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data is no reason to reject the image
        return 1
    return value if isinstance(value, int) else 1


def value_extremes(data: bytes, height: int, width: int) -> tuple[float, float] | None:
    """The lowest and the highest finite value of an image of 32 bits or floating-point; None for others.

    Args:
        data: the encoded file.
        height, width: only this much of it, from its upper left corner, is looked at.

    Returns:
        (inf, -inf) if no value is finite.

    Raises:
        ImageError: as ``decode``.
    """
    try:
        with _open(data) as image:
            if image.mode not in ("I", "F"):
                return None
            _load(image)
            return extremes(image.crop((0, 0, width, height)))
    except Exception as error:  # readers raise anything
        raise ImageError(*explain_failure(error, data)) from error


class ImageSettings(Settings):
    """How images are decoded, corrupted and resized.

    Raises:
        MaskMillError: ``setting_invalid`` for an unknown corruption.
    """

    scale: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (2048, 512)
    """Two sides in pixels: resize so that the long side is within the larger and the short side within the
    smaller (the paper's ``img_scale``)."""
    keep_ratio: bool = True
    """False resizes to exactly ``scale`` (width, height)."""
    resize: Literal["opencv", "antialias"] = "opencv"
    """``opencv`` is bilinear without antialiasing, as in the paper's code; ``antialias`` is Pillow's."""
    max_pixels: Annotated[int, Field(ge=1)] = MAX_PIXELS
    """Images of more pixels are labelled in windows (``large_window``), up to 2^30 pixels, if they can be
    read so: TIFF in tiles or narrow strips, and with libvips JPEG and PNG. Others become ``too_large``."""
    large_window: Annotated[int, Field(ge=0, le=8192)] = 1024
    """Side in pixels of the windows of an image above ``max_pixels``; each is resized and labelled like an
    image of its own. 0 records such images as ``too_large``."""
    large_overlap: Annotated[int, Field(ge=0)] = 128
    """Pixels, at least, by which such windows overlap; scores are averaged there."""
    corruption: str = ""
    """``NAME:LEVEL``, such as ``jpeg_compression:3``, applied to the decoded image before resizing, to
    measure robustness; empty is none."""

    @field_validator("corruption")
    @classmethod
    def _known(cls, corruption: str) -> str:
        if corruption:
            corruptions.parse(corruption)
        return corruption

    @model_validator(mode="after")
    def _windows(self) -> Self:
        if self.large_window and self.large_overlap >= self.large_window:
            raise WrongUse(
                "setting_invalid",
                f"windows of {self.large_window} pixels cannot overlap by {self.large_overlap}.",
                f"Set large_overlap={self.large_window // 8}.",
            )
        return self


def target_size(
    height: int, width: int, *, scale: tuple[int, int], keep_ratio: bool = True
) -> tuple[int, int]:
    """The size at which the network sees an image.

    With ``keep_ratio``, the largest size that fits into ``scale`` in either orientation: the long side within
    the larger and the short side within the smaller number, both rounded half up, and at least 1 pixel.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        scale: two numbers of pixels; (width, height) if the ratio is not kept.
        keep_ratio: scale both sides by the same factor.

    Returns:
        (height, width).

    Raises:
        ValueError: if a number is not positive.
    """
    if min(height, width, *scale) < 1:
        raise ValueError(f"sizes must be positive: {height} x {width} at scale {scale}")
    if not keep_ratio:
        return scale[1], scale[0]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))


def resize(
    image: NDArray[np.uint8], size: tuple[int, int], *, method: Literal["opencv", "antialias"] = "opencv"
) -> NDArray[np.uint8]:
    """Resize bilinearly.

    Args:
        image: uint8 (H, W, 3).
        size: the new (height, width).
        method: ``opencv`` interpolates between the four nearest pixels even when shrinking, like the
            reference; ``antialias`` averages over the area of a pixel (Pillow).

    Returns:
        uint8 (height, width, 3); ``image`` itself if it has that size already.

    Raises:
        ValueError: if the method is unknown.
    """
    if image.shape[:2] == size:
        return image
    if method == "opencv":
        import cv2

        return np.asarray(cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    if method == "antialias":
        return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    raise ValueError(f"unknown method {method!r}: opencv or antialias")


def fit(image: NDArray[np.uint8], settings: ImageSettings) -> NDArray[np.uint8]:
    """Resize an image to the size at which the network sees it.

    Args:
        image: uint8 (H, W, 3), decoded and corrupted already.
        settings: scale, ratio and method.

    Returns:
        uint8 (Hn, Wn, 3), C-contiguous; ``image`` itself if it fits already.
    """
    height, width = image.shape[:2]
    size = target_size(height, width, scale=settings.scale, keep_ratio=settings.keep_ratio)
    return resize(image, size, method=settings.resize)


def use_one_thread() -> None:
    """Restrict OpenCV to the calling thread, in the whole process.

    With one worker per core, further threads would only take time from the other workers.
    """
    import cv2

    cv2.setNumThreads(1)
