"""Decoding against other readers and hand-made files; sizes against brute force."""

from __future__ import annotations

import io
import pickle
import re
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.files import images
from pipeline.files.fetch import fetch
from pipeline.files.images import ImageError, decode, resize, target_size

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = ROOT.parent / "shared" / "data" / "voc2012_subset" / "JPEGImages"


def blocks(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Coloured blocks of 8 x 8 pixels: survive JPEG well; no symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), np.uint8))


def encode(image: Image.Image | np.ndarray, fmt: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, fmt, **options)
    return buffer.getvalue()


def code_of(data: bytes, **options: Any) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, **options)
    assert caught.value.message
    return caught.value.code


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, color: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG made by hand, independent of any library's writer."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + extra + data + png_chunk(b"IEND", b"")


# --- formats and modes ---


@pytest.mark.parametrize(
    ("fmt", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "tiff_deflate"}),
        ("BMP", {}),
        ("PPM", {}),
        ("JPEG2000", {}),
    ],
)
def test_lossless_formats(fmt: str, options: dict[str, Any]) -> None:
    original = blocks()
    decoded = decode(encode(original, fmt, **options))
    np.testing.assert_array_equal(decoded, original)
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous and decoded.flags.writeable


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_is_what_opencv_reads(options: dict[str, Any]) -> None:
    data = encode(blocks(), "JPEG", **options)
    reference = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    # Two builds of libjpeg: the colour conversion may round differently.
    assert np.abs(decode(data).astype(int) - reference).max() <= 2


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}")
def test_real_photographs_are_what_opencv_reads() -> None:
    for path in sorted(PHOTOS.glob("*.jpg"))[:8]:
        reference = cv2.cvtColor(cv2.imread(str(path), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
        difference = np.abs(decode(fetch(str(path))).astype(int) - reference)
        assert difference.mean() < 0.5, path.name


def test_first_frame_of_an_animation() -> None:
    frames = [Image.fromarray(blocks(seed=i)) for i in range(3)]
    webp = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    np.testing.assert_array_equal(decode(webp), blocks(seed=0))
    few = [Image.fromarray(np.full((16, 16, 3), color, np.uint8)) for color in ((255, 0, 0), (0, 0, 255))]
    gif = encode(few[0], "GIF", save_all=True, append_images=few[1:])
    np.testing.assert_array_equal(decode(gif), np.asarray(few[0]))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation(fmt: str, orientation: int) -> None:
    """The stored picture is the upright one turned; the tag says how to turn it back (EXIF 2.32, table 4)."""
    upright = blocks()
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(fmt, {})
    decoded = decode(encode(np.ascontiguousarray(stored), fmt, exif=exif, **options))
    assert decoded.shape == upright.shape and decoded.flags.c_contiguous
    assert np.abs(decoded.astype(int) - upright).max() <= (6 if fmt == "JPEG" else 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
def test_damaged_camera_data_costs_nothing(exif: bytes) -> None:
    np.testing.assert_array_equal(decode(encode(blocks(), "PNG", exif=exif)), blocks())


def test_16_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 256).astype(">u2")[None].repeat(4, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in ramp)
    decoded = decode(png(256, 4, 16, 0, rows))
    np.testing.assert_array_equal(decoded[0, :, 0], np.arange(256))
    assert (decoded == decoded[:, :, :1]).all()
    np.testing.assert_array_equal(decode(encode(Image.fromarray(ramp.astype("<u2")), "TIFF")), decoded)


def test_16_bit_colour_is_the_same_as_16_bit_grey() -> None:
    ramp = np.linspace(0, 65535, 300).astype(">u2")
    grey = decode(png(300, 1, 16, 0, b"\0" + ramp.tobytes()))
    color = decode(png(300, 1, 16, 2, b"\0" + ramp.repeat(3).tobytes()))
    np.testing.assert_array_equal(grey, color)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.0, 127.4, 255.0], [0, 127, 255]),
        ([0.0, 257.0 * 100, 65535.0], [0, 100, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
        ([0.0, 1e6, 2e6], [0, 128, 255]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
        ([0.0, np.nan, 1.0], [0, 0, 255]),
        ([0.0, np.inf, 1.0], [0, 255, 255]),
        ([np.nan] * 3, [0, 0, 0]),
        ([-5.0] * 3, [0, 0, 0]),
    ],
)
def test_float_tiff(values: list[float], expected: list[int]) -> None:
    data = encode(Image.fromarray(np.array([values], np.float32)), "TIFF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decode(data)
    np.testing.assert_array_equal(decoded[0, :, 0], expected)


def test_32_bit_tiff() -> None:
    data = encode(Image.fromarray(np.array([[0, 65535, 25700]], np.int32)), "TIFF")
    np.testing.assert_array_equal(decode(data)[0, :, 1], [0, 255, 100])


def test_transparency_is_over_white() -> None:
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 0], rgba[0, :, 3] = 200, [255, 128, 0]
    wanted = [[200, 0, 0], [227, 127, 127], [255, 255, 255]]  # 200 * 128/255 + 255 * 127/255 = 227.4
    for fmt in ("PNG", "TIFF"):
        assert np.abs(decode(encode(rgba, fmt))[0].astype(int) - wanted).max() <= 1
    grey = np.array([[[0, 255], [0, 128], [0, 0]]], np.uint8)
    assert (
        np.abs(decode(encode(Image.fromarray(grey, "LA"), "PNG"))[0, :, 0].astype(int) - [0, 127, 255]).max()
        <= 1
    )


def test_colour_keys_and_palettes_with_transparency() -> None:
    # Colour type 2 with a tRNS chunk: pixels of exactly this colour are transparent.
    key = png_chunk(b"tRNS", struct.pack(">HHH", 10, 20, 30))
    data = png(2, 1, 8, 2, b"\0" + bytes([10, 20, 30, 10, 20, 31]), key)
    assert decode(data).tolist() == [[[255, 255, 255], [10, 20, 31]]]
    palette = png_chunk(b"PLTE", bytes([1, 2, 3, 4, 5, 6])) + png_chunk(b"tRNS", b"\0")
    data = png(2, 1, 8, 3, b"\0" + bytes([0, 1]), palette)
    assert decode(data).tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_one_bit_and_palette() -> None:
    assert decode(png(8, 1, 1, 0, b"\0\xa0"))[0, :4, 0].tolist() == [255, 0, 255, 0]
    data = png(2, 1, 8, 3, b"\0\1\0", png_chunk(b"PLTE", bytes([9, 8, 7, 200, 100, 50])))
    assert decode(data).tolist() == [[[200, 100, 50], [9, 8, 7]]]


def test_cmyk() -> None:
    """No ink is white, full black ink is black, in TIFF (plain) and in JPEG (Adobe stores it inverted)."""
    ink = np.zeros((16, 48, 4), np.uint8)
    ink[:, 16:32, 3] = 255  # black
    ink[:, 32:, 1:3] = 255  # magenta and yellow: red
    image = Image.fromarray(ink, "CMYK")
    jpeg = encode(image, "JPEG", quality=100, subsampling=0)
    assert b"Adobe" in jpeg
    for data in (jpeg, encode(image, "TIFF")):
        decoded = decode(data).astype(int)
        for column, color in ((8, (255, 255, 255)), (24, (0, 0, 0)), (40, (255, 0, 0))):
            assert np.abs(decoded[8, column] - color).max() <= 8


# --- what cannot be read ---


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty"),
        (b"\0" * 4096, "not_an_image"),
        (b"<!doctype html><title>404</title>", "not_an_image"),
        (b"%PDF-1.7 ...", "not_an_image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64, "unsupported_format"),
        (b"\xff\xd8\xff", "truncated"),
        (b"\x89PNG\r\n\x1a\n", "truncated"),
        (encode(blocks(), "PNG")[:60], "truncated"),
        (png(0, 9, 8, 0, b""), "unreadable"),
        (encode(blocks(), "JPEG")[:-200], "truncated"),
        (encode(blocks(), "WEBP")[:-20], "truncated"),
        (encode(blocks(), "GIF")[:-200], "truncated"),
        (encode(blocks(), "BMP")[:-1], "truncated"),
        (encode(blocks(), "TIFF")[:-1], "truncated"),
        (encode(blocks(), "PNG").replace(b"IDAT", b"IDAT\0\0\0", 1), "unreadable"),
    ],
)
def test_bad_input_has_its_code(data: bytes, code: str) -> None:
    assert code_of(data) == code


