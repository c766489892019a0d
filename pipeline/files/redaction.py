"""Remove passwords, tokens and signatures from URLs, commands and settings.

Everything that tracking stores passes through ``redact`` on its way to disk, so a secret reaches neither the
journal nor a server. It looks for URLs with credentials, values assigned to a secret's name (``api_key=…``,
``--token …``), and the values of environment variables with such names. ``without_signature`` gives the
address under which an image is stored.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

MASK = "***"
_SECRET = (
    r"(?:secrets?|token|passwords?|passwd|passphrase|pwd|credentials?|signature|bearer"
    r"|(?:api|access|private|secret|account|storage|encryption)[_-]?key(?:[_-]?id)?)"
)
# Matches whole words of a name: "num_tokens_max" and "monkey" are not secrets.
_NAME = rf"(?:[\w.-]*[_.-])?{_SECRET}(?:[_.-](?:id|key|value|file|base64))?"
_CAMEL = r"\w*(?:Secret|Token|Password|ApiKey|AccessKeyId|AccessKey|Signature)"
_MIN_VALUE = 6
"""Shorter values of environment variables are kept: they would match ordinary words."""

_USER_INFO = re.compile(r"(?P<scheme>\b[a-zA-Z][\w+.-]*)://(?P<user>[^/\s?#'\"<>]+)@")
_QUERY = re.compile(
    rf"(?P<name>[?&;](?:{_NAME}|{_CAMEL}|sig|se?key|auth|hmac|jwt|hdnts|hdnea|__token__|x-(?:amz|goog|oss|cos)-[\w-]+"
    r"|q-(?:ak|sign[\w-]*|key-time))=)[^&;\s'\"<>#]+",
    re.IGNORECASE,
)
_FLAG = re.compile(
    rf"(?P<name>(?<!\S)--?{_NAME})(?P<between>\s+|=)(?!--)(?:'[^']*'|\"[^\"]*\"|[^\s'\"<>]+)", re.IGNORECASE
)
_QUOTED = re.compile(
    rf"(?P<name>(?<![\w.-])[\"']?(?:{_NAME}|(?-i:{_CAMEL}))[\"']?\s*[=:]\s*)(?P<quote>[\"'])(?:(?!(?P=quote)).)+(?P=quote)",
    re.IGNORECASE,
)
_WHOLE = re.compile(
    rf"(?P<quote>[\"'])(?P<name>(?:{_NAME}|(?-i:{_CAMEL}))=)(?:(?!(?P=quote)).)+(?P=quote)", re.IGNORECASE
)
_BARE = re.compile(rf"(?P<name>(?<![\w.?&;'\"-])(?:{_NAME}|(?-i:{_CAMEL}))=)[^\s&'\"\\,;]+", re.IGNORECASE)
_SECRET_FLAG = re.compile(rf"--?{_NAME}", re.IGNORECASE)
_HEADER = re.compile(r"\b(?P<name>(?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", re.IGNORECASE)
_KNOWN = re.compile(
    r"\b(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|hf_[A-Za-z0-9]{20,}|glpat-[\w-]{16,}"
    r"|xox[abpr]-[\w-]{10,}|dapi[0-9a-f]{32}|AIza[\w-]{35}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+)"
)
# Parameters that change with a signature, or are of no use without it (CloudFront, S3 and Google version 2,
# Alibaba, Azure's shared access signatures).
_WITH_SIGNATURE = frozenset(
    {
        "expires",
        "policy",
        "key-pair-id",
        "googleaccessid",
        "ossaccesskeyid",
        "q-header-list",
        "q-url-param-list",
    }
    | {"sv", "ss", "srt", "sr", "sp", "st", "se", "sip", "spr", "sdd", "ses", "skoid", "sktid", "skt", "ske"}
    | {"sks", "skv", "saoid", "suoid", "scid"}
)
# Most text contains no such word, and this check is much faster than matching the names.
_HINT = re.compile(r"secret|token|pass|pwd|credential|signature|bearer|key", re.IGNORECASE)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)


def redact(text: str, *, assignments: bool = True) -> str:
    """Replace every secret in a text with ``***``.

    >>> redact("https://me:pa55@host/x?a=1&sig=abc")
    'https://***@host/x?a=1&sig=***'

    Args:
        text: any text: a URL, a command, JSON.
        assignments: also redact ``name=value`` and ``--name value``; not suitable for program code.
    """
    return _redact(text, _secret_values(), assignments)


def _redact(text: str, values: Sequence[str], assignments: bool) -> str:
    for value in values:
        text = text.replace(value, MASK)
    if "://" in text:
        text = _USER_INFO.sub(_without_user, text)
    text = _QUERY.sub(rf"\g<name>{MASK}", text)
    text = _HEADER.sub(rf"\g<name>{MASK}", text)
    text = _KNOWN.sub(MASK, text)
    if assignments and _HINT.search(text):
        text = _FLAG.sub(rf"\g<name>\g<between>{MASK}", text)
        text = _QUOTED.sub(rf"\g<name>\g<quote>{MASK}\g<quote>", text)
        text = _WHOLE.sub(rf"\g<quote>\g<name>{MASK}\g<quote>", text)
        text = _BARE.sub(rf"\g<name>{MASK}", text)
    return text


def without_signature(address: str) -> str:
    """An address without the parts of its query that grant access; what is not a URL stays as it is.

    The result is the same however often the address is signed again, and does not depend on the environment.

    >>> without_signature("https://h/a.jpg?X-Amz-Date=1&X-Amz-Signature=2&version=3#top")
    'https://h/a.jpg?version=3#top'
    """
    place, question, rest = address.partition("?")
    if not question or "://" not in place:
        return address
    query, mark, fragment = rest.partition("#")
    parameters = [(unquote(text.partition("=")[0]), text) for text in query.split("&")]
    secret = [
        bool(_QUERY.match(f"?{name}={text.partition('=')[2]}") or _KNOWN.search(text))
        for name, text in parameters
    ]
    if not any(secret):
        return address
    kept = [
        text
        for (name, text), hidden in zip(parameters, secret, strict=True)
        if not hidden and name.lower() not in _WITH_SIGNATURE
    ]
    return f"{place}{'?' if kept else ''}{'&'.join(kept)}{mark}{fragment}"


def redact_tree(value: Any) -> Any:
    """``redact`` every string in a JSON value; a string under a secret's name is replaced entirely."""
    values = _secret_values()

    def clean(item: Any, name: str = "") -> Any:
        if isinstance(item, str):
            return MASK if _SECRET_NAME.fullmatch(name) else _redact(item, values, True)
        if isinstance(item, Mapping):
            return {_redact(str(key), values, True): clean(part, str(key)) for key, part in item.items()}
        if isinstance(item, Sequence):
            return [clean(part) for part in item]
        return item

    return clean(value)


