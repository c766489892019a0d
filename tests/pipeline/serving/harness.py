"""A real server in a thread."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from fastapi import FastAPI
from PIL import Image

from pipeline.serving.app import create_app
from pipeline.serving.limits import Limits
from pipeline.serving.registry import Entry, ModelRegistry
from pipeline.serving.server import make_server


class Reply(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Server(NamedTuple):
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, **headers: str) -> Reply:
        return self._send(urllib.request.Request(self.url + path, headers=_names(headers)))

    def post(
        self,
        path: str,
        files: Mapping[str, bytes] | None = None,
        request: Any = None,
        **headers: str,
    ) -> Reply:
        """A multipart form with files, and ``request`` as JSON (or text as it is)."""
        boundary = uuid.uuid4().hex
        body = b""
        if request is not None:
            text = request if isinstance(request, str) else json.dumps(request)
            body += (
                f'--{boundary}\r\nContent-Disposition: form-data; name="request"\r\n\r\n{text}\r\n'.encode()
            )
        for name, data in (files or {}).items():
            head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"; filename="{name}"\r\n\r\n'
            body += head.encode() + data + b"\r\n"
        body += f"--{boundary}--\r\n".encode()
        given = {"Content-Type": f"multipart/form-data; boundary={boundary}"} | _names(headers)
        return self._send(urllib.request.Request(self.url + path, data=body, headers=given, method="POST"))

    def put(self, path: str, value: Any, **headers: str) -> Reply:
        """JSON, or bytes as they are."""
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        given = {"Content-Type": "application/json"} | _names(headers)
        return self._send(urllib.request.Request(self.url + path, data=data, headers=given, method="PUT"))

    def segment(
        self, image: bytes, request: Any, files: Mapping[str, bytes] | None = None, **headers: str
    ) -> Reply:
        return self.post("/api/segment", {"image": image, **(files or {})}, request, **headers)

    def _send(self, request: urllib.request.Request) -> Reply:
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return Reply(answer.status, answer.headers, answer.read())
        except urllib.error.HTTPError as error:
            return Reply(error.code, error.headers, error.read())


def _names(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in headers.items()}


def maps(reply: Reply) -> list[np.ndarray]:
    """The maps of an answer."""
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in reply.json["maps"]]


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


@contextmanager
def running(entries: list[Entry], limits: Limits, **options: Any) -> Iterator[Server]:
    if limits.load_seconds == Limits.load_seconds:
        # On a busy machine, the first model takes longer than a person should wait for an answer.
        limits = replace(limits, load_seconds=150)
    with serving(create_app(ModelRegistry(entries), limits, **options), limits) as server:
        yield server


@contextmanager
def serving(app: FastAPI, limits: Limits, port: int = 0) -> Iterator[Server]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        server = make_server(app, limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Server(listener.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive(), "the server does not end"
