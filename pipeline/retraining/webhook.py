"""Tell another service what became of a retraining: one HTTP POST of JSON.

The address is a secret: with many services whoever knows it may post. It comes from an environment variable,
and is neither stored nor shown; messages name its host only. A webhook that fails is a warning, never an
error. A receiver may get an event twice.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import IO, Any
from urllib.parse import urlsplit

from models.errors import WrongUse
from pipeline.files.redaction import redact_tree

ATTEMPTS = 3
TIMEOUT_S = 5.0
"""To connect, and for each answer that is waited for."""
PAUSE_S = 1.0
"""Before the second attempt; twice as long before each further one."""


def webhook_url(variable: str | None) -> str | None:
    """The address in an environment variable; None if no variable is named.

    Raises:
        WrongUse: ``setting_invalid`` if the variable is not set, or holds no address that can be posted to.
    """
    if variable is None:
        return None
    url = os.environ.get(variable, "").strip()
    if not url:
        raise WrongUse(
            "setting_invalid",
            f"The environment variable {variable} is not set; webhook_env says that it holds an address.",
            "Set it, or leave webhook_env out.",
        )
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or not url.isascii() or not url.isprintable() or " " in url:
        raise WrongUse(
            "setting_invalid",
            f"The environment variable {variable} holds no address of the form https://HOST/PATH.",
            "Set it to the address that the receiving service shows.",
        )
    if parts.username is not None or parts.password is not None:
        raise WrongUse(
            "setting_invalid",
            f"The address in {variable} has a user name or a password before its host.",
            "Use a receiver that takes a token in the path or the query.",
        )
    return url


def tell_webhook(variable: str | None, event: Mapping[str, Any]) -> str | None:
    """Post an event to the address in an environment variable, if one is named.

    Returns:
        A warning, in words, if it was not told; see ``notify``.
    """
    try:
        url = webhook_url(variable)
    except WrongUse as error:
        return f"The webhook was not told: {error.message}"
    return None if url is None else notify(url, event)


def notify(
    url: str, event: Mapping[str, Any], *, timeout_s: float = TIMEOUT_S, pause_s: float = PAUSE_S
) -> str | None:
    """Post an event as JSON, without secrets.

    No answer, a busy server (429) and its faults (5xx) are tried again, ``ATTEMPTS`` times in all. Redirects
    are not followed: they could carry the event to another host.

    Args:
        url: from ``webhook_url``.
        event: JSON values.
        timeout_s: see ``TIMEOUT_S``.
        pause_s: see ``PAUSE_S``.

    Returns:
        None once a server has taken it; else a warning, in words.
    """
    request = urllib.request.Request(
        url,
        data=json.dumps(redact_tree(event), ensure_ascii=False).encode(),
        headers={"Content-Type": "application/json", "User-Agent": "maskmill"},
        method="POST",
    )
    opener = urllib.request.build_opener(_NoRedirect)
    problem = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            with opener.open(request, timeout=timeout_s):
                return None
        except urllib.error.HTTPError as error:
            error.close()
            problem = f"it answers {error.code}"
            if 300 <= error.code < 400:
                problem += ", a redirect, which is not followed"
            if error.code != 429 and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            problem = _said(error)
    return f"The webhook at {urlsplit(url).hostname} was not told: {problem}."


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> None:
        """None: ``urllib`` then raises the answer as an error."""


def _said(error: Exception) -> str:
    """Why there was no answer; the text of an exception could repeat the address."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return "no answer in time"
    if isinstance(cause, OSError) and cause.strerror:
        return cause.strerror.lower()
    return f"no usable answer ({type(cause).__name__})"
