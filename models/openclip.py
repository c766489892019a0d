"""open_clip, imported without what no supported image tower needs.

Importing open_clip imports transformers where it is installed (for text towers from Hugging Face), timm (for
image towers that MaskMill cannot use), and through torchvision the compiler of torch: 3.5 s of every process
that only wants a CLIP. Import open_clip from here, and call ``with_transformers`` before a text tower from
Hugging Face is built.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any


def _stand_in(module: str) -> ModuleType:
    """For a module of functions: they import the real one when they are called."""

    def function(name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: getattr(importlib.import_module(module), name)(*args, **kwargs)

    stand_in = ModuleType(module)
    stand_in.__dict__["__getattr__"] = function
    return stand_in


@contextlib.contextmanager
def _without_the_rest() -> Iterator[None]:
    """For this second it holds for the whole process; nothing else of ours imports these meanwhile."""
    # None is what Python takes for "not installed".
    others: dict[str, Any] = {"transformers": None, "timm": None}
    if "torch._dynamo" not in sys.modules:
        # Of the compiler torchvision takes one function, for gradients of an operation of detectors.
        others["torch._dynamo.utils"] = _stand_in("torch._dynamo.utils")
    others = {name: instead for name, instead in others.items() if name not in sys.modules}
    sys.modules.update(others)
    try:
        yield
    finally:
        for name in others:
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
    "with_transformers",
]


def with_transformers() -> None:
    """Let open_clip build text towers from Hugging Face, if transformers is installed."""
    if open_clip.hf_model.transformers is None:
        # The module's functions look names up in the module, which keeps its identity.
        importlib.reload(open_clip.hf_model)
