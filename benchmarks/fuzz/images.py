"""Files of images, and addresses."""

from __future__ import annotations

import io
import os
import random
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
from PIL import Image, PngImagePlugin

from benchmarks.fuzz.kind import Fault, Kind
from benchmarks.fuzz.mutations import mutate_bytes
from pipeline.files.corruptions import CORRUPTIONS
from pipeline.files.images import ERROR_CODES, ImageError, ImageSettings, decode
from pipeline.files.large.opening import local_file, open_picture
from pipeline.labelling.stages import Decode

# Format, modes, and a choice of options for each.
FORMATS: tuple[tuple[str, tuple[str, ...], dict[str, tuple[Any, ...]]], ...] = (
    ("JPEG", ("RGB", "L", "CMYK"), {"quality": (5, 90), "progressive": (False, True), "subsampling": (0, 2)}),
    ("PNG", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"), {"compress_level": (0, 6)}),
    ("WEBP", ("RGB", "RGBA"), {"lossless": (False, True), "quality": (5, 90)}),
    (
        "TIFF",
        ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F"),
        {"compression": (None, "tiff_lzw", "tiff_adobe_deflate", "packbits")},
    ),
    ("BMP", ("1", "L", "P", "RGB"), {}),
    ("GIF", ("L", "P", "RGB"), {}),
    ("AVIF", ("RGB", "RGBA"), {"quality": (20, 80)}),
    ("JPEG2000", ("L", "RGB", "RGBA"), {}),
    ("PPM", ("1", "L", "RGB"), {}),
    ("ICO", ("RGBA",), {}),
    ("TGA", ("RGB",), {}),
)
FOREIGN = (
    b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x00\x00\x00\x00WEBP", b"II*\x00",
    b"MM\x00*",
    b"8BPS\x00\x01" + bytes(40), b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html></html>", b"%PDF-1.4",
    b"PK\x03\x04", b"\x00\x00\x00\x20ftypheic" + bytes(24), b"P6\n99999 99999\n255\n", b"\xff\x0a",
    b"%!PS-Adobe",
)  # fmt: skip


class Images(Kind):
    """See the package."""

    memory_mb: ClassVar[int] = 2048

    @classmethod
    def make(cls, rng: random.Random) -> bytes:
        """A file of any format, mutated."""
        if rng.random() < 0.03:
            return mutate_bytes(rng, rng.choice(FOREIGN))
        data = encoded(rng)
        if rng.random() < 0.05:
            data = data[: rng.randrange(len(data) + 1)] + encoded(rng)
        return mutate_bytes(rng, data)

    def check(self, data: bytes, rng: random.Random) -> str:
        """Decode it, and send it or an odd address through the stage."""
        outcome = "ok"
        try:
            image = decode(data)
            if (
                image.dtype != np.uint8
                or image.ndim != 3
                or image.shape[2] != 3
                or not image.flags.c_contiguous
            ):
                raise Fault(f"decoded to {image.dtype} {image.shape}")
        except ImageError as error:
            outcome = self._code(error.code, error.message)
        settings = ImageSettings(
            scale=(rng.choice((1, 64, 2048)), rng.choice((1, 32, 512))),
            keep_ratio=rng.random() < 0.5,
            resize=rng.choice(("opencv", "antialias")),
            max_pixels=rng.choice((1, 1000, 100_000_000)),
            corruption=f"{rng.choice(sorted(CORRUPTIONS))}:{rng.randint(1, 5)}" if rng.random() < 0.2 else "",
        )
        path = self.folder / "image"
        path.write_bytes(data)
        uris = [str(path)] + ([self._address(rng)] if rng.random() < 0.1 else [])
        table = pa.table({"id": pa.array(range(len(uris)), pa.int64()), "uri": uris})
        rows = [row for part in Decode(settings)(table) for row in part.to_pylist()]
        if [row["id"] for row in rows] != list(range(len(uris))):
            raise Fault(f"{len(rows)} rows for {len(uris)} images")
        for row in rows:
            if row["status"] == "ok" and row["address"] is not None:
                self._read_windows(row, settings, rng)
            elif row["status"] == "ok":
                expected = row["network_height"] * row["network_width"] * 3
                if len(row["pixels"]) != expected or min(row["height"], row["width"]) < 1:
                    raise Fault(f"a row of {len(row['pixels'])} bytes, not {expected}")
            else:
                self._code(row["status"], row["error"])
        return outcome

    def _read_windows(self, row: dict[str, Any], settings: ImageSettings, rng: random.Random) -> None:
        """Read some of a large image, as it is read when it is labelled."""
        try:
            with (
                local_file(row["address"], start=row["offset"] or 0, length=row["length"]) as (path, _),
                open_picture(path, band=settings.large_window) as picture,
            ):
                height, width = (rng.randint(1, min(side, 512)) for side in (picture.height, picture.width))
                # From top to bottom, as the windows of an image are.
                for top in sorted(rng.randint(0, picture.height - height) for _ in range(3)):
                    left = rng.randint(0, picture.width - width)
                    pixels = picture.read(top, left, height, width)
                    if pixels.dtype != np.uint8 or pixels.shape != (height, width, 3):
                        raise Fault(f"a window of {pixels.dtype} {pixels.shape}, not {(height, width, 3)}")
        except ImageError as error:
            self._code(error.code, error.message)
        except OSError:
            pass  # a row with the code ``unreadable``

    def _code(self, code: str, message: str) -> str:
        if code not in ERROR_CODES:
            raise Fault(f"unknown code {code!r}")
        if not message.strip() or "<_io" in message or " object at 0x" in message:
            raise Fault(f"{code}: {message[:300]!r} is no message")
        return code

    def _address(self, rng: random.Random) -> str:
        """An address that is no ordinary file."""
        place = self.folder / "odd"
        if place.is_symlink() or place.exists():
            place.unlink()
        match rng.randrange(8):
            case 0:
                place.symlink_to(place)
            case 1:
                os.mkfifo(place)
            case 2:
                return "/dev/zero"
            case 3:
                return str(self.folder)
            case 4:
                return rng.choice(("", "\0", "x" * 5000, "nosuch://x/y", "file:///nowhere", "/proc/self/mem"))
            case 5:
                return str(place / "below")
            case 6:
                place.symlink_to("/dev/stdin")
            case _:
                place.write_bytes(b"")
        return str(place)


def encoded(rng: random.Random) -> bytes:
    """A small image in one of the formats."""
    name, modes, options = rng.choice(FORMATS)
    mode = rng.choice(modes)
    size = (rng.choice((1, 7, 16, 33)), rng.choice((1, 8, 17, 40)))
    pixels = np.frombuffer(rng.randbytes(size[0] * size[1] * 4), np.uint8).reshape(size[1], size[0], 4)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        image = Image.fromarray(pixels[..., 0].astype(kind))
    else:
        image = Image.fromarray(pixels, "RGBA").convert("RGB").convert(mode)
    chosen: dict[str, Any] = {key: rng.choice(values) for key, values in options.items()}
    if name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF") and rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.randint(0, 9)
        chosen["exif"] = exif
    if name in ("GIF", "WEBP", "TIFF", "PNG") and rng.random() < 0.2:
        chosen |= {"save_all": True, "append_images": [image.copy()] * rng.randint(1, 3)}
    if name == "PNG" and rng.random() < 0.3:
        info = PngImagePlugin.PngInfo()
        info.add_text("x", "y" * rng.choice((1, 2_000_000)), zip=rng.random() < 0.5)
        chosen["pnginfo"] = info
    buffer = io.BytesIO()
    try:
        image.save(buffer, name, **chosen)
    except (OSError, ValueError, KeyError, RuntimeError):  # this Pillow cannot write that combination
        image.convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


KIND = Images