@pytest.mark.parametrize("thin", [(1_000_001, 1), (1, 1_000_001), (40_000_000, 1)])
def test_a_side_that_no_mask_can_have_is_too_large(thin: tuple[int, int]) -> None:
    assert code_of(png(*thin, 1, 0, b"")) == "too_large"


def test_limits_hold_before_pixels_are_decoded() -> None:
    import tracemalloc

    bomb = png(20_000, 20_000, 1, 0, b"")  # 400 megapixels in 70 bytes
    wide = encode(Image.new("L", (5000, 2001)), "PNG")
    tracemalloc.start()
    assert code_of(bomb) == "too_large"
    assert code_of(wide, max_pixels=10_000_000) == "too_large"
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()
    assert decode(wide, max_pixels=10_005_000).shape == (2001, 5000, 3)


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_metadata_that_unpacks_to_gigabytes_costs_nothing(kind: bytes) -> None:
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    body = head + zlib.compress(b"\0" * 100_000_000, 9)
    assert decode(png(1, 1, 8, 0, b"\0\7", png_chunk(kind, body))).tolist() == [[[7, 7, 7]]]


def tiff(bits: int, channels: int, sample_format: int, pixels: bytes, width: int, height: int) -> bytes:
    """An uncompressed TIFF made by hand, with one strip behind the directory."""
    many = [(258, 3, channels, bits), (339, 3, channels, sample_format)]
    tags = [(256, 4, 1, width), (257, 4, 1, height), (259, 3, 1, 1), (262, 3, 1, 2 if channels >= 3 else 1)]
    tags += [(273, 4, 1, -1), (277, 3, 1, channels), (278, 4, 1, height), (279, 4, 1, len(pixels)), *many]
    start = 8 + 2 + 12 * len(tags) + 4
    extra, entries = b"", b""
    for tag, kind, count, value in sorted(tags):
        if count * (2 if kind == 3 else 4) > 4:
            entries += struct.pack("<HHII", tag, kind, count, start + len(extra))
            extra += struct.pack(f"<{count}H", *[value] * count)
        else:
            entries += struct.pack("<HHI", tag, kind, count)
            entries += struct.pack("<2H", value, value) if kind == 3 else struct.pack("<i", value)
    entries = entries.replace(struct.pack("<i", -1), struct.pack("<i", start + len(extra)))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + extra + pixels


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tiff(32, 3, 3, bytes(4 * 4 * 12), 4, 4), "TIFF of 3 channel(s) of 32 bits, floating-point"),
        (tiff(64, 1, 3, bytes(4 * 4 * 8), 4, 4), "TIFF of 1 channel(s) of 64 bits, floating-point"),
        (tiff(16, 5, 1, bytes(4 * 4 * 10), 4, 4), "TIFF of 5 channel(s) of 16 bits"),
        (b"\xff\xd8\xff\xc1\0\x0b\x0c\0\1\0\1\1\1\x11\0" + bytes(40), "JPEG of 12 bits"),
        (b"\xff\xd8\xff\xf7\0\x0b\x08\0\1\0\1\1\1\x11\0" + bytes(40), "JPEG-LS"),
        (b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0", "icon"),
        (encode(blocks(), "TGA"), "TGA"),
        (b"<?xml version='1.0'?>\n<!-- drawn --><svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"\xef\xbb\xbf<svg></svg>", "SVG"),
        (b"8BPS\0\1" + bytes(30), "PSD"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(30), "JPEG XL"),
        (b"\xff\x0a" + bytes(30), "JPEG XL"),
        (b"\0\0\0\x20ftypavis\0\0\0\0" + bytes(64), "AVIF sequence"),
        (b"\0\0\0\x18ftypcrx \0\0\0\1crx isom" + bytes(64), "CR3"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(64), "CR2"),
        (bytes(128) + b"DICM" + bytes(64), "DICOM"),
    ],
)
def test_other_formats_are_named(data: bytes, words: str) -> None:
    with pytest.raises(ImageError, match=re.escape(words)) as caught:
        decode(data)
    assert caught.value.code == "unsupported_format"


