"""open_clip, imported without what no supported image tower needs.

Where transformers is installed, importing open_clip imports it as well, for text towers from Hugging Face:
1.5 s of every process that only wants a CLIP. Import open_clip from here, and call ``with_transformers``
before such a text tower is built.
"""

from __future__ import annotations

import importlib
import sys

_NAME = "transformers"

if "open_clip" in sys.modules or _NAME in sys.modules:
    import open_clip
else:
    # For this second the whole process is told that it is not installed: nothing else of ours asks.
    sys.modules[_NAME] = None  # type: ignore[assignment]  # what Python takes for "not installed"
    try:
        import open_clip
    finally:
        del sys.modules[_NAME]

from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME  # noqa: E402
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet  # noqa: E402
from open_clip.pretrained import download_pretrained_from_hf  # noqa: E402
from open_clip.transformer import QuickGELU, VisionTransformer  # noqa: E402

__all__ = [
    "HF_CONFIG_NAME",
    "HF_SAFE_WEIGHTS_NAME",
    "HF_WEIGHTS_NAME",
    "AttentionPool2d",
    "ModifiedResNet",
    "QuickGELU",
    "VisionTransformer",
    "download_pretrained_from_hf",
    "open_clip",
    "with_transformers",
]


def with_transformers() -> None:
    """Let open_clip build text towers from Hugging Face, if transformers is installed."""
    if open_clip.hf_model.transformers is None:
        # The module's functions look names up in the module, which keeps its identity.
        importlib.reload(open_clip.hf_model)
