"""A ViT for the toy world with the shape of the bundled CLIP's visual tower, known to timm as ``toyvit``.

It is to ViTSeg at toy scale what an ImageNet ViT is in the paper: a tower that has learnt from image labels
and has never seen a text. It has no weights of its own; ``jobs.benchmarks.toyworld.tower`` trains some.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

MODEL_NAME = "toyvit"


def register() -> None:
    """Make ``timm.create_model("toyvit")`` possible; a second call does nothing."""
    if not timm.is_model(MODEL_NAME):
        register_model(toyvit)


def toyvit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """128 pixels in patches of 8, width 192, 3 blocks; other options as timm's ``VisionTransformer``.

    Raises:
        ValueError: if pretrained weights are asked for; there are none.
    """
    if pretrained:
        raise ValueError("toyvit has no pretrained weights: train some, and pass their file")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    shape = {"img_size": 128, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3}
    return VisionTransformer(**(shape | options))
