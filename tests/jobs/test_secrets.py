"""Signatures of addresses reach no file, log, message or tracking server, and a list signed anew resumes."""

from __future__ import annotations

import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pyarrow.parquet as pq
import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
SIGNED = "X-Amz-Credential=AKIDhunter2%2Fs3&X-Amz-Security-Token=hunter2%2Ftoken&X-Amz-Signature=hunter2{}"


@pytest.fixture
def signed_photos(toy_images: Path) -> Iterator[str]:
    """A web server that gives its pictures only to those who sign."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            place = urlsplit(self.path)
            path = toy_images / place.path.strip("/")
            signed = parse_qs(place.query).get("X-Amz-Signature", [""])[0].startswith("hunter2")
            self.send_response(200 if signed and path.is_file() else 404 if signed else 403)
            self.end_headers()
            if signed and path.is_file():
                self.wfile.write(path.read_bytes())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def files_with(word: bytes, folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if path.is_file() and word in path.read_bytes()]


@pytest.mark.cluster
@pytest.mark.slow
def test_no_byte_of_a_signature_is_kept(
    maskmill_joined: Run, signed_photos: str, toy_images: Path, tmp_path: Path
) -> None:
    names = [path.name for path in sorted(toy_images.iterdir())[:3]] + ["missing.png"]
    results = tmp_path / "results"
    results.mkdir()
    environment = {
        "MLFLOW_TRACKING_URI": f"sqlite:///{results}/mlruns.db",
        "MASKMILL_CACHE": str(results / "cache"),
    }

    def label(turn: int) -> subprocess.CompletedProcess[str]:
        listing = tmp_path / "list.txt"
        listing.write_text("".join(f"{signed_photos}/{name}?{SIGNED.format(turn)}\n" for name in names))
        return maskmill_joined(
            "label", "--images", listing, "--ontology", "toyworld", "--recipe", "toy",
            "--output", results / "table", "--max-failure-rate", "0.5", **environment,
        )  # fmt: skip

    done = label(1)
    assert done.returncode == 0 and "Labelled 3 images" in done.stderr, done.stderr
    rows = [row for part in (results / "table/labels").iterdir() for row in pq.read_table(part).to_pylist()]
    assert {row["uri"]: row["status"] for row in rows} == {
        f"{signed_photos}/{name}": "not_found" if name == "missing.png" else "ok" for name in names
    }
    page = maskmill_joined("show", results / "table", "--output", results / "gallery.html", **environment)
    again = label(2)
    assert again.returncode == 0 and "Nothing new" in again.stderr, again.stderr
    with sqlite3.connect(results / "mlruns.db") as database:
        assert database.execute("select count(*) from runs").fetchone()[0] >= 1
    assert files_with(b"hunter2", results) == []
    assert files_with(b"missing.png", results) != [], "the search finds what is there"
    for finished in (done, page, again):
        assert "hunter2" not in finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("label", "--images", "s3://me:hunter2@bucket/x", "--output", "out", "--classes", "cat"),
        ("label", "--images", "photos", "--output", "s3://me:hunter2@bucket/x", "--classes", "cat"),
        ("show", "s3://me:hunter2@bucket/x"),
        ("segment", "https://me:hunter2@h/x.jpg", "--prompt", "cat", "--output", "out"),
        ("evaluate", "--labels", "s3://me:hunter2@bucket/x", "--images", "p", "--truth", "t"),
        ("train", "maskclip-plus", "--labels", "s3://me:hunter2@bucket/x", "--output", "out"),
        ("train", "clipseg", "--output", "s3://me:hunter2@bucket/x"),
        ("export", "s3://me:hunter2@bucket/x"),
        ("report", "s3://me:hunter2@bucket/x"),
        ("label", "--images", "https://h/list.txt?sig=hunter2", "--output", "out", "--classes", "cat"),
        ("label", "--images", "https://h/x.docx?sig=hunter2", "--output", "out", "--classes", "cat"),
    ],
)
def test_no_command_repeats_a_password(
    maskmill_here: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    done = maskmill_here(*arguments)
    assert done.returncode in (1, 2) and "hunter2" not in done.stdout + done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert files_with(b"hunter2", tmp_path) == [] and not (tmp_path / "out").exists()
