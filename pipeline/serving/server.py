"""The HTTP server beneath the application: uvicorn, with the limits of connections that it lacks.

A client that sends half a head, reads none of its answer, or opens connections without end must not keep
others out, nor the server's memory.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from pipeline.serving.limits import Limits, network

_LARGEST_HEAD = 32 * 2**10
_KEEP_ALIVE_S, _GRACE_S = 10, 10
_FULL = b'{"code":"busy","message":"Too many connections are open.","remedy":"Try again in a few seconds."}'
_FULL_HEAD = (
    "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 2\r\n"
    f"Connection: close\r\nContent-Length: {len(_FULL)}\r\n\r\n"
).encode()


class Connection(H11Protocol):
    """A connection of a client.

    Args:
        limits: see ``Limits``.
        options: uvicorn's.
    """

    def __init__(self, *, limits: Limits, **options: Any) -> None:
        super().__init__(**options)
        self._limits = limits
        self._watch: asyncio.TimerHandle | None = None
        self._idle_since = self._unread_since = self._read_at = self.loop.time()
        self._unread = 0

    @property
    def network(self) -> str:
        """What counts as the same client; see ``network``."""
        return network(self.client and self.client[0])

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse the connection if there are too many, otherwise watch it."""
        super().connection_made(transport)
        open_now = [other.network for other in self.connections if isinstance(other, Connection)]
        most = self._limits.connections
        if len(open_now) > most or 2 * open_now.count(self.network) > most:
            transport.write(_FULL_HEAD + _FULL)
            transport.close()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop watching."""
        if self._watch is not None:
            self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read; input that makes no sense beside an answer that is under way ends the connection."""
        try:
            super().data_received(data)
        except h11.LocalProtocolError:
            self.transport.abort()

    def _look(self) -> None:
        """Abort the connection if the client takes too long over a head or an answer; look again later."""
        limits, now, unread = self._limits, self.loop.time(), self.transport.get_write_buffer_size()
        if unread == 0:
            self._unread_since = now
        if unread == 0 or unread < self._unread:
            self._read_at = now
        self._unread = unread
        if unread or (self.cycle is not None and not self.cycle.response_complete):
            self._idle_since = now
        if (
            now - self._idle_since > limits.header_seconds
            or now - self._read_at > limits.answer_pause
            or now - self._unread_since > limits.answer_seconds
        ):
            self.transport.abort()  # to close it would wait for the client
            return
        often = min(limits.header_seconds, limits.answer_pause, limits.answer_seconds) / 4
        self._watch = self.loop.call_later(often, self._look)


def make_server(app: FastAPI, limits: Limits, *, verbose: bool = False) -> uvicorn.Server:
    """A server for ``create_app``'s application.

    Args:
        app: the application.
        limits: those of the application.
        verbose: log every request.
    """
    config = uvicorn.Config(
        app,
        http=partial(Connection, limits=limits),  # type: ignore[arg-type]  # called like the class
        h11_max_incomplete_event_size=_LARGEST_HEAD,
        log_level="info" if verbose else "warning",
        access_log=verbose,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_GRACE_S,
        ws="none",
    )
    return uvicorn.Server(config)
