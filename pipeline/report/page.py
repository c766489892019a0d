"""Shared by all pages: templates, a style sheet, and settings as text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from models.errors import WrongUse


def render(template: str, **values: Any) -> str:
    """Fill a template of this package. Every value is escaped unless it is ``markupsafe.Markup``.

    Args:
        template: file name in this package; it may include others, such as ``base.css``.
        values: its variables.
    """
    from jinja2 import Environment, FunctionLoader

    folder = files("pipeline.report")
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def page_path(output: str | os.PathLike[str]) -> Path:
    """The path of a page to write.

    Raises:
        MaskMillError: ``wrong_use`` for a place that is not local; a path object has lost one of its slashes.
    """
    if re.match(r"(?!file:)[A-Za-z][A-Za-z0-9+.-]+:/", os.fspath(output)):
        raise WrongUse(
            "wrong_use",
            f"The page cannot be written to {os.fspath(output)}: it is a local file.",
            "Name a local --output, and copy it afterwards.",
        )
    return Path(output)


def setting(value: Any) -> str:
    """The value of a setting as readable text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(setting, value))
    if isinstance(value, dict):
        return ", ".join(f"{key}: {setting(inner)}" for key, inner in value.items())
    return str(value)


def setting_rows(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as sorted rows of dotted name and value."""
    rows = []
    for key, value in settings.items():
        if isinstance(value, Mapping):
            rows += setting_rows(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", setting(value)))
    return sorted(rows)
