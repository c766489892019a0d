"""Models that users ask for and that cannot be read densely here, and why; importable without torch."""

from __future__ import annotations

import re
from typing import NamedTuple


class Refusal(NamedTuple):
    """Why a family of models is refused.

    Attributes:
        reason: after "MaskMill cannot take dense features from NAME: ".
        helper: a tower of timm of this family that may help a CLIP; empty if there is none.
    """

    reason: str
    helper: str = ""


_POOLED = (
    "its image tower, which timm builds, pools its patches by a learned attention, and there is no reading "
    "of its single patches here"
)
_FAMILIES = {
    r"siglip": Refusal(_POOLED),
    r"(^|[-_/])pe([-_]core|[-_]spatial|[-_]lang)": Refusal(_POOLED),
    r"tips": Refusal(
        "timm has its image tower, but its text tower and its vocabulary are in its authors' release only, "
        "not in open_clip",
        "vit_base_patch14_reg1_tipsv2.webli",
    ),
    r"radio": Refusal(
        "timm has its trunk without the heads, and the one that leads to the words of SigLIP2 (as RADSeg "
        "reads it) is in NVIDIA's own checkpoints only",
        "vit_base_patch16_radio_v3.c_radio",
    ),
}
"""By what a name holds, in small letters."""


def refusal(name: str) -> Refusal | None:
    """Why a model is refused, if it is of a family that is known to be unreadable."""
    return next((why for holds, why in _FAMILIES.items() if re.search(holds, name.lower())), None)