def command_line(arguments: Sequence[str] | None = None) -> str:
    """The command line of this process as one would type it, without secrets.

    Args:
        arguments: program and arguments; None is ``sys.argv``.
    """
    program, *rest = sys.argv if arguments is None else arguments
    name = Path(program).name
    words = ["maskmill" if name in ("maskmill", "cli.py", "__main__.py") else name]
    secret_next = False
    for word in rest:
        words.append(MASK if secret_next and not word.startswith("--") else redact(word))
        secret_next = bool(_SECRET_FLAG.fullmatch(word))
    return shlex.join(words).replace(f"'{MASK}'", MASK)


def _without_user(match: re.Match[str]) -> str:
    # abfss://container@account names a location; https://token@host is a secret without a colon.
    if ":" not in match["user"] and match["scheme"].lower() not in ("http", "https"):
        return match[0]
    return f"{match['scheme']}://{MASK}@"


def _secret_values() -> list[str]:
    """Values of secret environment variables, plain and URL-encoded, longest first."""
    values = set()
    for name, value in os.environ.items():
        # The path of a credentials file is not a secret.
        if len(value) >= _MIN_VALUE and not value.startswith("/") and _SECRET_NAME.fullmatch(name):
            values |= {value, quote(value, safe="")}
    return sorted(values, key=len, reverse=True)
