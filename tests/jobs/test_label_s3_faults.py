"""An object store that refuses, fails and forgets, over real HTTP: told in words, and nothing is lost."""

from __future__ import annotations

import itertools
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import boto3
import fsspec
import pyarrow.dataset as ds
import pytest

from benchmarks.faults.object_store import FaultyStore
from pipeline.files.storage import open_storage

Run = Callable[..., subprocess.CompletedProcess[str]]
LABEL = ("label", "--ontology", "toyworld", "--recipe", "toy", "--tracking", "off")
PHOTOS, TABLE = ("--images", "s3://photos/2026"), ("--output", "s3://results/run")


@pytest.fixture
def photos(faulty_s3: FaultyStore, toy_images: Path) -> list[str]:
    client = boto3.client("s3")
    for bucket in ("photos", "results"):
        client.create_bucket(Bucket=bucket)
        boto3.resource("s3").Bucket(
            bucket
        ).objects.all().delete()  # servers of one process share what they hold
    paths = sorted(toy_images.iterdir())[:10]
    for path in paths:
        client.upload_file(str(path), "photos", f"2026/{path.name}")
    return [f"s3://photos/2026/{path.name}" for path in paths]


def told(done: subprocess.CompletedProcess[str]) -> str:
    """The last words of a failed command: two lines of ours, and no traceback before them."""
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr and "DataContext" not in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert lines[-2].startswith("maskmill: ") and lines[-1].endswith("]"), done.stderr
    return "\n".join(lines[-2:])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "fault", "words"),
    [
        ((*PHOTOS, *TABLE), (403, "AccessDenied"), "no access to s3://photos/2026"),
        ((*PHOTOS, *TABLE), (400, "ExpiredToken"), "credentials for s3://photos/2026 are refused"),
        ((*PHOTOS, *TABLE), (403, "InvalidAccessKeyId"), "are refused"),
        ((*PHOTOS, *TABLE), (503, "SlowDown"), "asks for fewer requests"),
        (("--images", "s3://nowhere/2026", *TABLE), None, "s3://nowhere/2026"),
        (("--images", "s3://photos/2027", *TABLE), None, "there is nothing at s3://photos/2027"),
        ((*PHOTOS, "--output", "s3://nowhere/run"), None, "s3://nowhere/run"),
    ],
)
def test_what_fails_at_once_is_told_before_ray(
    maskmill_here: Run,
    photos: list[str],
    faulty_s3: FaultyStore,
    arguments: tuple[str, ...],
    fault: tuple[int, str] | None,
    words: str,
) -> None:
    faulty_s3.fault = lambda _method, _path: fault
    done = maskmill_here(*LABEL, *arguments)
    assert words in told(done)
    assert "Ray" not in done.stderr


def test_expired_credentials_of_a_list_are_told_before_ray(
    maskmill_here: Run, photos: list[str], faulty_s3: FaultyStore, tmp_path: Path
) -> None:
    (tmp_path / "list.txt").write_text("\n".join(photos))
    faulty_s3.fault = lambda _method, _path: (400, "ExpiredToken")
    done = maskmill_here(*LABEL, "--images", tmp_path / "list.txt", "--output", tmp_path / "out")
    assert f"credentials for {photos[0]} are refused" in told(done) and "Ray" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_list_of_images_that_nobody_answers_for(
    maskmill_here: Run, tmp_path: Path, s3: dict[str, str]
) -> None:
    (tmp_path / "list.txt").write_text("s3://photos/a.png\ns3://photos/b.png\n")
    environment = s3 | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    fsspec.filesystem("s3").clear_instance_cache()
    done = maskmill_here(
        *LABEL, "--images", tmp_path / "list.txt", "--output", tmp_path / "out", **environment
    )
    assert "s3://photos/a.png" in told(done) and "AWS_ENDPOINT_URL" in done.stderr
    assert "Ray" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", ["nonsense", "http://", "http://127.0.0.1:9", "ftp://host"])
