"""Images from and a label table to an object store: a real S3 server on loopback."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import boto3
import numpy as np
import pyarrow.dataset as ds
import pytest
from PIL import Image

from pipeline.files.storage import open_storage
from pipeline.table.labels import iter_rows

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def _masks(folder: str) -> dict[bytes, tuple[bytes, bytes]]:
    """Both maps of each labelled image, by its hash."""
    rows = [row for row in iter_rows(folder) if row["status"] == "ok"]
    return {row["sha256"]: (row["mask"]["bytes"], row["confidence"]["bytes"]) for row in rows}


def test_from_s3_to_s3(
    maskmill_here: Callable[..., subprocess.CompletedProcess[str]],
    maskmill_own_ray: Callable[..., subprocess.CompletedProcess[str]],
    maskmill_joined: Callable[..., subprocess.CompletedProcess[str]],
    toy_images: Path,
    tmp_path: Path,
    s3: dict[str, str],
) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    client.create_bucket(Bucket="results")
    here = tmp_path / "images"
    here.mkdir()
    for path in sorted(toy_images.iterdir())[:10]:
        shutil.copy(path, here)
    scenes = [np.asarray(Image.open(path)) for path in sorted(here.iterdir())[:2]]
    Image.fromarray(np.concatenate(scenes)).save(here / "large.tif")  # read in windows
    for path in here.iterdir():
        client.upload_file(str(path), "photos", f"2026/{path.name}")
    client.put_object(Bucket="photos", Key="2026/broken.jpg", Body=b"no image")

    windows = ("max_pixels=10000", "large_window=96", "large_overlap=32")
    toy = ["--ontology", "toyworld", "--recipe", "toy", *(word for one in windows for word in ("--set", one))]
    command = [
        "label", "--images", "s3://photos/2026", *toy, "--output", "s3://results/run",
        "--max-failure-rate", "0.2",
    ]  # fmt: skip
    done = maskmill_own_ray(*command, **s3)
    assert done.returncode == 0, done.stderr
    assert "Labelled 11 images" in done.stderr and "1 failed: 1 not_an_image" in done.stderr
    assert s3["AWS_SECRET_ACCESS_KEY"] not in done.stderr
    storage = open_storage("s3://results/run")
    table = ds.dataset(storage.path("labels"), filesystem=storage.arrow_filesystem()).to_table()
    status = dict(zip(table["uri"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert len(status) == table.num_rows == 12
    assert status.pop("s3://photos/2026/broken.jpg") == "not_an_image"
    assert set(status.values()) == {"ok"}
    assert not storage.exists("lease.json")
    record = storage.read_json("dataset.json")
    assert record["counts"]["labelled"] == 11
    told = storage.read_json("status.json")
    assert (told["finished"], told["done"], told["failures"]) == ("ok", 12, {"not_an_image": 1})
    assert s3["AWS_SECRET_ACCESS_KEY"] not in str(told)
    assert s3["AWS_SECRET_ACCESS_KEY"] not in str(record)

    local = maskmill_joined(
        "label", "--images", here, *toy, "--output", tmp_path / "table", "--tracking", "off"
    )
    assert local.returncode == 0, local.stderr
    masks = _masks("s3://results/run")
    assert len(masks) == 11 and masks == _masks(str(tmp_path / "table"))

    # A folder marker, as consoles make them, is no image and no part.
    client.put_object(Bucket="results", Key="run/labels/", Body=b"")
    client.put_object(Bucket="photos", Key="2026/", Body=b"")
    again = maskmill_here(*command, **s3)
    assert again.returncode == 0 and "Nothing new" in again.stderr, again.stderr

    parts = storage.list("labels")
    client.put_object(Bucket="results", Key="run/labels/copy.parquet", Body=storage.read_bytes(parts[-1]))
    storage.write_bytes(parts[0], storage.read_bytes(parts[0])[:-50])
    client.put_object(
        Bucket="photos", Key="2026/broken.jpg", Body=sorted(toy_images.iterdir())[10].read_bytes()
    )
    bad = maskmill_here("verify", "s3://results/run", "--images", "s3://photos/2026", "--hashes", **s3)
    assert bad.returncode == 1, bad.stdout
    assert all(f"[{kind}]" in bad.stdout for kind in ("part_unreadable", "part_copied", "image_changed"))
    changed = maskmill_own_ray(*command, "--changed", **s3)
    assert changed.returncode == 0 and "images again" in changed.stderr, changed.stderr
    whole = maskmill_here("verify", "s3://results/run", "--images", "s3://photos/2026", "--hashes", **s3)
    assert whole.returncode == 0 and "12 rows" in whole.stdout, whole.stdout
    assert storage.read_json("dataset.json")["counts"]["labelled"] == 12
    assert len(storage.list("set_aside")) == 2
