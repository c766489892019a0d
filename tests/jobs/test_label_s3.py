"""Images from and a label table to an object store: a real S3 server on loopback."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import boto3
import pyarrow.dataset as ds
import pytest

from pipeline.files.storage import open_storage

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_from_s3_to_s3(
    maskmill: Callable[..., subprocess.CompletedProcess[str]], toy_images: Path, s3: dict[str, str]
) -> None:
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    client.create_bucket(Bucket="results")
    for path in sorted(toy_images.iterdir())[:10]:
        client.upload_file(str(path), "photos", f"2026/{path.name}")
    client.put_object(Bucket="photos", Key="2026/broken.jpg", Body=b"no image")

    command = [
        "label", "--images", "s3://photos/2026", "--ontology", "toyworld", "--recipe", "toy",
        "--output", "s3://results/run", "--max-failure-rate", "0.2",
    ]  # fmt: skip
    done = maskmill(*command, **s3)
    assert done.returncode == 0, done.stderr
    assert "Labelled 10 images" in done.stderr and "1 failed: 1 not_an_image" in done.stderr
    assert s3["AWS_SECRET_ACCESS_KEY"] not in done.stderr
    storage = open_storage("s3://results/run")
    table = ds.dataset(storage.path("labels"), filesystem=storage.arrow_filesystem()).to_table()
    status = dict(zip(table["uri"].to_pylist(), table["status"].to_pylist(), strict=True))
    assert len(status) == table.num_rows == 11
    assert status.pop("s3://photos/2026/broken.jpg") == "not_an_image"
    assert set(status.values()) == {"ok"}
    assert not storage.exists("lease.json")
    record = storage.read_json("dataset.json")
    assert record["counts"]["labelled"] == 10
    told = storage.read_json("status.json")
    assert (told["finished"], told["done"], told["failures"]) == ("ok", 11, {"not_an_image": 1})
    assert s3["AWS_SECRET_ACCESS_KEY"] not in str(told)
    assert s3["AWS_SECRET_ACCESS_KEY"] not in str(record)

    # A folder marker, as consoles make them, is no image and no part.
    client.put_object(Bucket="results", Key="run/labels/", Body=b"")
    client.put_object(Bucket="photos", Key="2026/", Body=b"")
    again = maskmill(*command, **s3)
    assert again.returncode == 0 and "Nothing new" in again.stderr, again.stderr

    parts = storage.list("labels")
    client.put_object(Bucket="results", Key="run/labels/copy.parquet", Body=storage.read_bytes(parts[-1]))
    storage.write_bytes(parts[0], storage.read_bytes(parts[0])[:-50])
    client.put_object(
        Bucket="photos", Key="2026/broken.jpg", Body=sorted(toy_images.iterdir())[10].read_bytes()
    )
    bad = maskmill("verify", "s3://results/run", "--images", "s3://photos/2026", "--hashes", **s3)
    assert bad.returncode == 1, bad.stdout
    assert all(f"[{kind}]" in bad.stdout for kind in ("part_unreadable", "part_copied", "image_changed"))
    changed = maskmill(*command, "--changed", **s3)
    assert changed.returncode == 0 and "images again" in changed.stderr, changed.stderr
    whole = maskmill("verify", "s3://results/run", "--images", "s3://photos/2026", "--hashes", **s3)
    assert whole.returncode == 0 and "11 rows" in whole.stdout, whole.stdout
    assert storage.read_json("dataset.json")["counts"]["labelled"] == 11
    assert len(storage.list("set_aside")) == 2
