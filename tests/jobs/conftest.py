from __future__ import annotations

import contextlib
import functools
import http.client
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import urlsplit

import fsspec
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from jobs.cli import main
from pipeline.toyworld import scenes as toyworld

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 scenes of the toy world as PNG files, 96 px."""
    folder = tmp_path_factory.mktemp("toy")
    scenes, _, _ = toyworld.generate(7, 64, 96)
    for index, scene in enumerate(scenes):
        Image.fromarray(scene).save(folder / f"scene_{index:03d}.png")
    return folder


@pytest.fixture(scope="session")
def maskmill_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Environment of the command: the project importable, text cache of its own, nothing tracked."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "MASKMILL_CACHE": str(tmp_path_factory.mktemp("cache")),
        "RAY_ADDRESS": "",
        "MLFLOW_TRACKING_URI": "off",
    }


@pytest.fixture(scope="session")
def maskmill(maskmill_environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command as a user does, in a process of its own."""

    def run(
        *arguments: object, timeout: float = 900, cores: int | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        kept = sorted(os.sched_getaffinity(0))[:cores] if cores else None
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", *map(str, arguments)],
            cwd=ROOT,
            env=maskmill_environment | environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            preexec_fn=(lambda: os.sched_setaffinity(0, kept)) if kept else None,
        )

    return run


@pytest.fixture(scope="session")
def maskmill_here(
    maskmill_environment: dict[str, str],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in this process, which has imported already what takes seconds to import."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        given = [*map(str, arguments)]
        out, err = io.StringIO(), io.StringIO()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        with (
            mock.patch.dict(os.environ, maskmill_environment | environment),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                main(given)
            except SystemExit as end:
                status = end.code
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        assert isinstance(status, int)
        return subprocess.CompletedProcess(given, status, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def maskmill_joined(
    maskmill_here: Callable[..., subprocess.CompletedProcess[str]], shared_ray: str
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the command in this process, on a cluster that is there already."""
    return functools.partial(maskmill_here, RAY_ADDRESS=shared_ray)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """An object store on loopback; the environment that reaches it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "not-a-real-key",
        "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # fsspec keeps its clients, and with them the address of the server they were made for.
    fsspec.filesystem("s3").clear_instance_cache()
    yield environment
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


class FaultyStore:
    """Passes requests on to the object store of ``s3``, and answers some of them with an error instead.

    Attributes:
        url: of this server.
        fault: called with the method and the path with its query; the status and the code of S3 to answer
            with, or None to pass the request on.
    """

    def __init__(self, target: str) -> None:
        self.fault: Callable[[str, str], tuple[int, str] | None] = lambda _method, _path: None
        store, place = self, urlsplit(target)
        assert place.hostname is not None

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.body()
                fault = store.fault(self.command, self.path)
                if fault is None:
                    connection = http.client.HTTPConnection(place.hostname or "", place.port)
                    connection.request(self.command, self.path, body, dict(self.headers))
                    reply = connection.getresponse()
                    status, headers, content = reply.status, reply.getheaders(), reply.read()
                    connection.close()
                else:
                    status, code = fault
                    headers = [("Content-Type", "application/xml")]
                    content = f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()
                self.send_response(status)
                for name, value in headers:
                    known = name.lower() in ("content-length", "transfer-encoding", "connection", "date")
                    if not known or (name.lower() == "content-length" and self.command == "HEAD"):
                        self.send_header(name, value)
                if self.command != "HEAD":
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def body(self) -> bytes:
                if self.headers.get("Transfer-Encoding") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                content = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    content += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                del self.headers["Transfer-Encoding"]
                return content

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def faulty_s3(s3: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """The object store behind a server that can be told to fail; the environment reaches it through that."""
    store = FaultyStore(s3["AWS_ENDPOINT_URL"])
    s3["AWS_ENDPOINT_URL"] = store.url
    s3["AWS_MAX_ATTEMPTS"] = "1"  # the drivers' own patience is not what is tested
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    yield store
    store.close()
