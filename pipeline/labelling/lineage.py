"""What the weights of a label recipe have seen, and what may be done with them.

Licences are classes of terms as their publishers state them, not legal advice: read the licence of the
weights that you take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pipeline.labelling.clipseg.options import RELEASED
from pipeline.labelling.recipes import LabelRecipe

Lineage = Literal[
    "image-text only", "self-supervised helper", "a teacher saw annotated masks", "its training's"
]
Licence = Literal[
    "permissive", "non-commercial", "research only", "see its publisher", "none: random weights"
]

_TAGS: Mapping[str, Licence] = {
    "bundled": "permissive",  # this project's own toy, Apache-2.0
    "openai": "permissive",
    "laion": "permissive",
    "datacomp": "permissive",
    "commonpool": "permissive",
    "metaclip": "non-commercial",  # CC-BY-NC 4.0
    "dfn": "research only",  # Apple's
    RELEASED: "permissive",  # CLIPSeg's, Apache-2.0
    "random:": "none: random weights",
}
"""Licence classes by how open_clip's tag begins."""


def lineage(recipe: LabelRecipe) -> Lineage:
    """What the weights were trained on, as far as annotation goes; a student has that of its training."""
    if recipe.model == "clipseg":
        return "a teacher saw annotated masks"  # PhraseCut
    if "/" in recipe.model and not recipe.model.startswith(("hf-hub:", "local-dir:")):
        return "its training's"
    return "image-text only"


def licence(recipe: LabelRecipe) -> Licence:
    """The class of terms of the weights; files, hub names and students say nothing of theirs."""
    tag = recipe.pretrained or ""
    return next((terms for start, terms in _TAGS.items() if tag.startswith(start)), "see its publisher")
