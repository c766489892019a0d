"""How often Python looks for garbage that its reference counts do not find."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


def collect_rarely() -> None:
    """For processes that begin with importing large libraries.

    Importing torch and open_clip makes objects by the hundred thousand, none of them garbage. At the usual
    thresholds looking through them again and again is a fifth of the time that it takes.
    """
    gc.set_threshold(50_000, 20, 20)


@contextlib.contextmanager
def without_collection() -> Iterator[None]:
    """For importing large libraries: a tenth less time even where garbage is looked for rarely."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
