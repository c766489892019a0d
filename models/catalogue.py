"""Dense heads and refiners by name: the one place where a name stands, importable without torch.

An entry says where the code is (``module:object``, for ``pkgutil.resolve_name``), what the thing is called in
tables, and which settings of ``MaskClipSettings`` only it reads. Recipes, benchmarks and tests go through
these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from models.errors import WrongUse


class HeadEntry(NamedTuple):
    """One way to read the last block of a visual tower.

    Attributes:
        title: for tables.
        code: of a ``models.clip.heads.base.Head``.
        keys: whether it leaves the keys of the last attention as they are, which key smoothing needs.
        vit_only: whether it means nothing to a ResNet.
        own_values: every token keeps its own value. On a tower of ``DEEP`` blocks or more that fails: its
            tokens are no longer local.
        settings: settings that only this head reads.
        helper: whether it needs a helper tower (``models.helper``).
        tower: the kind of tower that alone has it (``models.clip.towers``); empty if it reads CLIPs.
    """

    title: str
    code: str
    keys: bool = True
    vit_only: bool = False
    own_values: bool = False
    settings: tuple[str, ...] = ()
    helper: bool = False
    tower: str = ""

    @property
    def alone(self) -> bool:
        """Whether it reads any CLIP, without another network."""
        return not self.helper and not self.tower


class RefinerEntry(NamedTuple):
    """One way to refine class scores by the image.

    Attributes:
        title: for tables.
        code: of a ``models.clip.refiners.base.Refiner``.
        steps: iterations by default.
        settings: settings that only some refiners read, and this one does.
    """

    title: str
    code: str
    steps: int
    settings: tuple[str, ...] = ("refine_classes", "refine_pixels")


DEEP = 24
"""Blocks of a tower on which heads of own values fail: MaskCLIP's published mean of eight datasets is 30.3
with ViT-B/16 and 13.9 with ViT-L/14."""

_OF_HELPERS = ("helper", "helper_weights")

HEADS: Mapping[str, HeadEntry] = {
    "maskclip": HeadEntry(
        "MaskCLIP, as the reference's code (residual and MLP kept)",
        "models.clip.heads.value:MASKCLIP",
        own_values=True,
    ),
    "value": HeadEntry("MaskCLIP, value path alone", "models.clip.heads.value:VALUE", own_values=True),
    "plain": HeadEntry("unmodified CLIP", "models.clip.heads.value:PLAIN", keys=False),
    "qq": HeadEntry("q·q attention (ClearCLIP)", "models.clip.heads.attention:QQ"),
    "kk": HeadEntry("k·k attention", "models.clip.heads.attention:KK"),
    "sclip": HeadEntry("q·q plus k·k attention (SCLIP)", "models.clip.heads.attention:SCLIP"),
    "nn": HeadEntry(
        "k·k attention to near patches (NACLIP)", "models.clip.heads.attention:NN", settings=("sigma",)
    ),
    "pa": HeadEntry(
        "keys turned towards queries (PEARL)", "models.clip.heads.procrustes:PA", settings=("alpha",)
    ),
    "proxy": HeadEntry(
        "affinity of a helper tower (ProxyCLIP)",
        "models.clip.heads.proxy:PROXY",
        keys=False,
        vit_only=True,
        settings=_OF_HELPERS,
        helper=True,
    ),
    "lposs": HeadEntry(
        "MaskCLIP's cosines over a helper tower's graph (LPOSS)",
        "models.clip.heads.lposs:LPOSS",
        keys=False,
        vit_only=True,
        own_values=True,
        settings=_OF_HELPERS,
        helper=True,
    ),
    "sc": HeadEntry("self-calibrated attention (SC-CLIP)", "models.clip.heads.calibrated:SC", vit_only=True),
    "radseg": HeadEntry(
        "self-correlating attention of a C-RADIO (RADSeg)",
        "models.clip.heads.radseg:RADSEG",
        keys=False,
        vit_only=True,
        tower="radio",
    ),
}
"""Dense heads. ``maskclip`` (arXiv 2112.01071, §3.2) removes the mixing of tokens from the last attention:
each token keeps its own value, sent through the output projection. As in the reference code, a ViT keeps the
block's residual and MLP. ``value`` drops both, as in the paper's text; on a ResNet the two are the same.
``plain`` reads the tokens of the unmodified CLIP. The others let tokens that are alike mix: see their
modules."""

REFINERS: Mapping[str, RefinerEntry] = {
    "pamr": RefinerEntry(
        "pixel-adaptive mean (PAMR)",
        "models.clip.refiners.pamr:PAMR",
        10,
        ("refine_classes", "refine_pixels", "refine_dilations"),
    ),
    "tlp": RefinerEntry(
        "edge-aware smoothing on cells (PEARL's TLP)", "models.clip.refiners.tlp:TLP", 25, ("refine_cells",)
    ),
    "lposs+": RefinerEntry("propagation among pixels (LPOSS+)", "models.clip.refiners.lposs:LPOSS_PLUS", 10),
}
"""Refiners of class scores. ``none`` is not among them."""


def check_resnet_head(name: str) -> None:
    """Refuse a head that does not exist for ResNets.

    Raises:
        MaskMillError: ``setting_invalid``.
    """
    if HEADS[name].vit_only:
        possible = ", ".join(other for other, entry in HEADS.items() if not entry.vit_only)
        raise WrongUse(
            "setting_invalid",
            f"The head {name} reads blocks of a ViT; a ResNet has none.",
            f"Use a ViT, or one of the heads {possible}.",
        )