def test_a_raw_photograph_is_not_its_thumbnail() -> None:
    thumbnail = Image.fromarray(blocks())
    assert code_of(encode(thumbnail, "TIFF", tiffinfo={254: 1})) == "unsupported_format"
    assert decode(encode(thumbnail, "TIFF", tiffinfo={254: 2})).shape == (48, 64, 3)  # a page


def test_hostile_headers_take_no_time() -> None:
    began = time.process_time()
    for data in (b"<!--a-->" * 500, b"<?xml" * 800, b"\xff\xd8\xff" + b"\xff\xe0\0\2" * 100_000):
        code_of(data)
    assert time.process_time() - began < 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "F", "I", "I;16", "CMYK", "P"])
def test_large_images_are_converted_in_little_memory(mode: str) -> None:
    """Equal to the same picture in small; above the result and Pillow's image, a few megabytes."""
    import tracemalloc

    tile = Image.fromarray(blocks()).convert("L" if mode in ("F", "I", "I;16") else "RGB")
    if mode in ("F", "I", "I;16"):
        tile = Image.fromarray(np.asarray(tile).astype({"F": "f4", "I": "i4", "I;16": "u2"}[mode]) * 257)
    elif mode == "PA":
        tile = tile.convert("P").convert("PA")
    else:
        tile = tile.convert(mode)
    large = tile.resize((64, 48 * 1000), Image.Resampling.NEAREST)
    for row in range(0, 48 * 1000, 48):
        large.paste(tile, (0, row))
    data = encode(large, "TIFF")
    wanted = decode(encode(tile, "TIFF"))
    tracemalloc.start()
    decoded = decode(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(
        decoded.reshape(1000, 48, 64, 3), np.broadcast_to(wanted, (1000, 48, 64, 3))
    )
    assert peak < decoded.nbytes + 60_000_000


SMALL = {
    (fmt, str(options)): encode(blocks(), fmt, **options)
    for fmt, options in [
        ("JPEG", {}), ("PNG", {}), ("WEBP", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}),
        ("BMP", {}), ("GIF", {}), ("AVIF", {}), ("JPEG2000", {}),
    ]
}  # fmt: skip


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(SMALL)), data=st.data())
def test_damage_gives_a_picture_or_a_code(name: tuple[str, str], data: st.DataObject) -> None:
    damaged = bytearray(SMALL[name])
    for _ in range(data.draw(st.integers(0, 6))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a warning that leaks would be an exception that is no ImageError
        try:
            decoded = decode(cut, max_pixels=1_000_000)
        except ImageError as error:
            assert error.code in images.ERROR_CODES
        else:
            assert decoded.ndim == 3 and decoded.shape[2] == 3 and decoded.dtype == np.uint8


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ImageError("truncated", "9 bytes")))
    assert (error.code, error.message, str(error)) == ("truncated", "9 bytes", "9 bytes")


