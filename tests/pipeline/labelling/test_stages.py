"""The stages of the labelling flow, one by one."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.files import corruptions, images
from pipeline.files.fetch import fetch, file_version
from pipeline.files.images import ImageSettings
from pipeline.files.large.picture import Picture
from pipeline.files.storage import Storage, open_storage
from pipeline.labelling.attempts import IMAGE_DEATHS, PART_DEATHS, AttemptBook, part_key
from pipeline.labelling.labeller import Prediction, Strip
from pipeline.labelling.stages import Decode, Label, Write, decode
from pipeline.labelling.stages import label as label_stage
from pipeline.table.committed import LABELS_DIR, RELABELLED_DIR, part_files
from pipeline.table.labels import LABEL_SCHEMA, decode_confidence, decode_mask, iter_rows, ok_row
from pipeline.table.lease import LEASE_FILE, Lease
from pipeline.toyworld import scenes as toyworld


class _BrightnessLabeller:
    """Class 1 where the image is bright; refuses black images, as a network may run out of memory on some."""

    def __init__(self, batch_size: int = 3) -> None:
        self.batch_size = batch_size
        self.shapes: list[list[tuple[int, ...]]] = []

    def label(self, images: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]) -> list[Prediction]:
        self.shapes.append([image.shape for image in images])
        if any(not image.any() for image in images):
            raise RuntimeError("all black")
        return [
            Prediction(
                np.full(size, image.mean() > 128, np.uint8), np.full(size, int(image.mean()), np.uint8)
            )
            for image, size in zip(images, sizes, strict=True)
        ]


SETTINGS = ImageSettings(scale=(64, 32), keep_ratio=True, resize="opencv", max_pixels=10_000, large_window=0)


def _write(storage: Storage, run_id: str | None = None) -> Write:
    return Write(storage, run_id or _run_with_lease(storage), ignore_index=255, num_classes=2)


def _run_with_lease(storage: Storage) -> str:
    """Id of the run that holds the lease, which is taken if it is free."""
    if not storage.exists(LEASE_FILE):
        Lease.acquire(storage, on_lost=lambda _reason: None)
    run_id: str = storage.read_json(LEASE_FILE)["run_id"]
    return run_id


def _folder(root: Path, pictures: dict[str, tuple[tuple[int, int], int] | bytes]) -> pa.Table:
    for name, picture in pictures.items():
        if isinstance(picture, bytes):
            (root / name).write_bytes(picture)
        else:
            size, grey = picture
            Image.new("RGB", size, (grey,) * 3).save(root / name)
    uris = [str(root / name) for name in pictures] + [str(root / "nowhere.png")]
    return pa.table({"id": pa.array(range(len(uris)), pa.int64()), "uri": uris})


def test_images_go_through_all_stages(tmp_path: Path) -> None:
    manifest = _folder(
        tmp_path,
        {
            "wide.png": ((80, 40), 200),
            "wide2.png": ((80, 40), 50),
            "tall.png": ((30, 90), 220),
            "wide3.png": ((80, 40), 90),
            "wide4.png": ((80, 40), 91),
            "black.png": ((80, 40), 0),
            "large.png": ((200, 100), 10),
            "empty.png": b"",
        },
    )
    labeller = _BrightnessLabeller()
    decoded = pa.concat_tables(Decode(SETTINGS)(manifest))
    labelled = pa.concat_tables(Label(lambda: labeller)(decoded))
    storage = open_storage(tmp_path / "table")
    (report,) = _write(storage)(labelled).to_pylist()

    (part,) = part_files(storage)
    encoded = pq.read_table(storage.path(part))
    assert encoded.schema.equals(LABEL_SCHEMA)
    rows = {Path(row["uri"]).name: row for row in encoded.to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        "wide.png": "ok",
        "wide2.png": "ok",
        "tall.png": "ok",
        "wide3.png": "ok",
        "wide4.png": "ok",
        "black.png": "label_failed",
        "large.png": "too_large",
        "empty.png": "empty",
        "nowhere.png": "not_found",
    }
    assert rows["black.png"]["error"] == "RuntimeError: all black" and rows["black.png"]["mask"] is None
    assert decode_mask(rows["tall.png"]["mask"]["bytes"]).shape == (90, 30)
    assert (decode_mask(rows["wide.png"]["mask"]["bytes"]) == 1).all()
    assert (decode_confidence(rows["wide2.png"]["confidence"]["bytes"]) == 50).all()
    # Batches hold one size each; the failed one was tried again image by image.
    assert all(len(set(shapes)) == 1 for shapes in labeller.shapes)
    assert max(map(len, labeller.shapes)) == 3
    assert report["done"] == 9
    assert sorted(report["failures"]) == ["empty", "label_failed", "not_found", "too_large"]
    assert min(report[f"{stage}_s"] for stage in ("decode", "label", "encode")) > 0


def test_writing_again_writes_the_same_file(tmp_path: Path) -> None:
    manifest = _folder(tmp_path, {"a.png": ((40, 40), 128), "b.png": ((40, 40), 60)})
    labelled = pa.concat_tables(Label(_BrightnessLabeller)(pa.concat_tables(Decode(SETTINGS)(manifest))))
    storage = open_storage(tmp_path / "table")
    _write(storage)(labelled)
    (part,) = part_files(storage)
    before = storage.read_bytes(part)
    _write(storage)(labelled)
    assert part_files(storage) == [part] and storage.read_bytes(part) == before
    assert storage.list(LABELS_DIR) == [part]  # no temporary file either


def test_rows_that_replace_others_wait_in_a_folder_of_their_own(tmp_path: Path) -> None:
    manifest = _folder(tmp_path, {"a.png": ((40, 40), 128), "b.png": ((40, 40), 60)})
    labelled = pa.concat_tables(Label(_BrightnessLabeller)(pa.concat_tables(Decode(SETTINGS)(manifest))))
    storage = open_storage(tmp_path / "table")
    run_id = _run_with_lease(storage)
    replacing = np.array([0, 2, 77])
    Write(storage, run_id, ignore_index=255, num_classes=2, replacing=replacing)(labelled)
    new, old = (
        [
            row_id
            for part in part_files(storage, folder)
            for row_id in pq.read_table(storage.path(part))["id"].to_pylist()
        ]
        for folder in (LABELS_DIR, RELABELLED_DIR)
    )
    assert (new, sorted(old)) == ([1], [0, 2])


def test_rows_have_the_version_of_the_file_that_was_read(tmp_path: Path) -> None:
    manifest = _folder(tmp_path, {"a.png": ((40, 40), 128), "broken.png": b"no image"})
    rows = pa.concat_tables(Decode(SETTINGS)(manifest)).to_pylist()
    assert [row["version"] for row in rows] == [
        *(file_version(str(tmp_path / name)) for name in ("a.png", "broken.png")), None
    ]  # fmt: skip
    storage = open_storage(tmp_path / "table")
    _write(storage)(
        pa.concat_tables(Label(_BrightnessLabeller)(pa.concat_tables(Decode(SETTINGS)(manifest))))
    )
    kept = {row["id"]: row["version"] for row in iter_rows(storage)}
    assert kept == {row["id"]: row["version"] for row in rows}


def test_a_run_that_lost_its_lease_writes_no_more(tmp_path: Path) -> None:
    manifest = _folder(tmp_path, {"a.png": ((40, 40), 128)})
    labelled = pa.concat_tables(Label(_BrightnessLabeller)(pa.concat_tables(Decode(SETTINGS)(manifest))))
    storage = open_storage(tmp_path / "table")
    with Lease.acquire(storage, on_lost=lambda _reason: None) as lease:
        with pytest.raises(MaskMillError, match="taken over") as caught:
            _write(storage, "an older run")(labelled)
        assert caught.value.code == "output_in_use" and not part_files(storage)
        _write(storage, lease.run_id)(labelled)
        assert len(part_files(storage)) == 1


def test_a_labeller_that_never_works_stops_the_run(tmp_path: Path) -> None:
    manifest = _folder(tmp_path, {f"{index}.png": ((40, 40), 0) for index in range(20)})
    decoded = pa.concat_tables(Decode(SETTINGS)(manifest))
    with pytest.raises(MaskMillError, match="all black") as caught:
        list(Label(_BrightnessLabeller)(decoded))
    assert caught.value.code == "labelling_failed"


def test_stages_cut_their_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = _folder(tmp_path, {f"{index}.png": ((40, 40), 10 + index) for index in range(10)})
    monkeypatch.setattr(decode, "CHUNK_BYTES", 3 * 32 * 32 * 3)
    tables = list(Decode(SETTINGS)(manifest))
    assert [table.num_rows for table in tables] == [3, 3, 3, 2]
    monkeypatch.setattr(label_stage, "CHUNK_BYTES", 4 * 40 * 40 * 2)
    labelled = list(Label(lambda: _BrightnessLabeller(1))(pa.concat_tables(tables)))
    assert sum(table.num_rows for table in labelled) == 11
    assert len(labelled) == 3


def test_byte_ranges_of_a_shard_are_images(tmp_path: Path) -> None:
    members = []
    for grey in (40, 200):
        data = io.BytesIO()
        Image.new("RGB", (32, 32), (grey,) * 3).save(data, "PNG")
        members.append(data.getvalue())
    (tmp_path / "shard.tar").write_bytes(b"".join(members))
    manifest = pa.table(
        {
            "id": pa.array([1, 2], pa.int64()),
            "uri": [str(tmp_path / "shard.tar")] * 2,
            "offset": pa.array([0, len(members[0])], pa.int64()),
            "length": pa.array([len(member) for member in members], pa.int64()),
        }
    )
    decoded = pa.concat_tables(Decode(SETTINGS)(manifest)).to_pylist()
    assert [row["status"] for row in decoded] == ["ok", "ok"]
    assert [np.frombuffer(row["pixels"], np.uint8)[0] for row in decoded] == [40, 200]


@pytest.mark.parametrize("corruption", ["gaussian_noise:3", "jpeg_compression:5"])
def test_corruption_comes_between_decoding_and_resizing(tmp_path: Path, corruption: str) -> None:
    scenes = toyworld.generate(1, 3, 96)[0]
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(tmp_path / f"{index}.png")
    ids = [-(2**63), -1, 2**63 - 1]  # ids are hashes: any signed 64 bits
    manifest = pa.table(
        {"id": pa.array(ids, pa.int64()), "uri": [str(tmp_path / f"{i}.png") for i in range(3)]}
    )
    settings = SETTINGS.replace(corruption=corruption)

    def pixels(settings: ImageSettings, manifest: pa.Table) -> dict[int, bytes]:
        rows = pa.concat_tables(Decode(settings)(manifest)).to_pylist()
        assert [(row["height"], row["width"], row["network_height"]) for row in rows] == [(96, 96, 32)] * 3
        return {row["id"]: row["pixels"] for row in rows}

    corrupted = pixels(settings, manifest)
    name, level = corruptions.parse(corruption)
    for row_id, scene in zip(ids, scenes, strict=True):
        expected = corruptions.corrupt(scene, name, level, seed=row_id % 2**64)
        assert corrupted[row_id] == images.resize(expected, (32, 32)).tobytes()
    assert pixels(settings, manifest.take([2, 0, 1])) == corrupted  # of the image, not of its place
    clean = pixels(SETTINGS, manifest)
    assert clean[-1] == images.resize(scenes[1], (32, 32)).tobytes() != corrupted[-1]


def test_images_differ_in_their_noise(tmp_path: Path) -> None:
    manifest = _folder(tmp_path, {"a.png": ((40, 40), 128), "b.png": ((40, 40), 128)}).slice(0, 2)
    settings = SETTINGS.replace(corruption="gaussian_noise:1")
    first, second = pa.concat_tables(Decode(settings)(manifest))["pixels"].to_pylist()
    assert first != second


def test_unknown_corruptions_are_refused_before_any_image() -> None:
    with pytest.raises(MaskMillError, match="snow"):
        SETTINGS.replace(corruption="snow:1")


def test_fetching_runs_ahead_but_not_away() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work(item: int) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        with lock:
            running -= 1
        return bytes([item])

    with ThreadPoolExecutor(8) as pool:
        futures = decode.prefetch(pool, work, range(100), 4)
        assert [future.result() for future in futures] == [bytes([item]) for item in range(100)]
    assert most <= 4


@pytest.mark.parametrize("thin", [(images.MAX_SIDE, 1), (1, images.MAX_SIDE)])
def test_the_longest_sides_are_labelled_and_longer_ones_are_rows(
    tmp_path: Path, thin: tuple[int, int]
) -> None:
    (tmp_path / "in").mkdir()
    longer = (thin[0] + (thin[0] > 1), thin[1] + (thin[1] > 1))
    table = _folder(tmp_path / "in", {"a.png": (thin, 200), "b.png": (longer, 200)})
    settings = ImageSettings(scale=(64, 32), large_window=0)
    storage = open_storage(tmp_path / "out")
    for part in Decode(settings)(table):
        for labelled in Label(_BrightnessLabeller)(part):
            _write(storage)(labelled)
    rows = {Path(row["uri"]).name: row for row in iter_rows(storage)}
    assert (rows["a.png"]["status"], rows["b.png"]["status"]) == ("ok", "too_large")
    assert decode_mask(rows["a.png"]["mask"]["bytes"]).shape == thin[::-1]


def test_a_full_disk_is_told_with_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.Table.from_pylist(
        [{"id": 1, "uri": "/x", "sha256": bytes(32), "height": 1, "width": 1, "status": "empty", "error": "x",
          "version": None, "decode_s": 0.0, "fetch_s": 0.0, "label_s": 0.0, "batches": 1.0}]
    )  # fmt: skip
    write = _write(open_storage(tmp_path))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MaskMillError) as error:
        write(table)
    assert error.value.code == "disk_full" and str(tmp_path) in error.value.message
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [LEASE_FILE]


def test_large_files_are_not_fetched_far_ahead() -> None:
    running, most = 0, 0
    lock = threading.Lock()

    def work(item: int) -> bytes:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running) if item >= 4 else most
        return bytes(10)

    with ThreadPoolExecutor(8) as pool:
        for future in decode.prefetch(pool, work, range(40), 4, 25):
            assert future.result() == bytes(10)
            with lock:
                running -= 1
    assert most <= 3  # two pending, and the one that was just taken


@pytest.mark.parametrize(("num_classes", "ignore_index"), [(2, 255), (300, 65_535)])
def test_masks_are_as_wide_as_their_ids(tmp_path: Path, num_classes: int, ignore_index: int) -> None:
    dtype = np.uint8 if ignore_index == 255 else np.uint16
    mask = np.array([[1, ignore_index]], dtype)
    table = pa.Table.from_pylist(
        [
            {"id": 1, "uri": "/x", "sha256": bytes(32), "height": 1, "width": 2, "status": "ok",
             "labels": mask.tobytes(), "version": None, "confidence": bytes([200, 9]),
             "segment_agreement": [0.25],
             "decode_s": 0.0, "fetch_s": 0.0, "label_s": 0.0, "batches": 1.0}
        ]
    )  # fmt: skip
    storage = open_storage(tmp_path)
    Write(storage, _run_with_lease(storage), ignore_index=ignore_index, num_classes=num_classes)(table)
    (row,) = iter_rows(storage)
    assert decode_mask(row["mask"]["bytes"]).tolist() == mask.tolist()
    assert [segment["class_id"] for segment in row["segments"]] == [1]
    assert row["segment_agreement"] == [0.25] and row["agreement"] == 0.25


class _WindowLabeller(_BrightnessLabeller):
    """Labels each window's pixels by their brightness."""

    def label_picture(self, picture: Picture, settings: ImageSettings) -> Iterator[Strip]:
        for top in range(0, picture.height, settings.large_window):
            rows = min(settings.large_window, picture.height - top)
            grey = np.concatenate(
                [
                    picture.read(top, left, rows, min(settings.large_window, picture.width - left))[..., 0]
                    for left in range(0, picture.width, settings.large_window)
                ],
                1,
            )
            if not grey.any():
                raise RuntimeError("all black")
            yield Strip(top, (grey > 128).astype(np.uint8), grey)