def test_an_endpoint_that_is_none(
    maskmill_here: Run, tmp_path: Path, s3: dict[str, str], endpoint: str
) -> None:
    fsspec.filesystem("s3").clear_instance_cache()
    environment = s3 | {"AWS_ENDPOINT_URL": endpoint, "AWS_MAX_ATTEMPTS": "1"}
    done = maskmill_here(*LABEL, *PHOTOS, "--output", tmp_path / "out", **environment)
    assert "s3://photos/2026" in told(done) and "AWS_ENDPOINT_URL" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_bucket_that_may_only_be_written_to_elsewhere(
    maskmill_here: Run, photos: list[str], faulty_s3: FaultyStore
) -> None:
    faulty_s3.fault = lambda method, _path: (403, "AccessDenied") if method == "PUT" else None
    assert "no access to s3://results/run" in told(maskmill_here(*LABEL, *PHOTOS, *TABLE))


def rows(storage_uri: str) -> Counter[str]:
    storage = open_storage(storage_uri)
    table = ds.dataset(storage.path("labels"), filesystem=storage.arrow_filesystem()).to_table()
    assert len(set(table["uri"].to_pylist())) == table.num_rows
    return Counter(table["status"].to_pylist())


@pytest.mark.long
@pytest.mark.cluster
def test_a_run_among_faults(
    maskmill: Run, s3: dict[str, str], photos: list[str], faulty_s3: FaultyStore, tmp_path: Path
) -> None:
    """No right to list the images, marks of folders, bursts of 503, then a token that expires half-way."""
    client = boto3.client("s3")
    for mark in ("run/", "run/labels/"):
        client.put_object(Bucket="results", Key=mark, Body=b"")
    (tmp_path / "list.txt").write_text("\n".join(photos))
    command = (*LABEL, "--images", str(tmp_path / "list.txt"), *TABLE)
    seen: Counter[str] = Counter()
    reads = itertools.count()
    expires_after = 6

    def fault(method: str, path: str) -> tuple[int, str] | None:
        if path.startswith("/photos") and "list-type" in path:
            return 403, "AccessDenied"
        if not path.startswith("/photos/2026/"):
            return None
        seen[path] += 1
        if seen[path] == 1:
            return 503, "SlowDown"
        return (400, "ExpiredToken") if next(reads) >= expires_after else None

    faulty_s3.fault = fault
    stopped = maskmill(*command, **s3)
    message = told(stopped)
    assert (
        "are refused" in message and "Renew" in message and s3["AWS_SECRET_ACCESS_KEY"] not in stopped.stderr
    )
    expires_after = 1000
    done = maskmill(*command, **s3)
    assert done.returncode == 0, done.stderr
    assert rows("s3://results/run") == {"ok": 10}
    assert open_storage("s3://results/run").read_json("dataset.json")["counts"]["images"] == 10
    new = 10 if "new of" not in done.stderr else int(done.stderr.split("Labelling ")[1].split(" new of")[0])
    assert f"Labelled {new} images" in done.stderr


@pytest.mark.long  # a disk that fills in mid-run is the same failure
@pytest.mark.cluster
def test_a_table_that_can_no_longer_be_written(
    maskmill_own_ray: Run, s3: dict[str, str], photos: list[str], faulty_s3: FaultyStore
) -> None:
    def fault(method: str, path: str) -> tuple[int, str] | None:
        return (503, "SlowDown") if method == "PUT" and "/labels/" in path else None

    faulty_s3.fault = fault
    command = (*LABEL, *PHOTOS, "--output", "s3://results/full")
    message = told(maskmill_own_ray(*command, **s3))
    assert "s3://results/full/labels/" in message and "fewer requests" in message
    faulty_s3.fault = lambda _method, _path: None
    done = maskmill_own_ray(*command, **s3)
    assert done.returncode == 0 and "Labelled 10 images" in done.stderr, done.stderr
    assert rows("s3://results/full") == {"ok": 10}
