"""What every page of a server needs: protection against other web sites, headers, and errors as JSON."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from models.errors import FailedWork, MaskMillError, WrongUse
from pipeline.serving.limits import Refused, check_origin, is_address

log = logging.getLogger("maskmill.serve")

UNKNOWN = "name_unknown"
"""The code of what is not there: status 404."""

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Cache-Control": "no-store",
}


class TrustedHosts:
    """Refuses requests for other host names with 400, to prevent DNS rebinding.

    A web site that makes its name resolve to this machine sends that name. An address literal cannot be
    rebound, so a server on the network accepts any address and need not know its own.

    Args:
        app: the wrapped application.
        loopback: whether the server listens on loopback only.
        names: host names in addition to ``localhost``.
    """

    def __init__(self, app: ASGIApp, *, loopback: bool, names: Collection[str]) -> None:
        self._app = app
        self._loopback = loopback
        known = ["localhost", "127.0.0.1", "[::1]", *names]
        self._named = TrustedHostMiddleware(app, allowed_hosts=known, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        by_address = scope["type"] == "http" and is_address(Headers(scope=scope).get("host"))
        app = self._app if by_address and not self._loopback else self._named
        await app(scope, receive, send)


class Guard:
    """Refuses cross-site requests, hides internal errors in the log, and adds security headers.

    Plain ASGI, because under starlette's ``BaseHTTPMiddleware`` a request does not notice a disconnect.

    Args:
        app: the wrapped application.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def send_guarded(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        try:
            check_origin(
                scope["method"],
                host=headers.get("host"),
                origin=headers.get("origin"),
                site=headers.get("sec-fetch-site"),
            )
            await self._app(scope, receive, send_guarded)
        except Refused as refused:
            await error_response(refused, refused.status)(scope, receive, send_guarded)
        except ClientDisconnect:
            log.debug("%s %s: the client hung up", scope["method"], scope["path"])
        except Exception:
            log.exception("%s %s failed", scope["method"], scope["path"])
            if started:
                raise
            error = FailedWork(
                "internal",
                "Something went wrong in the server.",
                "The reason is in its log. Another image or model may work.",
            )
            await error_response(error, 500)(scope, receive, send_guarded)


def add_errors(app: FastAPI) -> None:
    """Answer errors as JSON with code, message and remedy."""

    @app.exception_handler(MaskMillError)
    async def known(_request: Request, error: MaskMillError) -> Response:
        status = error.status if isinstance(error, Refused) else 404 if error.code == UNKNOWN else 400
        return error_response(error, status)

    @app.exception_handler(HTTPException)
    async def http(_request: Request, error: HTTPException) -> Response:
        return error_response(
            WrongUse("request_invalid", f"{error.detail}.", "See /openapi.json for what there is."),
            error.status_code,
        )

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(str(error.errors()[0]["msg"])), 400)


def client_address(request: Request) -> str | None:
    return request.client.host if request.client else None


def invalid_request(reason: str) -> MaskMillError:
    """The error for a request that cannot be read."""
    return WrongUse(
        "request_invalid",
        f"The request cannot be read: {reason[:300]}.",
        "See /openapi.json, SegmentRequest.",
    )


def error_response(error: MaskMillError, status: int) -> JSONResponse:
    """An error as JSON."""
    headers = {}
    if isinstance(error, Refused) and error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if status in (408, 413, 503):
        headers["Connection"] = "close"  # otherwise the rest of the upload would still be read
    return JSONResponse(
        {"code": error.code, "message": error.message, "remedy": error.remedy}, status, headers=headers
    )