IN_WINDOWS = SETTINGS.replace(max_pixels=5000, large_window=48, large_overlap=8)


def _tiff(path: Path, grey: np.ndarray, **tags: Any) -> None:
    """A TIFF in strips of 16 rows."""
    Image.fromarray(grey).save(path, compression="tiff_lzw", tiffinfo={278: 16, **tags})


def _through(
    table: pa.Table, output: Path, settings: ImageSettings, labeller: Any = None
) -> dict[str, dict[str, Any]]:
    storage = open_storage(output)
    label = Label(lambda: labeller or _WindowLabeller(), None, "", settings, 255)
    for part in Decode(settings)(table):
        for labelled in label(part):
            _write(storage)(labelled)
    return {Path(row["uri"]).name: row for row in iter_rows(storage)}


def test_images_above_the_limit_are_labelled_in_windows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    large = np.kron(rng.integers(1, 255, (10, 13)), np.ones((10, 10))).astype(np.uint8)
    (tmp_path / "in").mkdir()
    table = _folder(tmp_path / "in", {"small.png": ((60, 40), 200)})
    _tiff(tmp_path / "in" / "large.tif", large)
    (tmp_path / "in" / "shard.bin").write_bytes(b"ahead" + (tmp_path / "in" / "large.tif").read_bytes())
    Image.new("L", (300, 200)).save(tmp_path / "in" / "large.webp")
    _tiff(tmp_path / "in" / "black.tif", np.zeros_like(large))
    (tmp_path / "in" / "cut.tif").write_bytes((tmp_path / "in" / "large.tif").read_bytes()[:-1500])
    names = ["large.tif", "shard.bin", "large.webp", "black.tif"]
    table = pa.table(
        {
            "id": pa.array([10, 0, 11, 12, 13], pa.int64()),
            "uri": [*(str(tmp_path / "in" / name) for name in [names[0], "small.png", *names[1:]])],
            "offset": pa.array([None, None, 5, None, None], pa.int64()),
            "length": pa.array(
                [None, None, (tmp_path / "in" / "large.tif").stat().st_size, None, None], pa.int64()
            ),
        }
    )
    rows = _through(table, tmp_path / "out", IN_WINDOWS)
    assert {name: row["status"] for name, row in rows.items()} == {
        "small.png": "ok",
        "large.tif": "ok",
        "shard.bin": "ok",
        "large.webp": "too_large",
        "black.tif": "label_failed",
    }
    assert "tiled TIFF" in rows["large.webp"]["error"]
    for name in ("large.tif", "shard.bin"):
        row = rows[name]
        content = (tmp_path / "in" / "large.tif").read_bytes()
        assert row["sha256"] == hashlib.sha256(content).digest()
        assert (row["height"], row["width"]) == large.shape
        np.testing.assert_array_equal(decode_mask(row["mask"]["bytes"]), large > 128)
        np.testing.assert_array_equal(decode_confidence(row["confidence"]["bytes"]), large)
        whole = ok_row(
            id=row["id"], uri=row["uri"], sha256=row["sha256"], height=100, width=130,
            labels=(large > 128).astype(np.uint8), confidence=large, ignore_index=255,
        )  # fmt: skip
        for found, right in zip(row["segments"], whole["segments"], strict=True):
            assert found.pop("mean_confidence") == pytest.approx(right.pop("mean_confidence"))
            assert found == right
        assert row["quality"] == pytest.approx(whole["quality"])


