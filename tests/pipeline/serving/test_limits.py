from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route

from pipeline.serving.guard import TrustedHosts
from pipeline.serving.limits import (
    Gate,
    RateLimiter,
    Refused,
    bounded,
    check_origin,
    is_loopback,
)


def test_a_client_gets_its_burst_then_its_rate() -> None:
    now = [0.0]
    limiter = RateLimiter(60, 3, clock=lambda: now[0])
    for _ in range(3):
        limiter.take("10.0.0.1")
    with pytest.raises(Refused) as caught:
        limiter.take("10.0.0.1")
    assert caught.value.status == 429 and caught.value.retry_after == pytest.approx(1)
    limiter.take("10.0.0.2")  # others are not held up
    now[0] = 0.9
    with pytest.raises(Refused):
        limiter.take("10.0.0.1")
    now[0] = 1.05
    limiter.take("10.0.0.1")
    now[0] = 1000
    for _ in range(3):  # no more than the burst is saved up
        limiter.take("10.0.0.1")
    with pytest.raises(Refused):
        limiter.take("10.0.0.1")


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("::ffff:10.0.0.1", "::ffff:10.0.0.2", False),
        (None, None, True),
    ],
)
def test_what_counts_as_one_client(first: str | None, second: str | None, same: bool) -> None:
    limiter = RateLimiter(1, 1, clock=lambda: 0.0)
    limiter.take(first)
    if same:
        with pytest.raises(Refused):
            limiter.take(second)
    else:
        limiter.take(second)


def test_the_table_of_clients_is_bounded() -> None:
    limiter = RateLimiter(1, 1, clock=lambda: 0.0, clients=100)
    for index in range(1000):
        limiter.take(f"10.0.{index // 256}.{index % 256}")
    limiter.take("10.0.0.1")  # long forgotten
    with pytest.raises(Refused):
        limiter.take("10.0.3.231")  # the latest is remembered
    RateLimiter(0, 1).take("10.0.0.1")
    RateLimiter(0, 1).take("10.0.0.1")  # 0 is no limit


def test_the_gate_gives_places_back() -> None:
    gate = Gate(1)
    for _ in range(3):
        with pytest.raises(ValueError), gate.enter():
            with pytest.raises(Refused) as caught, gate.enter():
                pass
            assert caught.value.status == 503
            raise ValueError


@pytest.mark.parametrize(
    ("host", "here", "anywhere"),
    [
        ("localhost:7860", True, True),
        ("LOCALHOST", True, True),
        ("127.0.0.1:7860", True, True),
        ("[::1]:7860", True, True),
        ("192.168.1.7:7860", False, True),
        ("[fe80::1]:7860", False, True),
        ("evil.example", False, False),
        ("evil.example:7860", False, False),
        ("localhost.evil.example", False, False),
        ("127.0.0.1.evil.example", False, False),
        ("evil.example@127.0.0.1", False, False),
        ("studio.local:80", True, True),
        ("", False, False),
        (None, False, False),
    ],
)
def test_hosts(host: str | None, here: bool, anywhere: bool) -> None:
    for loopback, right in ((True, here), (False, anywhere)):
        app = Starlette(routes=[Route("/", lambda _request: Response())])
        guarded = TrustedHosts(app, loopback=loopback, names=["Studio.local"])
        headers = [] if host is None else [(b"host", host.encode())]
        scope = {"type": "http", "method": "GET", "path": "/", "headers": headers, "query_string": b""}
        sent: list[Any] = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        asyncio.run(guarded(scope, None, send))  # type: ignore[arg-type]
        assert sent[0]["status"] == (200 if right else 400)


@pytest.mark.parametrize(
    ("method", "origin", "site", "right"),
    [
        ("POST", None, None, True),
        ("POST", "http://localhost:7860", "same-origin", True),
        ("POST", "http://localhost:7860", None, True),
        ("POST", "http://localhost:7861", None, False),
        ("POST", "https://evil.example", None, False),
        ("POST", "null", None, False),
        ("POST", None, "cross-site", False),
        ("POST", "http://localhost:7860", "same-site", False),
        ("DELETE", "https://evil.example", None, False),
        ("GET", "https://evil.example", "cross-site", True),
    ],
)
def test_origins(method: str, origin: str | None, site: str | None, right: bool) -> None:
    arguments = {"host": "localhost:7860", "origin": origin, "site": site}
    if right:
        check_origin(method, **arguments)
    else:
        with pytest.raises(Refused) as caught:
            check_origin(method, **arguments)
        assert caught.value.status == 403


@pytest.mark.parametrize("declared", [None, "10", "11", "9999999", "nonsense"])
@pytest.mark.parametrize("chunks", [[b"12345", b"67890"], [b"12345", b"67890", b"1"], [b"x"] * 1000])
def test_a_body_is_cut_where_the_limit_is(declared: str | None, chunks: list[bytes]) -> None:
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for chunk in chunks:
            taken += len(chunk)
            yield chunk

    async def read() -> bytes:
        return b"".join([chunk async for chunk in bounded(body(), 10, declared=declared)])

    size = sum(map(len, chunks))
    if size <= 10 and declared not in ("11", "9999999"):
        assert asyncio.run(read()) == b"".join(chunks)
        return
    with pytest.raises(Refused) as caught:
        asyncio.run(read())
    assert caught.value.status == 413
    assert taken <= 10 + 4 * 10 + 2  # what is thrown away is bounded too


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("x", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
