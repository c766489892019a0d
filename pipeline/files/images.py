"""Fetch, decode and resize images.

Bad input is normal here. Any fault of an image raises :class:`ImageError` with a code from
:data:`ERROR_CODES`, which goes into the image's row of the label table; no other exception escapes.

Shapes: H, W pixels. Images are uint8 RGB (H, W, 3), C-contiguous, upright.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field, field_validator, model_validator
from typing_extensions import Self

from models.errors import WrongUse
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

#: Accepted formats, by Pillow's names. Some of Pillow's other readers start programs (EPS) or are rarely
#: tested against hostile files.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")

_SUFFIXES: Mapping[str, str] = MappingProxyType(
    {name: f".{name.lower()}" for name in FORMATS}
    | {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
)

#: 100 megapixels: 300 MB as uint8 RGB; see :func:`decode` for the memory that decoding takes.
MAX_PIXELS = 100_000_000

#: Images of more pixels are not read in windows either: OpenCV, and so many a program, reads no mask that is
#: larger.
MOST_PIXELS = 1 << 30

#: Libpng, and so most readers of PNG, refuse longer sides: such an image could have no mask.
MAX_SIDE = 1_000_000

# Signatures of the common formats: distinguish a truncated image from a file that never was one.
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG|RIFF....WEBP|II\*\x00|MM\x00\*|II\x2b\x00|MM\x00\x2b|BM|GIF8[79]a"
    rb"|....ftypavi[fs]|....jP  |\xff\x4f\xff\x51|P[1-6]\s",
    re.DOTALL,
)
# Images of formats that are not read, by their first bytes.
_UNSUPPORTED: tuple[tuple[str, re.Pattern[bytes]], ...] = tuple(
    (name, re.compile(signature, re.DOTALL))
    for name, signature in (
        ("a HEIC/HEIF image", rb"....ftyp(heic|heix|hevc|heim|heis|hevm|hevs|mif1|msf1)"),
        ("an AVIF sequence", rb"....ftypavis"),
        ("a raw photograph (Canon CR3)", rb"....ftypcrx "),
        ("a raw photograph (Canon CR2)", rb"II\*\x00....CR"),
        ("a raw photograph (Olympus ORF)", rb"IIR[OS]|MMOR"),
        ("a raw photograph (Panasonic RW2)", rb"IIU\x00"),
        ("a raw photograph (Fujifilm RAF)", rb"FUJIFILMCCD-RAW"),
        ("a JPEG XL image", rb"\xff\x0a|\x00\x00\x00\x0cJXL \r\n\x87\n"),
        ("a JPEG XR image", rb"II\xbc"),
        ("a Photoshop document (PSD)", rb"8BPS"),
        ("a Windows icon or cursor", rb"\x00\x00[\x01\x02]\x00[^\x00]\x00"),
        ("a Macintosh icon", rb"icns"),
        ("an OpenEXR image", rb"v/1\x01"),
        ("a Radiance HDR image", rb"#\?R(ADIANC|GB)E"),
        ("a DirectDraw surface (DDS)", rb"DDS "),
        ("a DICOM image", rb".{128}DICM"),
        ("a FITS image", rb"SIMPLE  ="),
        ("a QOI image", rb"qoif"),
        ("a floating-point map (PFM)", rb"P[Ff]\s"),
        ("a GIMP document (XCF)", rb"gimp xcf"),
        ("a BPG image", rb"BPG\xfb"),
    )
)
_TGA_END = b"TRUEVISION-XFILE.\0"
_ENDS = (b"IEND\xaeB`\x82", b"\xff\xd9")  # of a whole PNG or JPEG
_XML = (b"<svg", b"<?xml", b"<!--", b"<!DOCTYPE svg")

_EXIF_ORIENTATION = 0x0112
_STRIP_PIXELS = 1 << 20  # converted at a time
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
_TRUNCATED = re.compile(
    r"truncated|not enough image data|unexpected end|end of file|broken PNG|premature|but only got",
    re.IGNORECASE,
)

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
        data: the encoded file, in one of :data:`FORMATS`.
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
            raise _explain(error, data) from error
    try:
        return _decode(bare, max_pixels, value_range)
    except ImageError:
        raise
    except Exception as error:
        raise _explain(error, bare) from error


def exceeds(image: bytes | Path, max_pixels: int) -> bool:
    """Whether an image has more pixels than ``max_pixels``, by its header; False if that cannot be read."""
    try:
        with _open(image) as opened:
            return opened.width * opened.height > max_pixels
    except Image.DecompressionBombError:
        return True
    except Exception:  # readers raise anything; decoding will tell
        return False


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins so is of one of ``FORMATS``."""
    return bool(_SIGNATURES.match(head))


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
        raise _explain(error, data) from error
    Image.fromarray(decode(data)).save(made, "PNG")
    return made.getvalue(), ".png"


def suffix_of_content(data: bytes) -> str:
    """The suffix of a file with this image, such as ".jpg"; "" if it is none of ``FORMATS``."""
    try:
        with _open(data) as image:
            return _SUFFIXES.get(image.format or "", "")
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
        rgb = _to_rgb(image, value_range)
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
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=FORMATS)


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
            return _extremes(image.crop((0, 0, width, height)))
    except Exception as error:  # readers raise anything
        raise _explain(error, data) from error


