"""Prompt template sets by name, from ``templates.yaml``: add a set there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

import yaml

from models.errors import WrongUse


def _read() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8")
    sets = {name: tuple(templates) for name, templates in yaml.safe_load(text).items()}
    return {"openai85": sets["imagenet80"] + sets["scene5"], **sets}


TEMPLATE_SETS = _read()


def get_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a named set, or a checked copy of the user's own.

    Args:
        templates: the name of a set in ``TEMPLATE_SETS``, or the templates themselves.

    Returns:
        The templates, each with exactly one ``{}``.

    Raises:
        MaskMillError: ``templates_invalid`` for an unknown name, no template, or one without exactly one
            ``{}``.
    """
    if isinstance(templates, str):
        if templates in TEMPLATE_SETS:
            return TEMPLATE_SETS[templates]
        near = difflib.get_close_matches(templates, TEMPLATE_SETS, n=3, cutoff=0.4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise WrongUse(
            "templates_invalid",
            f"There is no template set named {templates!r}.",
            f"{hint}Use one of {', '.join(TEMPLATE_SETS)}, or give a list of templates with one {{}} each.",
        )
    if not templates:
        raise WrongUse("templates_invalid", "The list of prompt templates is empty.", "Give at least one.")
    for template in templates:
        if template.count("{}") != 1:
            raise WrongUse(
                "templates_invalid",
                f"The template {template!r} does not hold exactly one {{}}.",
                "Write each template with one {} where the class name goes, as in 'a photo of a {}.'.",
            )
    return tuple(templates)


def fill(templates: Sequence[str], name: str) -> list[str]:
    """The prompts of one class name, one per template, braces in the name left alone."""
    return [template.replace("{}", name) for template in templates]
