"""Names in text files and in paths of formats that would misread some of their characters.

What a format cannot carry is written as in an address: "%", and two capital hexadecimal digits for each byte
of its UTF-8. Names without such characters stay as they are, CJK and quotes included.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from urllib.parse import unquote

_LIKE_AN_ESCAPE = re.compile(r"%(?=[0-9A-Fa-f]{2})")
_ESCAPES = re.compile(r"(?:%[0-9A-F]{2})+")


def escape(text: str, characters: Collection[str] = ()) -> str:
    """Escape what would end or change a line of a text file, so that ``unescape`` gives it back.

    These are control characters and line separators, blanks at the ends, and "#" at the beginning, where it
    makes a line a comment.

    Args:
        text: a name.
        characters: further ones that the format does not take, such as ":".

    >>> escape("#1: a b", ":")
    '%231%3A a b'
    """
    escaped = _LIKE_AN_ESCAPE.sub("%25", text)
    begin = len(escaped) - len(escaped.lstrip())
    end = len(escaped.rstrip())
    return "".join(
        _percent(char)
        if char in characters
        or unicodedata.category(char) in ("Cc", "Zl", "Zp")
        or not begin <= place < end
        or (char == "#" and place == 0)
        else char
        for place, char in enumerate(escaped)
    )


def unescape(text: str) -> str:
    """Inverse of ``escape``; bytes that are no UTF-8 stay as they are."""

    def plain(found: re.Match[str]) -> str:
        try:
            return unquote(found[0], errors="strict")
        except UnicodeDecodeError:
            return found[0]

    return _ESCAPES.sub(plain, text)


def percent(text: str) -> str:
    """All of a text escaped, for a name that has a meaning of its own.

    >>> percent("images")
    '%69%6D%61%67%65%73'
    """
    return "".join(map(_percent, text))


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogatepass"))
