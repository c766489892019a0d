"""Requests to a real server on loopback."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import psutil

from benchmarks.fuzz.images import encoded
from benchmarks.fuzz.kind import Fault, Kind
from benchmarks.fuzz.mutations import mutate_bytes, mutate_tree

ROOT = Path(__file__).resolve().parents[2]
BOUNDARY = "fuzzfuzzfuzz"
PATHS = (
    "/", "/page.css", "/page.js", "/health", "/api/models", "/api/samples", "/api/samples/0.png",
    "/openapi.json",
    "/api/samples/-1.png", "/api/samples/99999999999999999999.png", "/api/models/toy/load",
    "/api/models/x/load",
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/\u00e9", "/api/segment", "/%00", "//x",
    "/?" + "a" * 5000,
)  # fmt: skip
HEADERS = (
    ("Host", "evil.example"), ("Origin", "http://evil.example"), ("Sec-Fetch-Site", "cross-site"),
    ("Content-Length", "-1"), ("Content-Length", "99999999999"), ("Content-Length", "x"),
    ("Transfer-Encoding", "chunked"), ("Content-Type", "application/json"), ("Content-Type", ""),
    ("Content-Type", "multipart/form-data"), ("Content-Type", "multipart/form-data; boundary="),
    ("Expect", "100-continue"), ("Connection", "close"), ("Range", "bytes=0-"), ("X", "y" * 9000),
    ("Cookie", "\u00ff"),
    ("Upgrade", "websocket"), ("Content-Encoding", "gzip"),
)  # fmt: skip
CLOSED = "closed without an answer"
LONGEST = 20.0
"""Seconds for the end of an answer."""


class Http(Kind):
    """See the package. Owns the server."""

    memory_mb: ClassVar[int] = 3072

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._log = folder / "server.log"
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(
                [
                    sys.executable, "-m", "jobs.cli", "serve", "--model", "toy", "--port", "0",
                    "--per-minute", "0",
                ],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        self._port = self._announced()
        self._seen = self._log.stat().st_size
        self._process = psutil.Process(self._server.pid)
        body = _form(random.Random(0))
        # The model is loaded with the first request.
        self._answer(_request(random.Random(0), "POST", "/api/segment", body), patience=60.0)

    def _announced(self) -> int:
        for _ in range(600):
            found = re.search(r"http://[^/]*:(\d+)/", self._log.read_text(errors="replace"))
            if found:
                return int(found[1])
            if self._server.poll() is not None:
                break
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start: {self._log.read_text(errors='replace')}")

    @classmethod
    def make(cls, rng: random.Random) -> bytes:
        """A request as it goes over the wire."""
        sort = rng.random()
        if sort < 0.05:
            return mutate_bytes(rng, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", most=6)
        if sort < 0.25:
            return _request(
                rng, rng.choice(("GET", "POST", "HEAD", "OPTIONS", "PUT", "X")), rng.choice(PATHS), b""
            )
        path = rng.choice(("/api/segment",) * 4 + ("/api/preview",))
        request = _request(rng, "POST", path, _form(rng))
        return mutate_bytes(rng, request, most=2) if rng.random() < 0.2 else request

    def check(self, data: bytes, rng: random.Random) -> str:
        """Send it, sometimes in part, and read the answer."""
        if rng.random() < 0.05:
            outcome = self._hang_up(data[: rng.randrange(len(data) + 1)])
        else:
            outcome = self._answer(data)
        if rng.random() < 0.1 or outcome == CLOSED:
            health = self._answer(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if not health.startswith("200"):
                raise Fault(f"afterwards /health answers {health}")
        return outcome

    def _hang_up(self, data: bytes) -> str:
        with socket.create_connection(("127.0.0.1", self._port), timeout=10) as link:
            link.sendall(data)
        time.sleep(0.05)
        self._look_at_log()
        return "client hung up"

    def _answer(self, data: bytes, patience: float = 3.0) -> str:
        """Send a request and read the answer.

        If none comes, the server may wait for the rest of a broken request; it is then told that there is
        none, and must come to an end.
        """
        found = b""
        with socket.create_connection(("127.0.0.1", self._port), timeout=patience) as link:
            try:
                link.sendall(data)
                while not _complete(found):
                    try:
                        part = link.recv(1 << 16)
                    except TimeoutError:
                        if link.gettimeout() == LONGEST:
                            raise Fault(f"no end in {LONGEST:g} s; so far {found[:200]!r}") from None
                        link.shutdown(socket.SHUT_WR)
                        link.settimeout(LONGEST)
                        continue
                    if not part:
                        break
                    found += part
            except (ConnectionError, OSError) as error:
                if isinstance(error, TimeoutError):
                    raise Fault(f"nothing was read in {patience:g} s") from None
                # The server refuses a body that it will not read, and closes.
        self._look_at_log()
        return self._outcome(found)

    def _outcome(self, found: bytes) -> str:
        if not found:
            return CLOSED
        status = re.match(rb"HTTP/1\.[01] (\d{3})", found)
        if status is None:
            raise Fault(f"no HTTP: {found[:200]!r}")
        code = int(status[1])
        if code == 500 or code > 503:
            raise Fault(f"status {code}: {found[-500:]!r}")
        head, _, body = found.partition(b"\r\n\r\n")
        if code >= 400 and b"application/json" in head and body.startswith(b"{"):
            told = json.loads(body.split(b"HTTP/1.1")[0])
            if not {"code", "message", "remedy"} <= set(told):
                raise Fault(f"{code} without code, message and remedy: {body[:300]!r}")
            if "<_io" in told["message"] or " object at 0x" in told["message"]:
                raise Fault(f"{code} shows a Python object: {told['message'][:300]}")
            return f"{code} {told['code']}"
        return str(code)

    def _look_at_log(self) -> None:
        if self._server.poll() is not None:
            raise Fault(f"the server ended with {self._server.returncode}")
        with self._log.open("rb") as log:
            log.seek(self._seen)
            new = log.read()
        self._seen += len(new)
        if b"Traceback" in new:
            raise Fault(f"a traceback in the server's log: {new[-2000:].decode(errors='replace')}")

    def peak_mb(self) -> float:
        """The server's."""
        return float(self._process.memory_info().rss) / 2**20

    def close(self) -> None:
        """End the server."""
        self._server.terminate()
        try:
            self._server.wait(15)
        except subprocess.TimeoutExpired:
            self._server.kill()


