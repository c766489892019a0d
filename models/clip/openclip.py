"""open_clip, imported without what no supported image tower needs.

Importing open_clip imports transformers where it is installed (for text towers from Hugging Face), timm (for
image towers that MaskMill cannot use), and through torchvision the compiler of torch: 3.5 s of every process
that only wants a CLIP. Import open_clip from here, and call ``with_the_rest`` before such a tower is built.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_COMPILER = "torch._dynamo.utils"


def _stand_in() -> ModuleType:
    """For the one function of the compiler that torchvision imports, to ask it something much later."""

    def is_compile_supported(device: Any) -> Any:
        if sys.modules.get(_COMPILER) is stand_in:
            del sys.modules[_COMPILER]
        return importlib.import_module(_COMPILER).is_compile_supported(device)

    stand_in = ModuleType(_COMPILER)
    stand_in.__dict__["is_compile_supported"] = is_compile_supported
    return stand_in


@contextlib.contextmanager
def _without_the_rest() -> Iterator[None]:
    """For this second it holds for all threads of the process."""
    # None is what Python takes for "not installed".
    others: dict[str, Any] = {"transformers": None, "timm": None}
    if "torch._dynamo" not in sys.modules:
        others[_COMPILER] = _stand_in()
    others = {name: instead for name, instead in others.items() if name not in sys.modules}
    sys.modules.update(others)
    try:
        yield
    finally:
        for name, instead in others.items():
            if name in sys.modules and sys.modules[name] is instead:
                del sys.modules[name]


if "open_clip" in sys.modules:
    import open_clip
else:
    with _without_the_rest():
        import open_clip

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
    "with_the_rest",
]


def with_the_rest() -> None:
    """Let open_clip build what needs transformers or timm, as far as they are installed."""
    # Functions and classes look names up in their module, which keeps its identity.
    if open_clip.hf_model.transformers is None:
        importlib.reload(open_clip.hf_model)
    if open_clip.timm_model.timm is None:
        importlib.reload(open_clip.timm_model)
