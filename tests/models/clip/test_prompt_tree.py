"""The tree of prompts against open_clip's own text tower over the full context."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor, nn

from models.clip.loading import load_clip
from models.clip.prompt_tree import encode_tokens, shares_prefixes

END = 9  # the highest token
SMALL: dict[str, Any] = {"context_length": 12, "vocab_size": 10, "width": 32, "heads": 2, "layers": 2}
VISION = {"image_size": 8, "layers": 1, "width": 32, "head_width": 32, "patch_size": 8}


def build(text: dict[str, Any], embed_dim: int = 32) -> open_clip.CLIP:
    """open_clip's model in fp64, with no weight left at zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim, VISION, text).eval().requires_grad_(False).double()
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def texts(count: int, seed: int = 0) -> Tensor:
    """Random texts of three words, so that they begin alike, among them the shortest and the longest."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 4, (count, 12), generator=generator)
    lengths = torch.randint(1, 12, (count, 1), generator=generator)
    lengths[0], lengths[-1] = 1, 11
    position = torch.arange(12)
    return words.masked_fill(position == lengths, END).masked_fill(position > lengths, 0)


def prefixes(tokens: Tensor) -> set[tuple[int, ...]]:
    rows = [row[: row.index(END) + 1] for row in tokens.tolist()]
    return {tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}


def computed(model: open_clip.CLIP, tokens: Tensor, **sizes: int) -> tuple[Tensor, list[int]]:
    """The embeddings, and how many tokens went through the tower at a time."""
    counts: list[int] = []

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        counts.append(inputs[0].numel())

    hook = model.token_embedding.register_forward_hook(count)
    try:
        return encode_tokens(model, tokens, **sizes), counts
    finally:
        hook.remove()


@pytest.fixture(scope="module")
def small() -> open_clip.CLIP:
    return build(SMALL)


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"ls_init_value": 0.5},
        {"proj_bias": True},
        {"proj_type": "none"},
        {"pool_type": "eos", "eos_id": END},
        {
            "pool_type": "eos",
            "eos_id": 3,
        },  # the first of several, or none: then open_clip pools the first token
        {"pool_type": "last"},
        {"pool_type": "first"},
    ],
    ids=str,
)
@pytest.mark.parametrize("count", [1, 60])
def test_embeddings_are_those_of_the_full_context(text: dict[str, Any], count: int) -> None:
    model, tokens = build({**SMALL, **text}), texts(count)
    assert shares_prefixes(model)
    embedded = encode_tokens(model, tokens)
    assert embedded.dtype == torch.float64
    torch.testing.assert_close(embedded, model.encode_text(tokens), atol=1e-10, rtol=0)


def test_a_real_text_tower() -> None:
    config = open_clip.get_model_config("ViT-B-16")
    assert config is not None
    model = build(config["text_cfg"], config["embed_dim"])
    tokens = open_clip.tokenize(["a photo of a cat.", "a photo of a dog.", "a dog", "", "it " * 75])
    torch.testing.assert_close(encode_tokens(model, tokens), model.encode_text(tokens), atol=1e-10, rtol=0)


def test_the_bundled_text_tower() -> None:
    clip = load_clip("toyclip", "bundled", dtype=torch.float64)
    assert isinstance(clip.model, open_clip.CLIP) and shares_prefixes(clip.model)
    tokens = clip.tokenizer(["a photo of a zebra", "a photo of a leaf", "grass", ""])
    torch.testing.assert_close(
        encode_tokens(clip.model, tokens), clip.model.encode_text(tokens), atol=1e-10, rtol=0
    )


@pytest.mark.parametrize("text", [{"no_causal_mask": True}, {"pool_type": "none"}], ids=str)
def test_other_towers_are_not_taken(text: dict[str, Any]) -> None:
    assert not shares_prefixes(build({**SMALL, **text}))


def test_towers_of_another_attention_are_not_taken(small: open_clip.CLIP) -> None:
    model = build(SMALL)
    model.transformer.resblocks[1].attn = nn.Identity()
    assert shares_prefixes(small) and not shares_prefixes(model)


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_is_computed_once(small: open_clip.CLIP, seed: int) -> None:
    tokens = texts(80, seed)
    _, counts = computed(small, tokens, group_nodes=10_000, batch_nodes=10_000)
    assert counts == [len(prefixes(tokens))]


@pytest.mark.parametrize(("group", "batch"), [(1, 1), (12, 12), (13, 40), (30, 90), (64, 64)])
def test_groups_and_batches_change_nothing_but_memory(small: open_clip.CLIP, group: int, batch: int) -> None:
    tokens = texts(80)
    embedded, counts = computed(small, tokens, group_nodes=group, batch_nodes=batch)
    torch.testing.assert_close(embedded, small.encode_text(tokens), atol=1e-10, rtol=0)
    assert len(counts) > 1
    longest = 12
    assert max(counts) <= batch // group * max(group, longest)
    if group == batch:  # nothing is padded, and a group repeats no more than what one text begins with
        assert sum(counts) <= len(prefixes(tokens)) + (len(counts) - 1) * (longest - 1)


def test_the_order_and_repetition_of_prompts_do_not_matter(small: open_clip.CLIP) -> None:
    tokens = texts(40)
    order = torch.randint(0, 40, (70,), generator=torch.Generator().manual_seed(1))
    embedded, counts = computed(small, tokens[order], group_nodes=10_000, batch_nodes=10_000)
    assert counts == [len(prefixes(tokens[order]))]
    torch.testing.assert_close(embedded, encode_tokens(small, tokens)[order], atol=1e-10, rtol=0)
