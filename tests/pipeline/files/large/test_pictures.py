"""Regions of large images are the pixels that the ordinary decoder gives, whatever wrote the file."""

from __future__ import annotations

import io
import itertools
import struct
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.files.images import ImageError, decode
from pipeline.files.large import tiff
from pipeline.files.large.opening import local_file, open_picture
from pipeline.files.large.picture import Picture
from pipeline.files.large.tiff import TiffPicture
from pipeline.files.large.vips import refuse_whole

HEIGHT, WIDTH = 75, 103
RAMP = np.add.outer(np.arange(HEIGHT) * 1.3, np.arange(WIDTH) * 0.7) % 256


def samples(kind: str) -> np.ndarray:
    colours = np.stack([RAMP, 255 - RAMP, RAMP // 2], -1)
    return {
        "grey8": RAMP.astype(np.uint8),
        "rgb8": colours.astype(np.uint8),
        "rgba8": np.concatenate([colours, (RAMP * 3 % 256)[..., None]], -1).astype(np.uint8),
        "grey16": (RAMP * 257).astype(np.uint16),
        "rgb16": (colours * 257).astype(np.uint16),
        "float": (RAMP * 10 - 300).astype(np.float32),
        "int32": (RAMP * 1000).astype(np.int32),
        "bits": RAMP > 128,
    }[kind]


def write(path: Path, values: np.ndarray, **how: Any) -> None:
    tifffile = pytest.importorskip("tifffile")
    file = {name: how.pop(name) for name in ("bigtiff", "byteorder") if name in how}
    colours = values.ndim == 3
    how.setdefault("photometric", "rgb" if colours else "minisblack")
    if colours and values.shape[-1] == 4:
        how["extrasamples"] = ["unassalpha"]
    with tifffile.TiffWriter(path, **file) as out:
        out.write(np.ascontiguousarray(values), **how)


def assembled(picture: Picture, step: tuple[int, int] = (32, 41)) -> np.ndarray:
    """The whole image from its regions, row by row."""
    out = np.empty((picture.height, picture.width, 3), np.uint8)
    for top, left in itertools.product(range(0, picture.height, step[0]), range(0, picture.width, step[1])):
        height, width = min(step[0], picture.height - top), min(step[1], picture.width - left)
        out[top : top + height, left : left + width] = picture.read(top, left, height, width)
    return out


@pytest.mark.parametrize("kind", ["grey8", "rgb8", "rgba8", "grey16", "rgb16", "float", "int32", "bits"])
@pytest.mark.parametrize("layout", [{"tile": (32, 48)}, {"rowsperstrip": 16}])
@pytest.mark.parametrize("file", [{}, {"bigtiff": True}, {"byteorder": ">"}])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiffs_are_read_as_by_the_ordinary_decoder(
    tmp_path: Path, kind: str, layout: dict[str, Any], file: dict[str, Any], compression: str | None
) -> None:
    path = tmp_path / "image.tif"
    write(path, samples(kind), compression=compression, **layout, **file)
    with TiffPicture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture), decode(path.read_bytes()))


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg", "packbits", "group4"])
def test_compressed_strips_of_another_writer(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "image.tif"
    image = Image.fromarray(samples("rgb8"))
    if compression == "group4":
        image = image.convert("1")
    image.save(path, compression=compression, tiffinfo={278: 16})
    with TiffPicture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture), decode(path.read_bytes()))


def test_planes_predictors_and_palettes(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    write(path, np.moveaxis(samples("rgb8"), -1, 0), planarconfig="separate", tile=(32, 48))
    with TiffPicture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture), samples("rgb8"))
    write(path, samples("grey16"), compression="zlib", predictor=True, tile=(32, 48))
    with TiffPicture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture)[..., 0], samples("grey16") >> 8)
    Image.fromarray(samples("rgb8")).quantize(9).save(path, tiffinfo={278: 16})
    with TiffPicture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture), decode(path.read_bytes()))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_lie_upright(tmp_path: Path, orientation: int) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), tile=(32, 48), extratags=[(274, 3, 1, orientation, True)])
    with TiffPicture(path, band=32) as picture:
        whole = decode(path.read_bytes())
        assert (picture.height, picture.width) == whole.shape[:2]
        np.testing.assert_array_equal(assembled(picture), whole)


