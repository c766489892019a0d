"""What the weights of a label recipe have seen, and what may be done with them.

Licences are classes of terms as their publishers state them, not legal advice: read the licence of the
weights that you take.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from models.clip.published import RADIO
from pipeline.labelling.clipseg.options import RELEASED
from pipeline.labelling.recipes import LabelRecipe

Lineage = Literal[
    "image-text only",
    "self-supervised helper",
    "a teacher saw annotated masks",
    "see its publisher",
    "its training's",
]
Licence = Literal[
    "none: random weights", "permissive", "see its publisher", "non-commercial", "research only"
]
"""From the freest to the strictest, as far as that can be said."""

_TAGS: Mapping[str, Licence] = {
    "bundled": "permissive",  # this project's own toy, Apache-2.0
    "openai": "permissive",
    "laion": "permissive",
    "datacomp": "permissive",
    "commonpool": "permissive",
    "metaclip": "non-commercial",  # CC-BY-NC 4.0
    "dfn": "research only",  # Apple's
    "webli": "permissive",  # TIPSv2, Apache-2.0
    RELEASED: "permissive",  # CLIPSeg's, Apache-2.0
    "random:": "none: random weights",
}
"""Licence classes by how open_clip's tag begins."""
_HELPERS: Mapping[str, tuple[Lineage, Licence]] = {
    "dino": ("self-supervised helper", "permissive"),  # Apache-2.0
    "lvd142m": ("self-supervised helper", "permissive"),  # DINOv2, Apache-2.0
    "lvd1689m": ("self-supervised helper", "see its publisher"),  # DINOv3's own
    "mae": ("self-supervised helper", "non-commercial"),  # CC-BY-NC 4.0
    "webli": ("image-text only", "permissive"),  # TIPSv2, Apache-2.0
    "sa1b": ("a teacher saw annotated masks", "permissive"),  # SAM, Apache-2.0
    "c_radio": ("a teacher saw annotated masks", "see its publisher"),  # SAM is among its teachers
}
"""Helpers, by timm's tag of their weights."""


def lineage(recipe: LabelRecipe) -> Lineage:
    """What the weights were trained on, as far as annotation goes; a student has that of its training."""
    if recipe.model == "clipseg" or recipe.model in RADIO:
        return "a teacher saw annotated masks"  # CLIPSeg's PhraseCut; SAM is among C-RADIO's teachers
    if "/" in recipe.model and not recipe.model.startswith(("hf-hub:", "local-dir:")):
        return "its training's"
    if recipe.maskclip.helper:
        return _helper(recipe)[0]
    return "image-text only"


def licence(recipe: LabelRecipe) -> Licence:
    """The class of terms of the weights; files, hub names and students say nothing of theirs.

    With a helper it is the stricter of both.
    """
    tag = recipe.pretrained or ""
    own: Licence = next(
        (terms for start, terms in _TAGS.items() if tag.startswith(start)), "see its publisher"
    )
    if not recipe.maskclip.helper:
        return own
    order = get_args(Licence)
    return max((own, _helper(recipe)[1]), key=lambda terms: order.index(terms))


def _helper(recipe: LabelRecipe) -> tuple[Lineage, Licence]:
    """What a helper has seen, and its terms; a file is taken for what the tag says."""
    tag = recipe.maskclip.helper.partition(".")[2]
    seen, terms = _HELPERS.get(tag, ("see its publisher", "see its publisher"))
    return seen, "none: random weights" if recipe.maskclip.helper_weights.startswith("random:") else terms
