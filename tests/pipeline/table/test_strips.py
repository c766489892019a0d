"""Maps in strips are the same PNGs, to every reader, as maps written whole."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.table import strips
from pipeline.table.labels import decode_confidence, decode_mask, encode_confidence, encode_mask
from pipeline.table.statistics import segments, softmin
from pipeline.table.strips import MapTooLarge, MapWriter, PngWriter, png_size, read_strips
from pipeline.table.viewed import decode_maps, shown_maps


def maps(shape: tuple[int, int], dtype: Any, classes: int = 6) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, shape).astype(dtype)
    labels[rng.random(shape) < 0.2] = 255
    return labels, rng.integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(("dtype", "classes"), [(np.uint8, 6), (np.uint16, 40_000)])
@pytest.mark.parametrize("rows", [1, 7, 40])
def test_strips_of_any_height_make_one_map(
    dtype: Any, classes: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strips, "STRIP_PIXELS", 100)  # cuts strips themselves
    labels, confidence = maps((40, 23), dtype, classes)
    writer = MapWriter(40, 23, dtype, ignore_index=255)
    for top in range(0, 40, rows):
        writer.add(labels[top : top + rows], confidence[top : top + rows])
    found = writer.finish()
    np.testing.assert_array_equal(decode_mask(found["mask"]), labels)
    np.testing.assert_array_equal(decode_confidence(found["confidence"]), confidence)
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found["mask"]))), labels)
    assert found["segments"] == segments(labels, confidence, ignore_index=255)
    assert found["softmin"] == softmin(confidence, labels, ignore_index=255)
    assert png_size(found["mask"]) == (40, 23)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_maps_are_read_in_strips(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_PIXELS", 23 * 9)
    labels, confidence = maps((40, 23), dtype)
    for data, right in ((encode_mask(labels), labels), (encode_confidence(confidence), confidence)):
        parts = list(read_strips(data))
        assert [top for top, _ in parts] == [0, 9, 18, 27, 36]
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in parts]), right)
        assert parts[0][1].dtype == right.dtype


def test_damaged_maps_are_told() -> None:
    data = encode_mask(maps((40, 23), np.uint8)[0])
    changed = bytearray(data)
    changed[len(data) // 2] ^= 1
    colours = io.BytesIO()
    Image.new("RGB", (5, 5)).save(colours, "PNG")
    for bad in (b"", data[:20], data[: len(data) // 2], bytes(changed), colours.getvalue()):
        with pytest.raises(MaskMillError) as raised:
            for _ in read_strips(bad):
                pass
        assert raised.value.code == "table_damaged"


def test_too_many_bytes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "MOST_BYTES", 1000)
    writer, rng = PngWriter(100, 100, np.uint8, runs=False), np.random.default_rng(0)
    with pytest.raises(MapTooLarge):
        for _ in range(100):
            writer.add(rng.integers(0, 256, (1, 100)).astype(np.uint8))
        writer.finish()


def test_a_sample_is_every_nth_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "STRIP_PIXELS", 23 * 7)
    labels, _ = maps((40, 23), np.uint16, 40_000)
    np.testing.assert_array_equal(strips.sample(encode_mask(labels), 40 * 23 // 9), labels[::4, ::4])
    np.testing.assert_array_equal(strips.sample(encode_mask(labels), 40 * 23), labels)


def test_large_maps_are_shown_and_verified_in_strips_and_else_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels, confidence = maps((40, 23), np.uint8)
    mask, sure = encode_mask(labels), encode_confidence(confidence)
    monkeypatch.setattr("pipeline.table.labels.MOST_DECODED", 40 * 23 - 1)
    with pytest.raises(MaskMillError) as raised:
        decode_maps(mask, sure, None)
    assert raised.value.code == "map_too_large" and "23 x 40" in raised.value.message
    shown, _ = shown_maps(mask, sure, None)
    np.testing.assert_array_equal(shown, labels)
