"""Shared by all pages: templates, a style sheet, and settings as text."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any


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
