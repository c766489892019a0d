"""Limits for clients: sizes, rates, concurrent requests and origins.

The server listens on loopback by default, but any web site that the user has open can send requests there. It
cannot read the answers (no CORS headers are sent) unless it makes its own name resolve to this machine (DNS
rebinding), which ``pipeline.serving.guard.TrustedHosts`` detects from the ``Host`` header. Blind requests are
refused by their ``Origin``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

from models.errors import MaskMillError

_LINGER_S = 5.0
_LINGER_FACTOR = 4


@dataclass(frozen=True)
class Limits:
    """Limits of a single request and of all requests together.

    Attributes:
        upload_bytes: size of a request's body, including all images.
        upload_seconds: time for a body to arrive.
        upload_pause: seconds after which a body of which nothing more arrives is given up.
        uploading_bytes: size of all bodies that are still arriving; one client may have half of it.
        image_pixels: pixels of an image, checked before it is decoded.
        result_pixels: pixels of a mask; larger images are labelled at this size.
        prompts: prompts of a request, texts and images together.
        examples: image prompts of a request.
        context_words: context words of a request.
        prompt_length: characters of a prompt.
        waiting: requests that may wait for the model while one is served.
        load_seconds: how long a request waits for a model to load before the client must retry.
        per_minute: sustained uploads per minute and client; 0 is no limit.
        burst: uploads that a client may send at once.
        connections: open connections; one client may have half of them.
        header_seconds: time for the head of a request to arrive, also on a connection that was used before.
        answer_pause: seconds after which an answer of which the client reads nothing more is given up.
        answer_seconds: time for an answer to be read.
    """

    upload_bytes: int = 32 * 2**20
    upload_seconds: float = 60.0
    upload_pause: float = 10.0
    uploading_bytes: int = 512 * 2**20
    image_pixels: int = 50_000_000
    result_pixels: int = 2_000_000
    prompts: int = 24
    examples: int = 8
    context_words: int = 200
    prompt_length: int = 200
    waiting: int = 8
    load_seconds: float = 20.0
    per_minute: int = 120
    burst: int = 30
    connections: int = 256
    header_seconds: float = 15.0
    answer_pause: float = 20.0
    answer_seconds: float = 300.0


class Refused(MaskMillError):
    """A request that is refused before it reaches a model.

    Args:
        status: HTTP status.
        code, message, remedy: as in ``MaskMillError``.
        retry_after: seconds after which a retry may succeed, if waiting helps.
    """

    def __init__(
        self, status: int, code: str, message: str, remedy: str, *, retry_after: float | None = None
    ) -> None:
        super().__init__(code, message, remedy)
        self.status = status
        self.retry_after = retry_after


class RateLimiter:
    """A token bucket per client.

    Args:
        per_minute: tokens refilled per minute; 0 is no limit.
        burst: capacity of a bucket in tokens.
        clock: time in seconds.
        clients: number of buckets to keep; the least recently used are dropped.
    """

    def __init__(
        self,
        per_minute: int,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        clients: int = 4096,
    ) -> None:
        self._rate = per_minute / 60
        self._burst = max(1, burst)
        self._clock = clock
        self._clients = clients
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, address: str | None) -> None:
        """Take a token.

        Args:
            address: of the client; see ``network``.

        Raises:
            Refused: 429 ``too_many_requests``.
        """
        if not self._rate:
            return
        client, now = network(address), self._clock()
        tokens, then = self._buckets.pop(client, (float(self._burst), now))
        tokens = min(float(self._burst), tokens + (now - then) * self._rate)
        refused = tokens < 1
        self._buckets[client] = (tokens if refused else tokens - 1, now)
        while len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        if refused:
            wait = (1 - tokens) / self._rate
            raise Refused(
                429,
                "too_many_requests",
                "You are sending requests faster than this server allows.",
                f"Wait {max(1, round(wait))} s and try again.",
                retry_after=wait,
            )


def network(address: str | None) -> str:
    """What counts as one client: an IPv4 address, or an IPv6 /64, the usual size for a household."""
    try:
        ip = ipaddress.ip_address(address or "")
    except ValueError:
        return address or "unknown"
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped is not None:
            return str(ip.ipv4_mapped)
        return str(ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


class Gate:
    """Limits how many requests wait for the model, including the one being served.

    For a single event loop only.
    """

    def __init__(self, places: int) -> None:
        self._free = places

    def check(self) -> None:
        """Refuse a request whose body has not arrived yet, if all places are taken.

        Raises:
            Refused: 503 ``busy``.
        """
        if self._free < 1:
            raise _busy("Too many requests are waiting for the model.")

    @contextmanager
    def enter(self) -> Iterator[None]:
        """Occupy a place while the context is open; raises like ``check``."""
        self.check()
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class Uploads:
    """Limits the size of all request bodies that are still arriving.

    A body counts by what has arrived of it, so one that stalls keeps nobody out.

    For a single event loop only.

    Args:
        most: bytes; one client may have half of them.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._arrived: Counter[str] = Counter()

    @contextmanager
    def one(self, address: str | None) -> Iterator[Callable[[int], None]]:
        """Count a body while the context is open: call the given function for each chunk, with its size.

        Raises:
            Refused: 503 ``busy``, by that function.
        """
        client, arrived = network(address), 0

        def count(size: int) -> None:
            nonlocal arrived
            self._arrived[client] += size
            arrived += size
            if self._arrived.total() > self._most or 2 * self._arrived[client] > self._most:
                raise _busy("Too many images are being uploaded.")

        try:
            yield count
        finally:
            self._arrived[client] -= arrived
            self._arrived += Counter()  # drops clients without uploads