def test_decoded_tiles_are_held_within_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), tile=(16, 16))
    monkeypatch.setattr(tiff, "CACHE_BYTES", 5 * 16 * 16 * 3)
    with TiffPicture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture), samples("rgb8"))
        assert 0 < picture.cached_bytes <= 5 * 16 * 16 * 3


def test_tiles_that_the_file_leaves_out_are_black(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), tile=(32, 48))
    _set_tag(path, 325, [0])
    with TiffPicture(path, band=32) as picture:
        found = assembled(picture)
    assert not found[:32, :48].any()
    np.testing.assert_array_equal(found[32:], samples("rgb8")[32:])


def _set_tag(path: Path, tag: int, values: list[int]) -> None:
    """Overwrite the first values of a tag of a little-endian TIFF."""
    data = bytearray(path.read_bytes())
    (directory,) = struct.unpack_from("<I", data, 4)
    for index in range(struct.unpack_from("<H", data, directory)[0]):
        at = directory + 2 + 12 * index
        number, kind, count, place = struct.unpack_from("<HHII", data, at)
        if number == tag:
            size = {3: 2, 4: 4}[kind]
            place = place if count * size > 4 else at + 8
            struct.pack_into(f"<{len(values)}{'H' if kind == 3 else 'I'}", data, place, *values)
            path.write_bytes(data)
            return
    raise AssertionError(f"no tag {tag}")


def read_error(path: Path) -> ImageError:
    with pytest.raises(ImageError) as raised, open_picture(path, band=32) as picture:
        assembled(picture)
    return raised.value


def test_a_damaged_tile_is_told_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), tile=(32, 48), compression="zlib")
    data = bytearray(path.read_bytes())
    begin = len(data) - 300  # within a tile of the last row
    data[begin : begin + 200] = bytes(200)
    path.write_bytes(data)
    error = read_error(path)
    assert error.code in ("unreadable", "truncated")
    assert "the tile at row 64, column 48" in error.message


def test_a_file_cut_off_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), tile=(32, 48))
    path.write_bytes(path.read_bytes()[:-100])
    error = read_error(path)
    assert error.code == "truncated"
    assert "the tile at row 64" in error.message


@pytest.mark.parametrize(
    ("tag", "values", "code"),
    [
        (322, [0], "unreadable"),  # tiles without width
        (322, [16], "unreadable"),  # more tiles than have a place
        (256, [2_000_000], "too_large"),
        (257, [400_000], "unreadable"),
    ],
)
def test_hostile_sizes_are_refused(tmp_path: Path, tag: int, values: list[int], code: str) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), tile=(32, 48), bigtiff=False)
    _set_tag(path, tag, values)
    assert read_error(path).code == code


def test_strips_wider_than_memory_are_refused_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), rowsperstrip=16)
    monkeypatch.setattr(tiff, "BAND_BYTES", (32 + 2 * 16) * WIDTH * 3 - 1)
    error = read_error(path)
    assert error.code == "too_large" and "gdal_translate" in error.message
    monkeypatch.setattr(tiff, "TILE_PIXELS", 16 * WIDTH - 1)
    assert "one strip has" in read_error(path).message


def test_random_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    path = tmp_path / "image.tif"
    write(path, samples("rgb8"), tile=(32, 48), compression="zlib")
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(150):
        data = bytearray(good)
        for at in rng.integers(0, 400 if rng.random() < 0.7 else len(data), 4):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            with open_picture(path, band=32) as picture:
                picture.read(0, 0, min(32, picture.height), min(32, picture.width))
        except ImageError:
            pass


