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
    "its image tower, which timm builds, pools its patches by a learned attention, and no reading of its "
    "single patches is published with figures"
)
_FAMILIES = {
    r"siglip": Refusal(_POOLED),
    r"(^|[-_/])pe([-_]core|[-_]spatial|[-_]lang)": Refusal(_POOLED),
    r"tips": Refusal(
        "of this family TIPSv2 is read, by the names TIPSv2-B-14, TIPSv2-L-14, "
        "TIPSv2-SO400M-14 and TIPSv2-g-14",
        "vit_base_patch14_reg1_tipsv2.webli",
    ),
    r"radio": Refusal(
        "of this family C-RADIO v3 and v4 are read, whose heads lead to SigLIP2's words, by names such as "
        "C-RADIOv4-SO400M",
        "vit_base_patch16_radio_v3.c_radio",
    ),
}
"""By what a name holds, in small letters."""


def refusal(name: str) -> Refusal | None:
    """Why a model is refused, if it is of a family that is known to be unreadable."""
    return next((why for holds, why in _FAMILIES.items() if re.search(holds, name.lower())), None)