def test_windows_are_switched_off_by_a_setting_or_a_corruption(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    _tiff(tmp_path / "in" / "large.tif", np.full((100, 100), 9, np.uint8))
    table = pa.table({"id": pa.array([1], pa.int64()), "uri": [str(tmp_path / "in" / "large.tif")]})
    for number, settings in enumerate(
        (
            IN_WINDOWS.replace(large_window=0, large_overlap=0),
            IN_WINDOWS.replace(corruption="jpeg_compression:1"),
        )
    ):
        rows = _through(table, tmp_path / f"out{number}", settings)
        assert rows["large.tif"]["status"] == "too_large"
        assert "limit" in rows["large.tif"]["error"]


def test_a_damaged_tile_of_a_large_image_is_a_row(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "large.tif"
    _tiff(path, rng.integers(0, 255, (100, 130)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:8000])
    _tiff(tmp_path / "whole.tif", rng.integers(0, 255, (100, 130)).astype(np.uint8))
    damaged = bytearray((tmp_path / "whole.tif").read_bytes())
    damaged[-3000:-2000] = bytes(1000)
    path.write_bytes(damaged)
    table = pa.table({"id": pa.array([1], pa.int64()), "uri": [str(path)]})
    rows = _through(table, tmp_path / "out", IN_WINDOWS)
    assert rows["large.tif"]["status"] in ("unreadable", "truncated")
    assert "the tile at row" in rows["large.tif"]["error"]


def test_large_files_are_told_by_their_header_and_never_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tiff(tmp_path / "large.tif", np.full((100, 100), 9, np.uint8))
    Image.new("L", (60, 40), 200).save(tmp_path / "small.png")
    monkeypatch.setattr(decode, "LARGE_FILE", 1)
    fetched: list[str] = []

    def noting(address: str, **how: Any) -> bytes:
        fetched.append(Path(address).name)
        return fetch(address, **how)

    monkeypatch.setattr(decode, "fetch", noting)
    table = pa.table(
        {
            "id": pa.array([1, 2], pa.int64()),
            "uri": [str(tmp_path / name) for name in ("large.tif", "small.png")],
        }
    )
    rows = _through(table, tmp_path / "out", IN_WINDOWS)
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert fetched == ["small.png"]


def test_files_of_more_bytes_than_fit_are_read_in_windows_if_they_are_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _tiff(tmp_path / "large.tif", np.full((100, 100), 9, np.uint8))
    (tmp_path / "video.tif").write_bytes(bytes(3000))
    monkeypatch.setattr(decode, "max_bytes", lambda _pixels: 100)
    monkeypatch.setattr(decode, "local_path", lambda _uri: None)  # as in an object store
    table = pa.table(
        {
            "id": pa.array([1, 2], pa.int64()),
            "uri": [str(tmp_path / name) for name in ("large.tif", "video.tif")],
        }
    )
    rows = _through(table, tmp_path / "out", IN_WINDOWS)
    assert rows["large.tif"]["status"] == "ok"
    assert rows["video.tif"]["status"] == "too_many_bytes"


def test_a_large_image_that_kills_processes_is_a_row(tmp_path: Path) -> None:
    _tiff(tmp_path / "large.tif", np.full((100, 100), 9, np.uint8))
    table = pa.table({"id": pa.array([7], pa.int64()), "uri": [str(tmp_path / "large.tif")]})
    decoded = pa.concat_tables(Decode(IN_WINDOWS)(table))
    book = AttemptBook()
    for _ in range(PART_DEATHS):
        book.begin(part_key("label", np.array([7])))
    for _ in range(IMAGE_DEATHS):
        book.begin("label 7")
    (row,) = pa.concat_tables(Label(_WindowLabeller, book, "", IN_WINDOWS, 255)(decoded)).to_pylist()
    assert row["status"] == "crashed_worker"
