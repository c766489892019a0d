"""An object store on loopback, behind a server that can be told to fail."""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import fsspec

Fault = tuple[int, str] | Literal["cut"] | None
"""The status and the code of S3 to answer with, or "cut": half of the true answer."""


SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.WARNING)  # it prints every request
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
"""Serves until its standard input is closed, which the end of its parent does too."""


@contextlib.contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """An empty object store; the environment that reaches it, which is also set in this process.

    It has a process to itself: all stores of one process would share their buckets.
    """
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None and server.stdout is not None
        host, port = server.stdout.readline().split()
        reached = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "not-a-real-key",
            "AWS_SECRET_ACCESS_KEY": "not-a-real-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        try:
            with reached_by(reached):
                yield reached
        finally:
            server.stdin.close()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


@contextlib.contextmanager
def changed_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables of this process, and at the end undo whatever has changed since.

    ``mock.patch.dict`` would remove and make again all variables while threads look some up, which can crash
    before glibc 2.41 (see ``pipeline.cluster.session.ray_session``).
    """
    before = dict(os.environ)

    def change(to: Mapping[str, str]) -> None:
        for name, value in to.items():
            if os.environ.get(name) != value:
                os.environ[name] = value

    change(values)
    try:
        yield
    finally:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        change(before)


@contextlib.contextmanager
def reached_by(values: Mapping[str, str]) -> Iterator[None]:
    """Make this process reach an object store."""
    with changed_environment(values):
        # fsspec keeps its clients, and with them the address of the server they were made for.
        fsspec.filesystem("s3").clear_instance_cache()
        yield
        fsspec.filesystem("s3").clear_instance_cache()


class FaultyStore:
    """Passes requests on to an object store, and answers some of them with an error instead.

    Args:
        target: URL of the object store.

    Attributes:
        url: of this server.
        fault: called with the method and the path with its query; None passes the request on.
        allows: called with the headers of a request; those for which it is false are denied.
    """

    def __init__(self, target: str) -> None:
        self.fault: Callable[[str, str], Fault] = lambda _method, _path: None
        self.allows: Callable[[Message], bool] = lambda _headers: True
        store, place = self, urlsplit(target)
        assert place.hostname is not None

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.body()
                allowed = store.allows(self.headers)
                fault = store.fault(self.command, self.path) if allowed else (403, "AccessDenied")
                if fault is None or fault == "cut":
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
                    self.wfile.write(content[: len(content) // 2] if fault == "cut" else content)
                self.close_connection |= fault == "cut"

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


@contextlib.contextmanager
def faulty_object_store(reached: Mapping[str, str]) -> Iterator[tuple[FaultyStore, dict[str, str]]]:
    """A faulty server before an object store, and the environment that reaches the store through it.

    Args:
        reached: the environment of ``object_store``.
    """
    store = FaultyStore(reached["AWS_ENDPOINT_URL"])
    # The drivers' own patience is not what is tested.
    through = {**reached, "AWS_ENDPOINT_URL": store.url, "AWS_MAX_ATTEMPTS": "1"}
    try:
        with reached_by(through):
            yield store, through
    finally:
        store.close()
