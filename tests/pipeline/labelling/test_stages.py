"""The stages of the labelling flow, one by one."""

from __future__ import annotations

import errno
import io
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.errors import MaskMillError
from pipeline.files import corruptions, images
from pipeline.files.fetch import file_version
from pipeline.files.images import ImageSettings
from pipeline.files.storage import Storage, open_storage
from pipeline.labelling import stages
from pipeline.labelling.labeller import Prediction
from pipeline.labelling.stages import Decode, Label, Write
from pipeline.table.committed import LABELS_DIR, RELABELLED_DIR, part_files
from pipeline.table.labels import LABEL_SCHEMA, decode_confidence, decode_mask, iter_rows
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


SETTINGS = ImageSettings(scale=(64, 32), keep_ratio=True, resize="opencv", max_pixels=10_000)


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
    monkeypatch.setattr(stages, "_CHUNK_BYTES", 3 * 32 * 32 * 3)
    tables = list(Decode(SETTINGS)(manifest))
    assert [table.num_rows for table in tables] == [3, 3, 3, 2]
    monkeypatch.setattr(stages, "_CHUNK_BYTES", 4 * 40 * 40 * 2)
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
        futures = stages.prefetch(pool, work, range(100), 4)
        assert [future.result() for future in futures] == [bytes([item]) for item in range(100)]
    assert most <= 4


@pytest.mark.parametrize("thin", [(images.MAX_SIDE, 1), (1, images.MAX_SIDE)])
def test_the_longest_sides_are_labelled_and_longer_ones_are_rows(
    tmp_path: Path, thin: tuple[int, int]
) -> None:
    (tmp_path / "in").mkdir()
    longer = (thin[0] + (thin[0] > 1), thin[1] + (thin[1] > 1))
    table = _folder(tmp_path / "in", {"a.png": (thin, 200), "b.png": (longer, 200)})
    settings = ImageSettings(scale=(64, 32))
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
        for future in stages.prefetch(pool, work, range(40), 4, 25):
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
             "decode_s": 0.0, "fetch_s": 0.0, "label_s": 0.0, "batches": 1.0}
        ]
    )  # fmt: skip
    storage = open_storage(tmp_path)
    Write(storage, _run_with_lease(storage), ignore_index=ignore_index, num_classes=num_classes)(table)
    (row,) = iter_rows(storage)
    assert decode_mask(row["mask"]["bytes"]).tolist() == mask.tolist()
    assert [segment["class_id"] for segment in row["segments"]] == [1]