def test_memory_is_given_back() -> None:
    import psutil

    data = encode(blocks(1600, 1600), "JPEG")
    process = psutil.Process()
    for _ in range(3):
        decode(data)
    before = process.memory_info().rss
    for _ in range(25):
        decode(data)
    assert process.memory_info().rss - before < 30_000_000  # one image is 7.7 MB


def test_light_to_import() -> None:
    heavy = {"torch", "ray", "cv2", "fsspec"}
    code = f"import sys, pipeline.files.images; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True) == "[]\n"


# --- sizes ---


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((375, 500), (2048, 512), (512, 683)),  # VOC, from the protocol
        ((375, 500), (520, 520), (390, 520)),  # Context
        ((1024, 2048), (1024, 512), (512, 1024)),  # Cityscapes
        ((500, 375), (512, 2048), (683, 512)),  # either order, either orientation
        ((1, 10_000), (2048, 512), (1, 2048)),  # would be 0.2 pixels high
        ((10_000, 1), (2048, 512), (2048, 1)),
    ],
)
def test_sizes_of_the_protocols(
    size: tuple[int, int], scale: tuple[int, int], expected: tuple[int, int]
) -> None:
    assert target_size(*size, scale=scale) == expected


def test_without_ratio() -> None:
    assert target_size(375, 500, scale=(224, 112), keep_ratio=False) == (112, 224)


