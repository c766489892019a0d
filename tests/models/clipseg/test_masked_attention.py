"""Hidden patches against open_clip's own blocks with an explicit mask, one image at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models.clip.loading import Clip, load_clip, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.clipseg.masked_attention import AttentionMask, masked_embedding
from models.errors import MaskMillError

TINY: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
WAYS = [AttentionMask(tokens, layers) for tokens in ("cls", "patches") for layers in ("last", "all")]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_source(WeightSource("tiny", "random:3", TINY, None, 3, OPENAI_MEAN, OPENAI_STD))


def images_and_masks() -> tuple[Tensor, Tensor]:
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    masks = torch.zeros(3, 64, 64)
    masks[0, 10:40, 20:60] = 1
    masks[1, :, :20] = 1
    masks[2, 33:36, 33:36] = 1  # between the sampled pixels of the grid: nothing is left
    return images, masks


def reference(clip: Clip, image: Tensor, mask: Tensor, how: AttentionMask) -> Tensor:
    """(D,) by ``nn.MultiheadAttention`` with an additive mask."""
    visual = clip.visual
    inside = [bool(mask[16 * (i // 4), 16 * (i % 4)]) for i in range(16)]
    hidden = torch.zeros(17, 17)
    for row in range(17):
        for column in range(1, 17):
            if (row == 0) == (how.tokens == "cls") and not inside[column - 1]:
                hidden[row, column] = -torch.inf
    x = visual.conv1(image[None]).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding[None, None], x], dim=1) + visual.positional_embedding
    x = visual.ln_pre(x)
    blocks = list(visual.transformer.resblocks)
    for index, block in enumerate(blocks):
        y = block.ln_1(x)
        mask_here = hidden if how.layers == "all" or index == len(blocks) - 1 else None
        x = x + block.attn(y, y, y, need_weights=False, attn_mask=mask_here)[0]
        x = x + block.mlp(block.ln_2(x))
    return (visual.ln_post(x[:, 0]) @ visual.proj)[0]


@pytest.mark.parametrize("how", WAYS, ids=str)
def test_each_image_has_its_own_mask(how: AttentionMask, clip: Clip) -> None:
    images, masks = images_and_masks()
    found = masked_embedding(clip, images, masks, how)
    plain = clip.encode_image(images)
    for number in range(3):
        expected = reference(clip, images[number], masks[number], how)
        torch.testing.assert_close(found[number], expected, atol=2e-5, rtol=1e-4)
        # What patches see in the last layer no longer reaches the class token.
        changed = how != AttentionMask("patches", "last")
        assert ((found[number] - plain[number]).abs().max() > 1e-3) == changed


def test_nothing_hidden_is_the_plain_embedding(clip: Clip) -> None:
    images, masks = images_and_masks()
    for how in WAYS:
        found = masked_embedding(clip, images, torch.ones_like(masks), how)
        torch.testing.assert_close(found, clip.encode_image(images), atol=1e-5, rtol=1e-4)


def test_a_resnet_is_refused() -> None:
    with pytest.raises(MaskMillError) as caught:
        masked_embedding(
            load_clip("RN50-quickgelu", "random:0", towers="visual"),
            torch.zeros(1, 3, 32, 32),
            torch.zeros(1, 32, 32),
            WAYS[0],
        )
    assert caught.value.code == "model_unsupported"
