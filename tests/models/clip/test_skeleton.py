from __future__ import annotations

import pytest
import torch
from torch import nn

from models.clip.openclip import open_clip
from models.clip.skeleton import shapes_only


def described(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype, str]]:
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    return {name: (tensor.shape, tensor.dtype, tensor.device.type) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-L-14-CLIPA", "RN50x4"])
def test_shapes_and_types_are_those_of_the_meta_device(name: str) -> None:
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        plain = open_clip.CLIP(**config)
    with shapes_only():
        skeleton = open_clip.CLIP(**config)
    assert described(skeleton) == described(plain)


def test_arithmetic_between_tensors_is_done() -> None:
    with shapes_only():
        product = torch.randn(3, 1) * torch.randn(4)
    assert product.shape == (3, 4) and product.is_meta
