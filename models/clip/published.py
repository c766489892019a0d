"""The models by name: what they are made of, where their weights are, how they are read; without torch.

A model here has the configuration of a ``models.clip.weights.WeightSource``, with these keys:

* ``embed_dim``; ``tower``: ``radio`` or ``tips``.
* ``vision_cfg``: timm's ``trunk``, its ``patch_size``, and ``options`` for ``timm.create_model``; for C-RADIO
  also ``head``, the hidden width and the number of inner layers of its SigLIP2 head, for random weights.
* ``text_cfg``: of open_clip's text tower for C-RADIO (``text_model`` is its name there); ``width``,
  ``heads``, ``layers``, ``mlp``, ``vocab_size`` for TIPSv2, whose ``repository`` has the vocabulary too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from models.catalogue import HEADS
from models.errors import WrongUse

if TYPE_CHECKING:
    from models.settings import MaskClipSettings

Kind = Literal["radio", "tips"]

SIGLIP2 = "ViT-gopt-16-SigLIP2-384"
"""open_clip's name of the model that C-RADIO's SigLIP2 head was distilled from."""
SIGLIP2_WIDTH = 1536
CONTEXT = 64
"""Tokens of a prompt, of both families."""


class Radio(NamedTuple):
    """A C-RADIO: timm's trunk. Its head is in NVIDIA's checkpoint of the same name only."""

    trunk: str


class Tips(NamedTuple):
    """A TIPSv2: timm's image tower, the sizes of its text tower, and the repository that has both."""

    trunk: str
    width: int
    heads: int
    layers: int
    mlp: int
    repository: str


RADIO: Mapping[str, Radio] = {
    "C-RADIOv3-B": Radio("naflexvit_base_patch16_radio_v3"),
    "C-RADIOv3-L": Radio("naflexvit_large_patch16_radio_v3"),
    "C-RADIOv3-H": Radio("naflexvit_huge_patch16_radio_v3"),
    "C-RADIOv3-g": Radio("naflexvit_giant_patch16_radio_v3"),
    "C-RADIOv4-SO400M": Radio("naflexvit_so400m_patch16_radio_v4"),
    "C-RADIOv4-H": Radio("naflexvit_huge_patch16_radio_v4"),
}
TIPS: Mapping[str, Tips] = {
    "TIPSv2-B-14": Tips("vit_base_patch14_reg1_tipsv2", 768, 12, 12, 3072, "google/tipsv2-b14"),
    "TIPSv2-L-14": Tips("vit_large_patch14_reg1_tipsv2", 1024, 16, 12, 4096, "google/tipsv2-l14"),
    "TIPSv2-SO400M-14": Tips("vit_so400m_patch14_reg1_tipsv2", 1152, 16, 27, 4304, "google/tipsv2-so400m14"),
    "TIPSv2-g-14": Tips("vit_giant_patch14_reg1_tipsv2", 1536, 24, 12, 6144, "google/tipsv2-g14"),
}
NAMES = (*RADIO, *TIPS)
TIPS_TAG = "webli"
TIPS_FILES = ("model.safetensors", "tokenizer.model")
READINGS: Mapping[str, tuple[str, str]] = {"radio": ("radseg", "radseg"), "tips": ("maskclip", "tipsv2")}
"""The head that is published for a tower, and the recipe with it."""


def configuration(name: str) -> dict[str, Any]:
    """The configuration of one of ``NAMES``."""
    if name in RADIO:
        import open_clip

        return {
            "embed_dim": SIGLIP2_WIDTH,
            "tower": "radio",
            "vision_cfg": {"trunk": RADIO[name].trunk, "patch_size": 16, "options": {}, "head": (1520, 2)},
            "text_cfg": open_clip.get_model_config(SIGLIP2)["text_cfg"],
            "text_model": SIGLIP2,
        }
    tips = TIPS[name]
    sizes = {"width": tips.width, "heads": tips.heads, "layers": tips.layers, "mlp": tips.mlp}
    return {
        "embed_dim": tips.width,
        "tower": "tips",
        "vision_cfg": {"trunk": tips.trunk, "patch_size": 14, "options": {}},
        "text_cfg": {**sizes, "vocab_size": 32000, "context_length": CONTEXT},
        "repository": tips.repository,
    }


def check_reading(name: str, config: Mapping[str, Any], reading: MaskClipSettings) -> None:
    """Refuse settings that a tower has nothing for, or the head of another tower.

    Args:
        name: of the model.
        config: of its ``WeightSource``.
        reading: how it is to be read.

    Raises:
        MaskMillError: ``setting_invalid``.
    """
    tower, wanted = config.get("tower"), HEADS[reading.head].tower
    if tower is None:
        if wanted:
            raise WrongUse(
                "setting_invalid",
                f"The head {reading.head} reads the last block of a C-RADIO, and {name} is none.",
                f"Begin with --recipe {READINGS[wanted][1]}, or use another head.",
            )
        return
    head, recipe = READINGS[tower]
    refused = {
        f"head={reading.head}": reading.head != head,
        f"profile={reading.profile}": reading.profile != "weights",
        f"positions={reading.positions}": reading.positions != "exact",
        "ks_threshold": reading.ks_threshold > 0,
        "memory": bool(reading.memory),
        "candidates, which ask the class token": reading.classes.asks_class_token,
        "ambiguous_above, which asks the class token": reading.classes.ambiguous_above > 0,
    }
    for what, used in refused.items():
        if used:
            raise WrongUse(
                "setting_invalid",
                f"{name} is read as its authors read it, with head={head}; there is nothing for {what}.",
                f"Begin with --recipe {recipe} --set model={name}.",
            )