def _complete(found: bytes) -> bool:
    """Whether an answer is complete."""
    head, end, body = found.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
    return bool(end) and length is not None and len(body) >= int(length[1])


def _request(rng: random.Random, method: str, path: str, body: bytes) -> bytes:
    headers = {"Host": "localhost", "Connection": "close"}
    if body:
        headers |= {
            "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
            "Content-Length": str(len(body)),
        }
    if rng.random() < 0.2:
        headers |= [rng.choice(HEADERS)]
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join(lines).encode("utf-8") + b"\r\n\r\n" + body


def _form(rng: random.Random) -> bytes:
    asked: dict[str, Any] = {
        "model": rng.choice((None, "toy")),
        "prompts": rng.choice(
            ([{"text": "ladybug"}], [{"text": "grass"}, {"text": "cloud"}], [{"image": "e"}], [])
        ),
        "context": rng.choice((None, ["sky", "brick"])),
    }
    text = json.dumps(mutate_tree(rng, asked, most=2)).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        text = mutate_bytes(rng, text)
    image = encoded(rng)
    if rng.random() < 0.4:
        image = mutate_bytes(rng, image)
    parts = [
        (b'name="request"', text),
        (b'name="image"; filename="image"', image),
        (b'name="e"; filename="e"', encoded(rng)),
    ]
    rng.shuffle(parts)
    body = b""
    for disposition, content in parts[: rng.choice((3, 3, 3, 2, 1, 0))]:
        if rng.random() < 0.05:
            disposition = mutate_bytes(rng, disposition, most=2)
        body += b"--%s\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (
            BOUNDARY.encode(),
            disposition,
            content,
        )
    return body + (b"--%s--\r\n" % BOUNDARY.encode() if rng.random() < 0.95 else b"")


KIND = Http
