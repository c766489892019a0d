"""What the bytes of a file are: which formats are read, and why a file is no image that can be."""

from __future__ import annotations

import contextlib
import io
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from PIL import Image, UnidentifiedImageError

#: Accepted formats, by Pillow's names. Some of Pillow's other readers start programs (EPS) or are rarely
#: tested against hostile files.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "AVIF", "JPEG2000", "PPM")

#: Suffixes of files in these formats, and in one that Pillow tells apart from JPEG.
SUFFIXES: Mapping[str, str] = MappingProxyType(
    {name: f".{name.lower()}" for name in FORMATS}
    | {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif", "JPEG2000": ".jp2"}
)

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

_TRUNCATED = re.compile(
    r"truncated|not enough image data|unexpected end|end of file|broken PNG|premature|but only got",
    re.IGNORECASE,
)

# Header readers warn about every oddity of a file, once per image, into the logs of every worker. Warning
# filters are global to the interpreter, hence a lock; reading a header takes microseconds.
_header_lock = threading.Lock()


@contextlib.contextmanager
def reading_header() -> Iterator[None]:
    """Where a header is read, or what else makes Pillow warn; of all threads, one at a time."""
    with _header_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins so is of one of ``FORMATS``."""
    return bool(_SIGNATURES.match(head))


def explain_failure(error: Exception, data: bytes) -> tuple[str, str]:
    """Why an image could not be read: a code of ``pipeline.files.images.ERROR_CODES``, and words.

    Args:
        error: what its reader raised.
        data: the encoded file.
    """
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if isinstance(error, Image.DecompressionBombError | MemoryError):
        return "too_large", text
    if isinstance(error, UnidentifiedImageError):
        other = _other_format(data)
        if other is not None:
            return "unsupported_format", f"{other}; convert it to JPEG or PNG"
        if not _SIGNATURES.match(data):
            return "not_an_image", f"{len(data)} bytes that begin with {repr(data[:8])[1:]}"
        if data.endswith(_ENDS):
            return "unreadable", "the header is damaged"
        return "truncated", f"the header is cut off or damaged ({len(data)} bytes)"
    # WebP stores its length in the header; its reader only reports failure.
    cut = data[:4] == b"RIFF" and int.from_bytes(data[4:8], "little") + 8 > len(data)
    if cut or isinstance(error, EOFError) or _TRUNCATED.search(text):
        return "truncated", text
    return "unreadable", text


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
        with reading_header():
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
