"""Other values for names of a library, for a while: where it has no setting for what is wanted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def replaced(holder: Any, **values: Any) -> Iterator[None]:
    """Give attributes of a module or class other values meanwhile.

    Raises:
        AttributeError: there is one that it does not have.
    """
    before = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)
