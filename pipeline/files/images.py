"""Fetch, decode and resize images.

Bad input is normal here. Any fault of an image raises :class:`ImageError` with a code from
:data:`ERROR_CODES`, which goes into the image's row of the label table; no other exception escapes.

Shapes: H, W pixels. Images are uint8 RGB (H, W, 3), C-contiguous, upright.
"""

from __future__ import annotations

import errno
import io
import random
import re
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field, field_validator

from models.settings import Settings
from pipeline.files import corruptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: The codes of :class:`ImageError`. Label tables store them for years: never rename one.
ERROR_CODES: Mapping[str, str] = MappingProxyType(
    {
        "not_found": "there is no such file or object",
        "permission": "the file or object may not be read with the present rights",
        "unavailable": "the storage did not answer after several attempts; another run may succeed",
        "unsupported_uri": "nothing here can read from this kind of address",
        "empty": "the file has no content",
        "not_an_image": "the content is not an image",
        "unsupported_format": "the content is an image of a format that is not read here",
        "too_large": "the image has more pixels than the limit",
        "truncated": "the file ends before the image does",
        "unreadable": "the content is damaged, or an image of a kind that cannot be read",
    }
)

#: Accepted formats, by Pillow's names. Some of Pillow's other readers start programs (EPS) or are rarely
#: tested against hostile files.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")

#: 100 megapixels: 300 MB as uint8 RGB, and briefly up to three times that while decoding.
MAX_PIXELS = 100_000_000

# Signatures of the common formats: distinguish a truncated image from a file that never was one.
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|II\*\x00|MM\x00\*|II\x2b\x00|MM\x00\x2b|BM|GIF8[79]a"
    rb"|....ftypavif|....jP  ",
    re.DOTALL,
)
_HEIF = re.compile(rb"....ftyp(heic|heix|hevc|heim|heis|hevm|hevs|mif1|msf1)", re.DOTALL)