def _to_rgb(image: Image.Image, value_range: tuple[float, float] | None = None) -> NDArray[np.uint8]:
    """Convert any of Pillow's modes to uint8 (H, W, 3), a strip at a time: its copies stay small."""
    width, height = image.size
    rgb = np.empty((height, width, 3), np.uint8)
    limits = (0.0, 255.0)
    if image.mode in ("I", "F"):
        limits = _scale_of(*(value_range or _extremes(image)))
    for top, strip in _strips(image):
        rows = rgb[top : top + strip.height]
        if image.mode.startswith("I;16"):
            # The upper byte, as Pillow does for 16-bit RGB.
            rows[:] = (np.asarray(strip) >> 8).astype(np.uint8)[:, :, None]
        elif image.mode in ("I", "F"):
            rows[:] = _to_byte_range(np.asarray(strip, dtype=np.float64), *limits)[:, :, None]
        elif strip.has_transparency_data:
            rgba = strip.convert("RGBA")
            page = Image.new("RGB", strip.size, "white")
            page.paste(rgba, mask=rgba.getchannel("A"))
            rows[:] = np.asarray(page)
        else:
            rows[:] = np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))
    return rgb


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """The image from top to bottom in strips of whole rows; their first rows and themselves."""
    rows = max(1, _STRIP_PIXELS // image.width)
    if image.height <= rows:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(image.height, top + rows)))


def _extremes(image: Image.Image) -> tuple[float, float]:
    """The lowest and the highest finite value; (inf, -inf) if there is none."""
    low, high = np.inf, -np.inf
    for _, strip in _strips(image):
        values = np.asarray(strip)
        finite = values[np.isfinite(values)]
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    return low, high


def _scale_of(low: float, high: float) -> tuple[float, float]:
    """The values that become 0 and 255, from the lowest and the highest; see :func:`decode`."""
    if low > high:
        return 0.0, 1.0
    if low >= 0:
        top = next((top for top in (1.0, 255.0, 65535.0) if high <= top), None)
        if top is not None:
            return 0.0, top
    return low, high


def _to_byte_range(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    """Map values from ``low`` to ``high`` to 0…255; NaN is 0."""
    # Halved first, because the span of the whole float range overflows.
    unit = (values / 2 - low / 2) / max(high / 2 - low / 2, np.finfo(np.float64).tiny)
    scaled = np.nan_to_num(unit, nan=0.0, posinf=1.0, neginf=0.0)
    return np.rint(np.clip(scaled, 0, 1) * 255).astype(np.uint8)


def _explain(error: Exception, data: bytes) -> ImageError:
    """Translate an exception of an image reader."""
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return ImageError("too_large", text)
    if isinstance(error, UnidentifiedImageError):
        other = _other_format(data)
        if other is not None:
            return ImageError("unsupported_format", f"{other}; convert it to JPEG or PNG")
        if not _SIGNATURES.match(data):
            return ImageError("not_an_image", f"{len(data)} bytes that begin with {repr(data[:8])[1:]}")
        if data.endswith(_ENDS):
            return ImageError("unreadable", "the header is damaged")
        return ImageError("truncated", f"the header is cut off or damaged ({len(data)} bytes)")
    # WebP stores its length in the header; its reader only reports failure.
    cut = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    if cut or isinstance(error, EOFError) or _TRUNCATED.search(text):
        return ImageError("truncated", text)
    return ImageError("unreadable", text)


def _other_format(data: bytes) -> str | None:
    """What an image is that none of the readers knows; None if it may be one of theirs, damaged."""
    head = data[:4096]
    for name, signature in _UNSUPPORTED:
        if signature.match(head):
            return name
    if b"<svg" in head and head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(_XML):
        return "an SVG drawing"
    if data.endswith(_TGA_END):
        return "a TGA image"
    if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return _tiff_kind(data)
    return _jpeg_kind(data) if data[:3] == b"\xff\xd8\xff" else None


def _tiff_kind(data: bytes) -> str | None:
    """Samples and compression of a TIFF whose header is whole; None if it is cut off."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    file = io.BytesIO(data)
    try:
        with _header_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tags = ImageFileDirectory_v2(file.read(16 if data[2:3] == b"+" or data[3:4] == b"+" else 8))
            file.seek(tags.next)
            tags.load(file)
        bits = tags[258] if isinstance(tags[258], tuple) else (tags[258],)
        kind = {1: "unsigned", 2: "signed", 3: "floating-point"}.get(tags.get(339, (1,))[0], "unusual")
        channels, compression = tags.get(277, 1), tags.get(259, 1)
        ends = [start + size for start, size in zip(tags.get(273, ()), tags.get(279, ()), strict=False)]
    except Exception:  # a damaged directory, in any of many ways
        return None
    if any(end > len(data) for end in ends):
        return None
    return f"a TIFF of {channels} channel(s) of {bits[0]} bits, {kind}, compression {compression}"


def _jpeg_kind(data: bytes) -> str | None:
    """A JPEG of a kind that libjpeg is not built for: more than 8 bits, or lossless."""
    start = 2
    while start + 9 < len(data) and data[start] == 0xFF:
        marker = data[start + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            lossless = marker in (0xC3, 0xC7, 0xCB, 0xCF)
            bits = data[start + 4]
            return (
                f"a JPEG of {bits} bits{', lossless' if lossless else ''}" if lossless or bits != 8 else None
            )
        if marker == 0xF7:
            return "a JPEG-LS image"
        start += 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    return None


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
