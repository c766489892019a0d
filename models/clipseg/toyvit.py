"""A ViT for the toy world, shaped like the bundled CLIP's visual tower; timm knows it as ``toyvit``.

At toy scale it is to ViTSeg what an ImageNet ViT is in the paper: a tower trained on image labels, never on
text. No weights are bundled; ``jobs.benchmarks.toyworld.tower`` trains them.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

MODEL_NAME = "toyvit"


def register() -> None:
    """Register the model with timm, so that ``timm.create_model("toyvit")`` works; idempotent."""
    if not timm.is_model(MODEL_NAME):
        register_model(toyvit)


def toyvit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """128 pixels in patches of 8, width 192, 3 blocks; options as for timm's ``VisionTransformer``.

    Raises:
        ValueError: ``pretrained`` is set; there are no weights.
    """
    if pretrained:
        raise ValueError("toyvit has no pretrained weights: train some, and pass their file")
    for name in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
        options.pop(name, None)
    shape = {"img_size": 128, "patch_size": 8, "embed_dim": 192, "depth": 3, "num_heads": 3}
    return VisionTransformer(**(shape | options))
