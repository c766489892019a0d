"""Prompt template sets as data.

A template holds exactly one ``{}``, the place of the class name. ``openai85`` is the set of MaskCLIP (arXiv
2112.01071): the 80 ImageNet templates of CLIP plus five "in the scene" prompts. The order of a set does not
matter to the mean over it.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from models.errors import WrongUse

IMAGENET80: tuple[str, ...] = (
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "a photo of a {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
    "a jpeg corrupted photo of the {}.",
    "a good photo of a {}.",
    "a plushie {}.",
    "a photo of the nice {}.",
    "a photo of the small {}.",
    "a photo of the weird {}.",
    "the cartoon {}.",
    "art of the {}.",
    "a drawing of the {}.",
    "a photo of the large {}.",
    "a black and white photo of a {}.",
    "the plushie {}.",
    "a dark photo of a {}.",
    "itap of a {}.",
    "graffiti of the {}.",
    "a toy {}.",
    "itap of my {}.",
    "a photo of a cool {}.",
    "a photo of a small {}.",
    "a tattoo of the {}.",
)

SCENE5: tuple[str, ...] = (
    "there is a {} in the scene.",
    "there is the {} in the scene.",
    "this is a {} in the scene.",
    "this is the {} in the scene.",
    "this is one {} in the scene.",
)

TEMPLATE_SETS: dict[str, tuple[str, ...]] = {
    "openai85": IMAGENET80 + SCENE5,
    "imagenet80": IMAGENET80,
    "scene5": SCENE5,
    "simple": ("a photo of a {}.",),
    "toyworld": ("a photo of a {}", "a photo of {}", "a {}", "{}"),
    "name": ("{}",),
}
"""Template sets by name. ``simple`` is the reference's ``--no-prompt-eng``; ``name`` is the bare class
name."""


def get_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """The templates of a named set, or a checked copy of the user's own.

    Args:
        templates: the name of a set in ``TEMPLATE_SETS``, or the templates themselves.

    Returns:
        The templates, each with exactly one ``{}``.

    Raises:
        MaskMillError: unknown name (``templates_invalid``), no template, or a template without exactly one
            ``{}`` (``templates_invalid``).
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
