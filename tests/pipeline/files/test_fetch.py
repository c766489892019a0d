"""Reading bytes from local paths, object stores and web servers, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import fsspec
import numpy as np
import pytest

from models.errors import MaskMillError
from pipeline.files.fetch import digest, fetch
from pipeline.files.images import ImageError


def test_local_paths_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "a photo, 100%.jpg"
    path.write_bytes(b"0123456789")
    for uri in (str(path), f"file://{path}"):
        assert fetch(uri) == b"0123456789"
        assert fetch(uri, start=3, length=4) == b"3456"
        assert fetch(uri, start=8, length=9) == b"89"
        assert fetch(uri, start=2, length=0) == b""
        assert fetch(uri, start=7) == b"789"


def test_memory_scheme() -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/x.png", b"abcdef")
    assert fetch("memory://bucket/x.png") == b"abcdef"
    assert fetch("memory://bucket/x.png", start=1, length=2) == b"bc"


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("{tmp}/nowhere.jpg", "not_found"),
        ("{tmp}/file/inside.jpg", "not_found"),
        ("{tmp}", "not_a_file"),
        ("{tmp}/with\0zero", "unreadable"),
        ("{tmp}/" + "n" * 300, "unreadable"),
        ("file://{tmp}/nowhere.jpg", "not_found"),
        ("memory://nowhere/at/all.jpg", "not_found"),
        ("gopher://example/x.jpg", "unsupported_uri"),
    ],
)
def test_fetch_codes(tmp_path: Path, uri: str, code: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ImageError) as caught:
        fetch(uri.format(tmp=tmp_path))
    assert caught.value.code == code


@pytest.fixture
def photos(bucket: str) -> str:
    """URI of a folder of an object store with one object."""
    name = bucket.removeprefix("s3://").partition("/")[0]
    boto3.client("s3").put_object(Bucket=name, Key="a/b.png", Body=b"0123456789")
    return f"s3://{name}"


def test_s3(photos: str) -> None:
    assert fetch(f"{photos}/a/b.png") == b"0123456789"
    assert fetch(f"{photos}/a/b.png", start=2, length=3) == b"234"
    for missing in (f"{photos}/a/c.png", "s3://no-such-bucket/a.png"):
        with pytest.raises(ImageError) as caught:
            fetch(missing)
        assert caught.value.code == "not_found"


class Flaky(fsspec.AbstractFileSystem):
    """A file system whose reads fail in a given way for some time."""

    protocol = "flaky"
    cachable = False
    failures: list[Exception] = []  # noqa: RUF012 (shared with the test on purpose)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        if Flaky.failures:
            raise Flaky.failures.pop()
        return b"content"


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.mark.parametrize(
    "error", [TimeoutError("slow"), ConnectionResetError("gone"), OSError("503 SlowDown")]
)
def test_what_passes_is_tried_again(error: Exception) -> None:
    waits: list[float] = []
    Flaky.failures = [error] * 3
    assert fetch("flaky://x", sleep=waits.append) == b"content"
    assert len(waits) == 3
    for wait, least in zip(waits, (0.5, 1.0, 2.0), strict=True):
        assert least <= wait <= 1.5 * least
    Flaky.failures = [error] * 9
    with pytest.raises(ImageError) as caught:
        fetch("flaky://x", sleep=waits.append)
    assert caught.value.code == "unavailable" and len(Flaky.failures) == 5


@pytest.mark.parametrize(
    ("error", "code"), [(PermissionError("403"), "permission"), (FileNotFoundError("404"), "not_found")]
)
def test_what_lasts_is_not_tried_again(error: Exception, code: str) -> None:
    Flaky.failures = [error] * 2
    with pytest.raises(ImageError) as caught:
        fetch("flaky://x", sleep=lambda seconds: pytest.fail("waited"))
    assert caught.value.code == code and len(Flaky.failures) == 1


class Endless(BaseHTTPRequestHandler):
    """A web server that answers as strangers' servers do."""

    def do_GET(self) -> None:
        kind = self.path.partition("?")[0].strip("/")
        if kind.isdigit():
            self.send_error(int(kind))
            return
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            if kind == "endless":
                while True:
                    self.wfile.write(b"\0" * 65536)
            if kind == "stalled":
                self.wfile.write(b"\0" * 100)
                self.wfile.flush()
                time.sleep(60)
            else:
                self.wfile.write(b"content")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def fetch_error(uri: str, **options: Any) -> ImageError:
    with pytest.raises(ImageError) as caught:
        fetch(uri, **options)
    return caught.value


@pytest.mark.parametrize(
    ("status", "code"),
    [(404, "not_found"), (410, "not_found"), (401, "permission"), (403, "permission"), (400, "unreadable")],
)
def test_what_a_web_server_refuses_is_not_asked_again(web: str, status: int, code: str) -> None:
    error = fetch_error(f"{web}/{status}?sig=hunter2", sleep=lambda _: pytest.fail("waited"))
    assert error.code == code and "hunter2" not in error.message