def _busy(message: str) -> Refused:
    return Refused(503, "busy", message, "Try again in a few seconds.", retry_after=2)


async def bounded(
    stream: AsyncIterator[bytes],
    limit: int,
    *,
    declared: str | None = None,
    pause: float | None = None,
    count: Callable[[int], None] = lambda size: None,
) -> AsyncIterator[bytes]:
    """Yield the chunks of a body, up to a total size.

    Args:
        stream: the body as it arrives.
        limit: maximum size in bytes.
        declared: the ``Content-Length`` header; if too large, the body is refused without storing any of it.
        pause: seconds to wait for a chunk; None waits forever.
        count: called with the size of each chunk; may refuse it.

    Raises:
        Refused: 413 ``upload_too_large``, or as ``count``, after discarding further input for a while: a
            client that is cut off while sending never reads the answer.
        TimeoutError: nothing arrived for ``pause`` seconds.
    """
    announced = int(declared) if declared is not None and declared.isdecimal() else 0
    received = 0
    if announced <= limit:
        chunks = aiter(stream)
        while (chunk := await asyncio.wait_for(anext(chunks, None), pause)) is not None:
            received += len(chunk)
            if received > limit:
                break
            try:
                count(len(chunk))
            except Refused:
                await _discard(stream, _LINGER_FACTOR * limit)
                raise
            yield chunk
        else:
            return
    await _discard(stream, _LINGER_FACTOR * limit)
    size = f"{announced / 2**20:,.1f} MiB" if announced > limit else f"more than {limit / 2**20:g} MiB"
    raise Refused(
        413,
        "upload_too_large",
        f"The request has {size}; the limit is {limit / 2**20:g} MiB.",
        "Send a smaller image: scale it down, or save it as JPEG.",
    )


async def _discard(stream: AsyncIterator[bytes], most: int) -> None:
    async def read() -> None:
        left = most
        async for chunk in stream:
            left -= len(chunk)
            if left < 0:
                return

    try:
        await asyncio.wait_for(read(), _LINGER_S)
    except Exception:  # the client is gone or too slow
        return


def check_origin(method: str, *, host: str | None, origin: str | None, site: str | None) -> None:
    """Refuse requests from other web sites (cross-site request forgery).

    Args:
        method: HTTP method; GET and HEAD are not checked.
        host: the ``Host`` header.
        origin: the ``Origin`` header, which only browsers send.
        site: the ``Sec-Fetch-Site`` header.

    Raises:
        Refused: 403 ``origin_not_allowed``.
    """
    if method in ("GET", "HEAD"):
        return
    foreign_site = site is not None and site not in ("same-origin", "none")
    foreign_origin = origin is not None and origin.partition("://")[2].casefold() != (host or "").casefold()
    if foreign_site or foreign_origin:
        raise Refused(
            403,
            "origin_not_allowed",
            "The request comes from another web site.",
            "Use the page of this server, or send the request from a program.",
        )


def is_address(host: str | None) -> bool:
    """Whether a ``Host`` header is an address literal, with or without a port."""
    try:
        parts = urlsplit(f"//{host or ''}")
        ipaddress.ip_address(parts.hostname or "")
    except ValueError:
        return False
    return parts.username is None


def is_loopback(host: str) -> bool:
    """Whether a listening address is reachable only from this machine."""
    if host.casefold() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
