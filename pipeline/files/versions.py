"""Versions of Python and packages, recorded with each result."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions by name, with ``python`` first; None for a package that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in packages}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
