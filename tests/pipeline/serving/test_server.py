"""Clients that misbehave, over real sockets: they lose their own connection, and keep nobody else out."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
import pytest

from jobs.serve import entry
from pipeline.serving.limits import Limits
from pipeline.serving.registry import Entry, HeatAnswer, ModelInfo
from tests.pipeline.serving.harness import Server, png

IMAGE = png(np.zeros((32, 32, 3), np.uint8))
FORM = "Content-Type: multipart/form-data; boundary=b\r\n"
PART = b'--b\r\nContent-Disposition: form-data; name="image"; filename="image"\r\n\r\n'


def connect(server: Server, *, read: int | None = None) -> socket.socket:
    client = socket.socket()
    if read is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read)
    client.settimeout(30)
    client.connect(("127.0.0.1", server.port))
    return client


def begin(
    server: Server, *, length: int = 10**6, sent: int = 1000, path: str = "/api/segment"
) -> socket.socket:
    """An upload that stalls."""
    client = connect(server)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{FORM}Content-Length: {length}\r\n\r\n"
    client.sendall(head.encode() + PART + b"x" * sent)
    return client


def answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and all that comes until the server closes; 0 if it closes without an answer."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while chunk := client.recv(65536):
            received += chunk
    return (int(received.split()[1]) if received else 0), received


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    caplog.set_level(logging.WARNING)
    yield caplog
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.fixture(scope="module")
def quick(start: Callable[..., Server]) -> Server:
    """A server that soon loses patience."""
    limits = Limits(
        per_minute=0,
        upload_pause=0.6,
        upload_seconds=1.5,
        header_seconds=1.0,
        answer_pause=1.0,
        answer_seconds=4.0,
        connections=60,
    )
    return start([entry("toy"), large_answers()], limits)


@pytest.fixture(scope="module")
def patient(start: Callable[..., Server]) -> Server:
    """A server that only minds a pause."""
    return start([entry("toy")], Limits(per_minute=0, upload_pause=0.6))


def large_answers() -> Entry:
    """A model whose answer of noise is far larger than what sockets hold back."""

    class Noise:
        def predict(self, image, prompts, context, size):  # type: ignore[no-untyped-def]
            noise = np.random.default_rng(0).integers(0, 255, (len(prompts), 1400, 1400)).astype(np.uint8)
            return HeatAnswer(tuple(prompt.text for prompt in prompts), noise)

    return Entry(ModelInfo(name="noise", kind="clipseg", title="", image=True), Noise)


def asked(prompts: int) -> bytes:
    request = {"model": "noise", "prompts": [{"text": f"w{index}"} for index in range(prompts)]}
    body = PART + IMAGE
    body += b'\r\n--b\r\nContent-Disposition: form-data; name="request"\r\n\r\n'
    body += json.dumps(request).encode() + b"\r\n--b--\r\n"
    head = f"POST /api/segment HTTP/1.1\r\nHost: localhost\r\n{FORM}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether something comes true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def serves(server: Server, client: socket.socket) -> bool:
    """Whether the server, which is in this process, has the other end of a connection."""
    ends = (server.port, client.getsockname()[1])
    found = psutil.Process().net_connections("tcp4")
    return ends in [(one.laddr.port, one.raddr.port) for one in found if one.raddr]


def healthy(server: Server) -> bool:
    try:
        return server.get("/health").status == 200
    except OSError:
        return False  # refused before it was read


def works(server: Server) -> bool:
    for _ in range(2):  # the first may have to load the model
        began = time.monotonic()
        reply = server.segment(IMAGE, {"prompts": [{"text": "grass"}]})
        assert reply.status == 200, reply.body
    return time.monotonic() - began < 8


def test_stalled_uploads_keep_nobody_out(start: Callable[..., Server], log: pytest.LogCaptureFixture) -> None:
    server = start([entry("toy")], Limits(per_minute=0))
    assert server.segment(IMAGE, {"prompts": [{"text": "grass"}]}).status == 200  # loads the model
    stalled = [begin(server) for _ in range(20)]
    try:
        time.sleep(0.3)
        assert works(server)
    finally:
        for client in stalled:
            client.close()


@pytest.mark.slow
def test_an_upload_that_stalls_or_trickles_is_given_up(
    quick: Server, patient: Server, log: pytest.LogCaptureFixture
) -> None:
    status, received = answer(begin(patient))
    assert status == 408 and b"upload_too_slow" in received
    began = time.monotonic()
    client = begin(quick)
    with contextlib.suppress(OSError):
        while time.monotonic() - began < 30:
            client.sendall(b"x")
            time.sleep(0.2)
    assert time.monotonic() - began < 20


@pytest.mark.slow
def test_a_head_that_never_ends_is_given_up(quick: Server, log: pytest.LogCaptureFixture) -> None:
    for start in (b"", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: "):
        began = time.monotonic()
        client = connect(quick)
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 10:
                client.sendall(start)
                start = start and b"a"
                client.settimeout(0.2)
                with contextlib.suppress(TimeoutError):
                    if not client.recv(1):
                        break
        assert time.monotonic() - began < 8
    # The same on a connection that has been used.
    client = connect(quick)
    client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
    began = time.monotonic()
    assert answer(client)[0] == 200 and time.monotonic() - began < 8


def test_a_huge_head_is_refused(quick: Server, log: pytest.LogCaptureFixture) -> None:
    client = connect(quick)
    with contextlib.suppress(OSError):
        client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: " + b"a" * 2**20)
    assert answer(client)[0] in (0, 400)
    assert works(quick)


@pytest.mark.slow
def test_a_client_that_reads_nothing_is_given_up(quick: Server, log: pytest.LogCaptureFixture) -> None:
    client = connect(quick, read=4096)
    client.sendall(asked(8))
    assert until(lambda: serves(quick, client))
    # The answer is ready, and stays where it is for longer than the limit.
    assert until(lambda: not serves(quick, client), 60)
    received = b""
    with contextlib.suppress(OSError):
        while chunk := client.recv(2**20):
            received += chunk
    assert 0 < len(received) < 8 * 1400 * 1400
    # Whoever reads, however slowly, gets all of it.
    client = connect(quick, read=65536)
    client.sendall(asked(1))
    received = b""
    while b"\r\n\r\n" not in received or len(received) < length(received):
        received += client.recv(2**18)
        time.sleep(0.01)
    assert len(received) == length(received)


def length(received: bytes) -> int:
    head, _, _ = received.partition(b"\r\n\r\n")
    declared = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
    return len(head) + 4 + int(declared.split(b":")[1])


@pytest.mark.slow
def test_a_client_that_hangs_up_leaves_no_traceback(quick: Server, log: pytest.LogCaptureFixture) -> None:
    for path in ("/api/segment", "/api/preview"):
        begin(quick, path=path).close()
    client = connect(quick)
    client.sendall(asked(8))
    client.close()  # before its answer
    client = connect(quick, read=4096)
    client.sendall(asked(8))
    client.recv(1)
    client.close()  # in the middle of it
    begin(quick, length=10).close()  # more than was announced
    time.sleep(1)
    assert works(quick)
    assert "Traceback" not in log.text and not [record for record in log.records if record.exc_info]


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: -1",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Content-Length: five",
        b"Content-Length: 999999999999999999999999",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5",
        b"Transfer-Encoding: gzip",
        b"Content-Length: 3",
        b"Transfer-Encoding: chunked",  # followed by what is no chunk
        b"Expect: 100-continue\r\nContent-Length: 100",
        b"Content-Type: multipart/form-data",
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x",
    ],
)
def test_wrong_lengths_and_codings(quick: Server, log: pytest.LogCaptureFixture, head: bytes) -> None:
    client = connect(quick)
    with contextlib.suppress(OSError):
        client.sendall(
            b"POST /api/segment HTTP/1.1\r\nHost: localhost\r\n" + FORM.encode() + head + b"\r\n\r\n"
        )
        client.sendall(b"hello, this is no form and no chunk\r\n" * 3)
        client.shutdown(socket.SHUT_WR)
    assert answer(client)[0] in (0, 100, 400, 408, 413, 415, 501)
    assert quick.get("/health").status == 200


def test_too_many_connections_of_one_client(
    start: Callable[..., Server], log: pytest.LogCaptureFixture
) -> None:
    server = start([entry("toy")], Limits(per_minute=0, connections=60))
    clients = [connect(server) for _ in range(40)]
    refused: list[bytes] = []
    for client in clients:
        client.setblocking(False)

    def look() -> None:
        for client in clients:
            with contextlib.suppress(BlockingIOError):
                refused.extend(filter(None, [client.recv(1000)]))

    assert until(lambda: look() or len(refused) >= 10)
    time.sleep(0.3)
    look()
    assert len(refused) == 10 and all(b" 503 " in told and b'"busy"' in told for told in refused)
    body = json.loads(refused[0].partition(b"\r\n\r\n")[2])
    assert body.keys() == {"code", "message", "remedy"}
    for client in clients:
        client.close()
    assert until(lambda: healthy(server))


def test_uploads_together_are_bounded(start: Callable[..., Server], log: pytest.LogCaptureFixture) -> None:
    server = start([entry("toy")], Limits(per_minute=0, uploading_bytes=400_000, upload_pause=60))
    stalled = [begin(server, sent=90_000) for _ in range(2)]
    # As soon as those have arrived.
    assert until(lambda: b'"busy"' in answer(begin(server, length=60_000, sent=60_000))[1])
    for client in stalled:
        client.close()
    assert until(lambda: server.segment(IMAGE, {"prompts": [{"text": "grass"}]}).status == 200)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/page.css/../../app.py",
        "/api/samples/..%2f..%2fpage.py.png",
        "//etc/passwd",
        "/%00",
        "http://evil.example/etc/passwd",
        "/app.py",
    ],
)
def test_only_the_pages_own_files_are_served(quick: Server, log: pytest.LogCaptureFixture, path: str) -> None:
    client = connect(quick)
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    status, received = answer(client)
    assert status in (400, 404) and b"root:" not in received and b"import" not in received


@pytest.mark.parametrize(
    "hosts",
    [b"Host: evil.example", b"Host: localhost\r\nHost: evil.example", b"", b"Host: localhost, evil.example"],
)
def test_other_hosts_are_refused(quick: Server, log: pytest.LogCaptureFixture, hosts: bytes) -> None:
    client = connect(quick)
    client.sendall(b"GET /api/models HTTP/1.1\r\n" + hosts + b"\r\nConnection: close\r\n\r\n")
    status, received = answer(client)
    assert status == 400 and b"toy" not in received


@pytest.mark.slow
def test_nothing_stays_open(quick: Server, log: pytest.LogCaptureFixture) -> None:
    """After all this, no descriptor of a connection is left."""
    time.sleep(3)
    before = len(os.listdir("/proc/self/fd"))
    clients = [begin(quick) for _ in range(10)]
    for client in clients:
        answer(client)
        client.close()
    assert until(lambda: len(os.listdir("/proc/self/fd")) <= before)
