"""The label table: schema, codecs, rows and readers."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from PIL import Image

from models.errors import MaskMillError
from pipeline.files.storage import open_storage
from pipeline.table.labels import (
    LABEL_SCHEMA,
    decode_confidence,
    decode_mask,
    encode_confidence,
    encode_mask,
    failed_row,
    iter_rows,
    ok_row,
    read_ids,
    summarise,
)
from tests.pipeline.table.test_statistics import maps

# --- schema ---


def test_schema_is_the_documented_one():
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})  # what datasets.Image() stores
    segment = pa.struct(
        {
            "class_id": pa.int32(),
            "area": pa.int64(),
            "mean_confidence": pa.float32(),
            "bbox": pa.list_(pa.int32(), 4),
        }
    )
    assert {field.name: field.type for field in LABEL_SCHEMA} == {
        "id": pa.int64(),
        "uri": pa.string(),
        "sha256": pa.binary(32),
        "height": pa.int32(),
        "width": pa.int32(),
        "status": pa.string(),
        "error": pa.string(),
        "mask": image,
        "confidence": image,
        "segments": pa.list_(segment),
        "quality": pa.float32(),
        "agreement": pa.float32(),
        "segment_agreement": pa.list_(pa.float32()),
        "version": pa.string(),
    }


# --- codecs ---


@given(maps())
def test_codecs_round_trip_and_pillow_agrees(pair):
    labels, confidence = pair
    mask, sure = encode_mask(labels), encode_confidence(confidence)
    for data, original, decode, mode in (
        (mask, labels, decode_mask, "L" if labels.dtype == np.uint8 else "I;16"),
        (sure, confidence, decode_confidence, "L"),
    ):
        back = decode(data)
        assert back.dtype == original.dtype
        np.testing.assert_array_equal(back, original)
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.mode) == ("PNG", mode)
            np.testing.assert_array_equal(np.asarray(image), original)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (375, 500)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_codecs_at_odd_shapes(shape, dtype):
    labels = np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    np.testing.assert_array_equal(decode_mask(encode_mask(labels)), labels)
    reversed_view = labels[::-1, ::-1]
    np.testing.assert_array_equal(decode_mask(encode_mask(reversed_view)), reversed_view)
    transposed = np.asfortranarray(labels)
    np.testing.assert_array_equal(decode_mask(encode_mask(transposed)), labels)


def test_read_only_input():
    labels = np.frombuffer(bytes(range(6)), np.uint8).reshape(2, 3)
    np.testing.assert_array_equal(decode_mask(encode_mask(labels)), labels)


def png(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "decode"),
    [
        (b"", decode_mask),
        (b"not a png", decode_mask),
        (b"", decode_confidence),
        (png(np.zeros((4, 4, 3), np.uint8)), decode_mask),
        (png(np.zeros((4, 4, 3), np.uint8)), decode_confidence),
        (png(np.zeros((4, 4), np.uint16)), decode_confidence),
        # A chunk that claims to have 4 GB.
        (png(np.zeros((4, 4), np.uint8))[:33] + b"\xff" * 4 + b"IDAT" + bytes(100), decode_mask),
    ],
)
def test_unreadable_maps(data, decode):
    with pytest.raises(MaskMillError) as error:
        decode(data)
    assert error.value.code == "table_damaged"


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 2), np.int64), np.zeros((2, 2, 1), np.uint8), np.zeros((0, 2), np.uint8)]
)
def test_encoding_anything_else_is_a_mistake_of_the_caller(bad):
    with pytest.raises(AssertionError):
        encode_mask(bad)


# --- rows and readers ---


def example_rows() -> list[dict]:
    labels = np.array([[0, 0, 2], [255, 2, 2]], np.uint8)
    confidence = np.array([[255, 51, 102], [0, 102, 102]], np.uint8)
    known = {"sha256": hashlib.sha256(b"x").digest(), "height": 2, "width": 3}
    return [
        ok_row(id=7, uri="/a.jpg", **known, labels=labels, confidence=confidence, ignore_index=255),
        failed_row(id=-3, uri="/b.jpg", status="not_found", error="no such file"),
        failed_row(id=9, uri="/c.jpg", status="unreadable", error="x" * 9000, sha256=known["sha256"]),
        ok_row(
            id=8, uri="s3://b/ü.png", **known, labels=np.full((2, 3), 300, np.uint16),
            confidence=np.full((2, 3), 255, np.uint8), ignore_index=65_535,
        ),
        failed_row(id=4, uri="/d.jpg", status="not_found", error=None, sha256=None, height=5, width=6),
    ]  # fmt: skip


def write(folder, rows, name="part-0.parquet", **options):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=LABEL_SCHEMA), folder / name, **options)


def test_rows_hold_what_is_documented():
    ok, missing, broken, *_ = example_rows()
    assert list(ok) == list(missing) == LABEL_SCHEMA.names
    assert (ok["status"], ok["error"]) == ("ok", None)
    assert ok["segments"] == [
        {"class_id": 0, "area": 2, "mean_confidence": pytest.approx(0.6), "bbox": [0, 0, 2, 1]},
        {"class_id": 2, "area": 3, "mean_confidence": pytest.approx(0.4), "bbox": [1, 0, 2, 2]},
    ]
    assert {k for k, v in missing.items() if v is not None} == {"id", "uri", "status", "error"}
    assert len(broken["error"]) == 500
    with pytest.raises(AssertionError):
        failed_row(id=1, uri="x", status="ok", error=None)


def test_parquet_round_trip(tmp_path):
    rows = example_rows()
    write(tmp_path, rows)
    back = list(iter_rows(tmp_path))
    for row, again in zip(rows, back, strict=True):
        for name in LABEL_SCHEMA.names:
            if name not in ("segments", "quality"):
                assert again[name] == row[name], name
        if row["status"] == "ok":
            assert again["quality"] == pytest.approx(row["quality"])
            assert [s["bbox"] for s in again["segments"]] == [s["bbox"] for s in row["segments"]]
    with Image.open(io.BytesIO(back[0]["mask"]["bytes"])) as image:
        np.testing.assert_array_equal(np.asarray(image), [[0, 0, 2], [255, 2, 2]])
    np.testing.assert_array_equal(decode_mask(back[3]["mask"]["bytes"]), np.full((2, 3), 300))


@pytest.mark.parametrize("place", ["output", "folder", "storage"])
def test_readers_take_the_output_or_its_folder(tmp_path, place):
    rows = example_rows()
    write(tmp_path / "out" / "labels", rows[:2], "b.parquet")
    write(tmp_path / "out" / "labels", rows[2:], "a.parquet", row_group_size=1)
    write(tmp_path / "out" / "labels", rows, ".hidden.parquet")
    (tmp_path / "out" / "labels" / "notes.txt").write_text("no table")
    source = {
        "output": tmp_path / "out",
        "folder": str(tmp_path / "out" / "labels"),
        "storage": open_storage(tmp_path / "out"),
    }[place]
    assert read_ids(source).tolist() == [9, 8, 4, 7, -3]
    assert read_ids(source).dtype == np.int64
    expected = [{"id": i} for i in (9, 8, 4, 7, -3)]
    for size in (1, 2, 64):
        assert list(iter_rows(source, ["id"], batch_size=size)) == expected


def test_summary(tmp_path):
    rows = example_rows()
    write(tmp_path, rows[:3], "a.parquet", row_group_size=2)
    write(tmp_path, rows[3:], "b.parquet")
    write(tmp_path, [], "empty.parquet")
    assert summarise(tmp_path) == {
        "images": 5,
        "labelled": 2,
        "failed": 3,
        "status": {"not_found": 2, "ok": 2, "unreadable": 1},
        "errors": {"not_found": "no such file", "unreadable": rows[2]["error"]},
        "pixels": 12,
        "ignored_pixels": 1,
        "class_pixels": {"0": 2, "2": 3, "300": 6},
        "class_images": {"0": 1, "2": 1, "300": 1},
        "mean_quality": pytest.approx((rows[0]["quality"] + 1.0) / 2),
    }


def test_failures_only_and_no_table(tmp_path):
    assert read_ids(tmp_path).tolist() == []
    assert list(iter_rows(tmp_path / "none")) == []
    assert summarise(tmp_path)["images"] == 0
    write(tmp_path, example_rows()[1:3])
    summary = summarise(tmp_path)
    assert (summary["images"], summary["labelled"], summary["pixels"]) == (2, 0, 0)
    assert summary["mean_quality"] is None


def test_broken_tables_name_the_file(tmp_path):
    write(tmp_path, example_rows(), "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])
    for read in (read_ids, summarise, lambda t: list(iter_rows(t))):
        with pytest.raises(MaskMillError, match=r"b\.parquet") as error:
            read(tmp_path)
        assert error.value.code == "table_damaged"
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    with pytest.raises(MaskMillError, match="no column id"):
        read_ids(tmp_path)