_EXIF_ORIENTATION = 0x0112
_UPRIGHT: Mapping[int, Image.Transpose] = MappingProxyType(
    {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
_TRUNCATED = re.compile(
    r"truncated|not enough image data|unexpected end|end of file|broken PNG|premature|but only got",
    re.IGNORECASE,
)
_LARGE = re.compile(r"decompression bomb|too large|exceeds limit", re.IGNORECASE)

# Header readers warn about every oddity of a file, once per image, into the logs of every worker. Warning
# filters are global to the interpreter, hence a lock; reading a header takes microseconds.
_header_lock = threading.Lock()


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


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an encoded image to upright RGB.

    Uses the first frame of an animation. Applies the EXIF orientation. Blends transparency over white, as a
    web page would. Keeps the upper 8 of 16 bits per channel. Values of 32-bit and floating-point images are
    assumed to lie in the narrowest of [0, 1], [0, 255] and [0, 65535] that holds them all, and are otherwise
    stretched from minimum to maximum; NaN is black. Ignores colour profiles, as CLIP's training does.

    Args:
        data: the encoded file, in one of :data:`FORMATS`.
        max_pixels: limit of height times width, checked before decoding. Above about 179 million, Pillow's
            own limit applies.

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
        with _open(data) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError(
                    "too_large", f"{width} x {height} pixels are more than the limit of {max_pixels:,}"
                )
            _load(image)
            # After load(): Pillow itself rotates TIFFs upright and then removes the tag.
            turn = _UPRIGHT.get(_orientation(image))
            upright = image if turn is None else image.transpose(turn)
            return _to_rgb(upright)
    except ImageError:
        raise
    except Exception as error:  # on hostile files, readers raise anything: struct.error, KeyError, …
        raise _explain(error, data) from error


def _open(data: bytes) -> Image.Image:
    """Read the header only."""
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _load(image: Image.Image) -> None:
    """Decode the pixels."""
    if image.format != "TIFF":
        image.load()
        return
    # The only reader that warns here too: it reads the EXIF data again.
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image.load()


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the block is damaged."""
    try:
        with _header_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # damaged EXIF data is no reason to reject the image
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    """Convert any of Pillow's modes to uint8 (H, W, 3)."""
    if image.mode.startswith("I;16"):
        # The upper byte, as Pillow does for 16-bit RGB.
        return _grey_to_rgb((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        return _grey_to_rgb(_to_byte_range(np.asarray(image, dtype=np.float64)))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        page = Image.new("RGB", image.size, "white")
        page.paste(rgba, mask=rgba.getchannel("A"))
        return np.array(page)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _grey_to_rgb(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _to_byte_range(values: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Map values of unknown range to 0…255; see :func:`decode`."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return np.zeros(values.shape, np.uint8)
    low, high = float(finite.min()), float(finite.max())
    if low >= 0:
        top = next((top for top in (1.0, 255.0, 65535.0) if high <= top), None)
        if top is not None:
            low, high = 0.0, top
    # Halved first, because the span of the whole float range overflows.
    unit = (values / 2 - low / 2) / max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    scaled = np.nan_to_num(unit, nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _explain(error: Exception, data: bytes) -> ImageError:
    """Translate an exception of an image reader."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, Image.DecompressionBombError | MemoryError) or _LARGE.search(text):
        return ImageError("too_large", text)
    if isinstance(error, UnidentifiedImageError):
        if _HEIF.match(data):
            return ImageError("unsupported_format", "HEIC/HEIF image; convert it to JPEG or PNG")
        if not _SIGNATURES.match(data):
            return ImageError("not_an_image", f"{len(data)} bytes that begin with {data[:8]!r}")
        return ImageError("truncated", f"the header is cut off or damaged ({len(data)} bytes)")
    # WebP stores its length in the header; its reader only reports failure.
    cut = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    if cut or isinstance(error, EOFError) or _TRUNCATED.search(text):
        return ImageError("truncated", text)
    return ImageError("unreadable", text)


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
    """Larger images are not decoded but recorded as ``too_large``."""
    corruption: str = ""
    """``NAME:LEVEL``, such as ``jpeg_compression:3``, applied to the decoded image before resizing, to
    measure robustness; empty is none."""

    @field_validator("corruption")
    @classmethod
    def _known(cls, corruption: str) -> str:
        if corruption:
            corruptions.parse(corruption)
        return corruption


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


def fetch(
    uri: str,
    *,
    start: int = 0,
    length: int | None = None,
    attempts: int = 4,
    wait: float = 0.5,
    sleep: Callable[[float], object] = time.sleep,
) -> bytes:
    """Read a file or object, or a range of its bytes.

    Args:
        uri: a local path, or a URL of any scheme that fsspec knows (``s3://``, ``gs://``, ``file://``, …).
        start: the first byte to read.
        length: number of bytes; None reads to the end.
        attempts: tries after transient errors of remote storage.
        wait: seconds before the second attempt; doubled each time, with up to 50 % of random jitter so that
            many workers do not retry at once.
        sleep: for tests.

    Returns:
        The bytes; fewer than ``length`` if the file ends first.

    Raises:
        ImageError: ``not_found``, ``permission``, ``unavailable``, ``unsupported_uri`` or ``unreadable``.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", uri) is None:
        try:
            with open(uri, "rb") as file:
                file.seek(start)
                return file.read(-1 if length is None else length)
        except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
            raise _explain_io(error) from error
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(uri)
    except Exception as error:  # unknown scheme, missing driver, malformed address
        raise ImageError("unsupported_uri", f"{type(error).__name__}: {error}") from error
    return _read_remote(filesystem, path, start, length, attempts, wait, sleep)


def _read_remote(
    filesystem: Any,
    path: str,
    start: int,
    length: int | None,
    attempts: int,
    wait: float,
    sleep: Callable[[float], object],
) -> bytes:
    for attempt in range(attempts):
        try:
            if start == 0 and length is None:
                return bytes(filesystem.cat_file(path))
            if length == 0:
                return b""
            return bytes(
                filesystem.cat_file(path, start=start, end=None if length is None else start + length)
            )
        except Exception as error:  # each driver has its own exceptions
            explained = _explain_io(error)
            if explained.code != "unavailable" or attempt == attempts - 1:
                raise explained from error
        delay = wait * 2**attempt
        sleep(delay + random.uniform(0, delay / 2))
    raise AssertionError("attempts must be positive")


def _explain_io(error: Exception) -> ImageError:
    """Translate an exception of a file system. Errors not known to be permanent count as transient."""
    text = f"{type(error).__name__}: {error}"
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return ImageError("not_found", text)
    if isinstance(error, PermissionError) or type(error).__name__ in (
        "NoCredentialsError",
        "PartialCredentialsError",
        "CredentialRetrievalError",
    ):
        return ImageError("permission", text)
    lasting = (errno.ENAMETOOLONG, errno.EINVAL, errno.ELOOP, errno.EIO)
    if isinstance(error, IsADirectoryError | ValueError | NotImplementedError) or number in lasting:
        return ImageError("unreadable", text)
    return ImageError("unavailable", text)
