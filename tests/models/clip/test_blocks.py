"""The attention of a block against the same in fp64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from torch import Tensor

from models.clip import blocks
from models.clip.blocks import residual_block


def relative_error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "width", "spread"),
    [
        (1, 12, 197, 64, 1.5),  # all heads at once
        (2, 5, 61, 32, 1.0),
        (1, 3, 1025, 64, 1.5),  # one head at a time
        (2, 3, 840, 32, 1.5),  # two heads at a time, and one is left
        (1, 2, 1600, 16, 1.5),  # a part of a head's queries at a time
        (1, 2, 300, 64, 3.0),  # nearly one-hot: rounded scores alone would be off by more than a hundredth
        (1, 1, 1, 8, 1.0),
    ],
)
def test_attention_by_heads_is_as_exact_as_the_fused_product(
    batch: int, heads: int, tokens: int, width: int, spread: float
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    packed = spread * torch.randn(batch, tokens, 3 * heads * width, generator=generator)
    q, k, v = (
        part.unflatten(-1, (heads, width)).transpose(1, 2) for part in packed.bfloat16().chunk(3, dim=-1)
    )
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())

    mixed = blocks._attention_by_heads(q, k, v)

    assert mixed.shape == exact.shape
    assert mixed.dtype == torch.bfloat16
    assert relative_error(mixed, exact) < 0.004


def test_one_compiled_graph_serves_many_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BF16_WITHOUT_AMX", True)
    graphs = []

    def count(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    block = ResidualAttentionBlock(64, 4).eval().bfloat16()
    compiled = torch.compile(residual_block, fullgraph=True, backend=count)
    with torch.no_grad():
        for tokens in range(20, 32):
            compiled(block, torch.randn(1, tokens, 64).bfloat16())
    assert 1 <= len(graphs) <= 3


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("by_heads", [False, True])
def test_a_block_in_bf16_is_open_clips(grad: bool, by_heads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_BF16_WITHOUT_AMX", by_heads)
    calls = []
    product = blocks._attention_by_heads
    monkeypatch.setattr(blocks, "_attention_by_heads", lambda *qkv: calls.append(1) or product(*qkv))
    torch.manual_seed(0)
    block = ResidualAttentionBlock(64, 4).eval()
    x = torch.randn(2, 70, 64)
    exact = copy.deepcopy(block).double()(x.bfloat16().double()).detach()

    with torch.set_grad_enabled(grad):
        y = residual_block(block.bfloat16(), x.bfloat16())

    assert relative_error(y.detach(), exact) < 0.01
    assert bool(calls) == (by_heads and not grad)
    if grad:
        y.float().sum().backward()
        assert block.attn.in_proj_weight.grad is not None