def test_web_servers_that_fail_or_do_not_end(web: str) -> None:
    assert fetch(f"{web}/x.jpg?sig=hunter2") == b"content"
    waits: list[float] = []
    assert fetch_error(f"{web}/503", sleep=waits.append).code == "unavailable" and len(waits) == 3
    assert fetch_error(f"{web}/endless", max_bytes=10_000_000).code == "too_many_bytes"
    began = time.monotonic()
    stalled = fetch_error(f"{web}/stalled", patience=0.3, sleep=lambda _: pytest.fail("waited"))
    assert stalled.code == "unavailable" and "0.3 s" in stalled.message
    assert time.monotonic() - began < 30


def test_only_regular_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "itself").symlink_to("itself")
    (tmp_path / "broken").symlink_to("nothing")
    (tmp_path / "null").symlink_to("/dev/zero")
    monkeypatch.chdir(tmp_path)  # addresses of sockets are short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    codes = {"pipe": "not_a_file", "socket": "not_a_file", "null": "not_a_file", ".": "not_a_file"}
    for name, code in {**codes, "itself": "unreadable", "broken": "not_found"}.items():
        assert fetch_error(str(tmp_path / name), sleep=lambda _: None).code == code, name


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse.tif"
    with path.open("wb") as file:
        file.truncate(400_000_000_000)
    assert fetch_error(str(path)).code == "too_many_bytes"
    assert fetch_error(str(path), length=10**11).code == "too_many_bytes"
    assert fetch(str(path), start=399_999_999_990) == bytes(10)
    with path.open("wb") as file:
        file.truncate(20_000_000)  # more than one piece
        file.seek(19_999_999)
        file.write(b"!")
    data = fetch(str(path), max_bytes=20_000_000)
    assert len(data) == 20_000_000 and data[-1:] == b"!"


def test_what_is_hashed_may_be_larger_than_what_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = bytes(range(256)) * 100
    (tmp_path / "image").write_bytes(data)
    uri = str(tmp_path / "image")
    monkeypatch.setattr("pipeline.files.fetch.PIECE_BYTES", 999)
    assert digest(uri) == hashlib.sha256(data).digest()
    assert digest(uri, start=100, length=5000) == hashlib.sha256(data[100:5100]).digest()
    monkeypatch.setattr("pipeline.files.fetch.max_bytes", lambda pixels: len(data) - 1 + (pixels == 1 << 30))
    with pytest.raises(ImageError, match="the limit is"):
        fetch(uri, max_bytes=len(data) - 1)
    assert digest(uri) == hashlib.sha256(data).digest()
    with pytest.raises(ImageError) as raised:
        digest(str(tmp_path / "gone"))
    assert raised.value.code == "not_found"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ESTALE, "unavailable"), (errno.EIO, "unreadable"), (errno.ENODEV, "unavailable")],
)
def test_faults_of_a_network_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: str
) -> None:
    real = os.stat

    def fails(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("share.jpg"):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "stat", fails)
    assert fetch_error(str(tmp_path / "share.jpg"), sleep=lambda _: None).code == code


def test_a_read_that_never_returns_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(os, "stat", lambda *_, **__: released.wait(20))
    try:
        error = fetch_error(str(tmp_path / "dead.jpg"), patience=0.2, sleep=lambda _: pytest.fail("waited"))
    finally:
        released.set()
    assert error.code == "unavailable"


def test_objects_in_pieces(photos: str) -> None:
    client = boto3.client("s3")
    for size in (0, 8 << 20, (16 << 20) + 5):
        body = np.random.default_rng(size).bytes(size)
        client.put_object(Bucket=photos.removeprefix("s3://"), Key="pieces", Body=body)
        assert fetch(f"{photos}/pieces") == body
    assert fetch_error(f"{photos}/pieces", max_bytes=9_000_000).code == "too_many_bytes"


@pytest.mark.parametrize("uri", ["s3://key:hunter2@photos/a.png", "https://hunter2@host/a.png"])
def test_a_password_in_an_address_is_refused_and_not_repeated(uri: str) -> None:
    error = fetch_error(uri)
    assert error.code == "unsupported_uri" and "hunter2" not in error.message


def test_expired_credentials_are_no_fault_of_the_image() -> None:
    Flaky.failures = [PermissionError("The provided token has expired.")]
    with pytest.raises(MaskMillError) as caught:
        fetch("flaky://x")
    assert caught.value.code == "storage_unreachable" and "Renew" in caught.value.remedy


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="Linux only")
def test_a_file_that_does_not_tell_its_size_is_read_to_its_end() -> None:
    assert os.stat("/proc/self/environ").st_size == 0
    assert fetch("/proc/self/environ") == Path("/proc/self/environ").read_bytes() != b""
