"""Named sets of prompt templates, read from ``templates.yaml``; add new sets there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from models.errors import WrongUse, did_you_mean


def _read() -> dict[str, tuple[str, ...]]:
    text = Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8")
    sets = {name: tuple(templates) for name, templates in yaml.safe_load(text).items()}
    return {"openai85": sets["imagenet80"] + sets["scene5"], **sets}


TEMPLATE_SETS = _read()


def get_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """Look up a set in ``TEMPLATE_SETS``, or check the user's own templates.

    Raises:
        MaskMillError: ``prompt_invalid`` for an unknown name, an empty list, or a template without exactly
            one ``{}``.
    """
    if isinstance(templates, str):
        if templates in TEMPLATE_SETS:
            return TEMPLATE_SETS[templates]
        hint = did_you_mean(templates, TEMPLATE_SETS, most=3, cutoff=0.4)
        raise WrongUse(
            "prompt_invalid",
            f"There is no template set named {templates!r}.",
            f"{hint}Use one of {', '.join(TEMPLATE_SETS)}, or give a list of templates with one {{}} each.",
        )
    if not templates:
        raise WrongUse("prompt_invalid", "The list of prompt templates is empty.", "Give at least one.")
    for template in templates:
        if template.count("{}") != 1:
            raise WrongUse(
                "prompt_invalid",
                f"The template {template!r} does not hold exactly one {{}}.",
                "Write each template with one {} where the class name goes, as in 'a photo of a {}.'.",
            )
    return tuple(templates)


def fill(templates: Sequence[str], name: str) -> list[str]:
    """One prompt per template for a class name, which may itself contain braces."""
    return [template.replace("{}", name) for template in templates]