@pytest.mark.parametrize("orientation", [1, 2, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_jpeg_and_png_through_libvips(tmp_path: Path, kind: str, orientation: int) -> None:
    pytest.importorskip("pyvips")
    path, exif = tmp_path / "image", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(samples("rgb8")).save(path, kind, exif=exif)
    with open_picture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture), decode(path.read_bytes()))


@pytest.mark.parametrize("kind", ["grey8", "rgba8", "grey16", "bits"])
def test_kinds_of_png(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("pyvips")
    path = tmp_path / "image"
    Image.fromarray(samples(kind)).save(path, "PNG")
    with open_picture(path, band=32) as picture:
        np.testing.assert_array_equal(assembled(picture), decode(path.read_bytes()))


def test_regions_of_a_jpeg_may_overlap(tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    path = tmp_path / "image"
    Image.fromarray(samples("rgb8")).save(path, "JPEG")
    whole = decode(path.read_bytes())
    with open_picture(path, band=32) as picture:
        for top, left in itertools.product((0, 20, 43), (0, 30, 71)):
            np.testing.assert_array_equal(
                picture.read(top, left, 32, 32), whole[top : top + 32, left : left + 32]
            )


def test_jpegs_cut_off_are_told(tmp_path: Path) -> None:
    pytest.importorskip("pyvips")
    path = tmp_path / "image"
    Image.fromarray(samples("rgb8")).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-300])
    assert read_error(path).code == "truncated"


def test_what_must_be_decoded_whole_is_refused_with_a_remedy() -> None:
    made = io.BytesIO()
    Image.fromarray(samples("rgb8")).save(made, "JPEG", progressive=True)
    with pytest.raises(ImageError, match=r"progressive JPEG.*tiled TIFF"):
        refuse_whole(made.getvalue())
    plain = io.BytesIO()
    Image.fromarray(samples("rgb8")).save(plain, "PNG")
    refuse_whole(plain.getvalue())
    interlaced = bytearray(plain.getvalue())
    interlaced[28] = 1
    with pytest.raises(ImageError, match=r"interlaced PNG.*tiled TIFF"):
        refuse_whole(bytes(interlaced))


def test_other_formats_are_refused_with_a_remedy(tmp_path: Path) -> None:
    path = tmp_path / "image"
    Image.fromarray(samples("rgb8")).save(path, "WEBP")
    error = read_error(path)
    assert error.code == "too_large" and "tiled" in error.message
    path.write_bytes(b"no image at all")
    assert read_error(path).code == "not_an_image"


def test_local_files_stay_where_they_are_and_ranges_are_copied(tmp_path: Path) -> None:
    import hashlib

    path = tmp_path / "image.tif"
    path.write_bytes(b"ahead" + b"content" + b"behind")
    with local_file(str(path)) as (place, digest):
        assert place == path
        assert digest == hashlib.sha256(b"aheadcontentbehind").digest()
    with local_file(str(path), start=5, length=7) as (place, digest):
        assert place != path and place.read_bytes() == b"content"
        assert digest == hashlib.sha256(b"content").digest()
    assert not place.exists()


@pytest.mark.parametrize("start", [0, 1])
def test_a_file_larger_than_any_image_is_not_even_hashed(tmp_path: Path, start: int) -> None:
    path = tmp_path / "image.tif"
    with path.open("wb") as file:
        file.write(b"II*\0")
        file.truncate(400 * 10**9)  # it has no blocks on the disk
    began = time.monotonic()
    length = 390 * 10**9 if start else None
    with pytest.raises(ImageError) as raised, local_file(str(path), start=start, length=length):
        pass
    assert raised.value.code == "too_many_bytes" and "TMPDIR" not in raised.value.message
    assert time.monotonic() - began < 60  # hours otherwise


def test_a_copy_without_room_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.tif"
    path.write_bytes(bytes(100))
    monkeypatch.setattr("pipeline.files.large.opening.SPARE_BYTES", 1 << 60)
    with pytest.raises(ImageError, match="TMPDIR") as raised, local_file(str(path), start=1, length=99):
        pass
    assert raised.value.code == "too_many_bytes"