@pytest.mark.parametrize("bad", [(0, 5, (9, 9)), (5, 0, (9, 9)), (5, 5, (0, 9))])
def test_sizes_must_be_positive(bad: tuple[int, int, tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="positive"):
        target_size(bad[0], bad[1], scale=bad[2])


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 3000), st.integers(1, 3000))
def test_it_is_the_largest_size_that_fits(height: int, width: int, a: int, b: int) -> None:
    """Against the definition in whole numbers: of the two limits, the one that binds is met exactly."""
    from fractions import Fraction

    new_height, new_width = target_size(height, width, scale=(a, b))
    long, short = max(a, b), min(a, b)
    factor = min(Fraction(long, max(height, width)), Fraction(short, min(height, width)))
    for new, old in ((new_height, height), (new_width, width)):
        exact = max(Fraction(1), old * factor)
        assert abs(new - exact) <= Fraction(1, 2) + Fraction(1, 10**6)
    assert max(new_height, new_width) <= long and min(new_height, new_width) <= short
    assert max(new_height, new_width) == long or min(new_height, new_width) == short


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 60), st.integers(1, 60), st.integers(0, 99))
def test_opencv_resize_is_four_neighbours(h: int, w: int, height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    result = resize(image, (height, width))
    y = np.clip((np.arange(height) + 0.5) * h / height - 0.5, 0, h - 1)
    x = np.clip((np.arange(width) + 0.5) * w / width - 0.5, 0, w - 1)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    down, right = np.minimum(top + 1, h - 1), np.minimum(left + 1, w - 1)
    fy, fx = (y - top)[:, None, None], (x - left)[None, :, None]
    pixels = image.astype(float)
    upper = pixels[top][:, left] * (1 - fx) + pixels[top][:, right] * fx
    lower = pixels[down][:, left] * (1 - fx) + pixels[down][:, right] * fx
    expected = upper * (1 - fy) + lower * fy
    assert result.shape == (height, width, 3) and result.dtype == np.uint8
    assert np.abs(result - expected).max() <= 1.5  # OpenCV computes with 11-bit weights


def test_the_methods_differ_where_they_should() -> None:
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    antialiased = resize(stripes, (4, 8), method="antialias")
    # The average, but at the border, where the filter covers one stripe more.
    assert np.abs(antialiased[:, 1:-1].astype(int) - 127).max() <= 8
    assert resize(stripes, (8, 64)) is stripes
    with pytest.raises(ValueError, match="unknown method"):
        resize(stripes, (4, 4), method="cubic")  # type: ignore[arg-type]


def test_one_thread() -> None:
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        images.use_one_thread()
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)
