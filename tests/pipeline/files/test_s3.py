"""Buckets that are read without credentials, or whose readers pay, on a server that denies other requests."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.faults.object_store import FaultyStore, faulty_object_store, object_store, reached_by
from models.errors import MaskMillError
from pipeline.corpus.manifest import build_manifest
from pipeline.files.fetch import fetch, file_version
from pipeline.files.images import ImageError
from pipeline.files.large.opening import local_file
from pipeline.files.s3 import driver_options
from pipeline.files.storage import open_storage

PIXELS = b"\x89PNG\r\n\x1a\n the bytes of an image"
ANONYMOUS = ("AWS_NO_SIGN_REQUEST", "YES")
PAYING = ("AWS_REQUEST_PAYER", "requester")
ALLOWS: Mapping[tuple[str, str], Callable[[Message], bool]] = {
    ANONYMOUS: lambda headers: "Authorization" not in headers,
    PAYING: lambda headers: headers.get("x-amz-request-payer") == "requester",
}


@pytest.fixture(scope="module")
def real_store() -> Iterator[dict[str, str]]:
    """A bucket with an image, a tar archive and a Parquet file of images."""
    archive, table = io.BytesIO(), io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo("a.png")
        entry.size = len(PIXELS)
        tar.addfile(entry, io.BytesIO(PIXELS))
    pq.write_table(pa.table({"image": [{"bytes": PIXELS, "path": "a.png"}]}), table)
    with object_store() as environment:
        client = boto3.client("s3")
        client.create_bucket(Bucket="photos", ACL="public-read-write")
        for key, data in {
            "plain/a.png": PIXELS, "tars/0.tar": archive.getvalue(), "parquet/0.parquet": table.getvalue()
        }.items():  # fmt: skip
            client.put_object(Bucket="photos", Key=key, Body=data)
        yield environment


@pytest.fixture
def store(real_store: dict[str, str]) -> Iterator[FaultyStore]:
    with faulty_object_store(real_store) as (store, _):
        yield store


@pytest.mark.slow
@pytest.mark.parametrize("how", [ANONYMOUS, PAYING], ids=["anonymous", "requester pays"])
def test_images_of_every_source(store: FaultyStore, how: tuple[str, str]) -> None:
    store.allows = ALLOWS[how]
    with pytest.raises(MaskMillError, match="no access") as denied:
        build_manifest("s3://photos/plain")
    assert denied.value.code == "storage_unreachable"
    with pytest.raises(ImageError) as refused:
        fetch("s3://photos/plain/a.png")
    assert refused.value.code == "permission"
    with reached_by(dict([how])):
        for source in ("s3://photos/plain", "s3://photos/tars", "s3://photos/parquet"):
            (row,) = build_manifest(source).to_pylist()
            known = {"start": row.get("offset") or 0, "length": row.get("length")}
            assert fetch(row["uri"], **known) == PIXELS
            assert file_version(row["uri"]) is not None
        with local_file("s3://photos/plain/a.png") as (path, _):
            assert path.read_bytes() == PIXELS


def test_a_table_in_a_bucket_whose_readers_pay(store: FaultyStore, tmp_path: Path) -> None:
    store.allows = ALLOWS[PAYING]
    with reached_by(dict([PAYING])):
        folder = open_storage("s3://photos/table")
        assert folder.create_bytes("lease", b"one")
        assert not folder.create_bytes("lease", b"two")
        assert folder.swap_bytes("lease", b"one", b"two")
        assert folder.swap_bytes("lease", b"two", None)
        folder.write_bytes("labels/a", b"old")
        with folder.new_file("labels/a") as file:
            file.write(b"new")
        folder.move("labels/a", "labels/b")
        assert folder.list("labels") == ["labels/b"]
        pq.write_table(pa.table({"id": [1]}), tmp_path / "part")
        folder.write_bytes("part", (tmp_path / "part").read_bytes())
        assert pq.read_table(folder.path("part"), filesystem=folder.arrow_filesystem()).num_rows == 1
        folder.delete()
        assert folder.list(recursive=True) == []


def test_options_are_those_of_s3_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver_options("s3://bucket/a") == {}
    for name, value in (ANONYMOUS, PAYING):
        monkeypatch.setenv(name, value)
    assert driver_options("s3://bucket/a") == {"anon": True, "requester_pays": True}
    assert driver_options("gs://bucket/a") == {}
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "NO")
    assert driver_options("s3://bucket/a") == {"requester_pays": True}
