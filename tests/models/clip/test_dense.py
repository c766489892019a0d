"""The dense encoders: grids of any shape, position tables, custom blocks, compilation."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.catalogue import HEADS
from models.clip.dense import VitDense, dense_encoder, reference_view
from models.clip.heads.base import VitLayer, load_head
from models.errors import MaskMillError
from models.settings import MaskClipSettings

VISION: dict[str, Any] = {"image_size": 56, "layers": 3, "width": 64, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}


def tower(*, quick_gelu: bool = False, **vision: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(
            embed_dim=32, vision_cfg={**VISION, **vision}, text_cfg=TEXT, quick_gelu=quick_gelu
        )
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
    return model.visual.eval().double().requires_grad_(False)


def resnet() -> Any:
    return tower(layers=[1, 1, 1, 1], width=8, head_width=16, image_size=64)


ALONE = [head for head, entry in HEADS.items() if entry.alone]
"""The others are tried in ``test_helper_heads.py`` and ``towers/``."""


def images(height: int, width: int, batch: int = 1) -> Tensor:
    return torch.randn(
        batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )


def test_key_smoothing_needs_keys() -> None:
    for head, entry in HEADS.items():
        with contextlib.nullcontext() if entry.keys else pytest.raises(MaskMillError, match="needs keys"):
            MaskClipSettings(head=head, ks_threshold=1.0)
        with contextlib.nullcontext() if entry.keys else pytest.raises(MaskMillError, match="needs the keys"):
            dense_encoder(tower(), head=head, keys="raw")


@pytest.mark.parametrize("size", [(8, 8), (56, 56), (40, 130), (7, 3), (300, 20), (61, 90)])
@pytest.mark.parametrize("head", ALONE)
def test_any_size_of_a_vit(size: tuple[int, int], head: str) -> None:
    features = dense_encoder(tower(), head=head)(images(*size)).features
    assert features.shape == (1, 32, -(-size[0] // 8), -(-size[1] // 8))
    assert torch.isfinite(features).all()


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((333, 500), (10, 15)),
        ((390, 520), (12, 16)),
        ((320, 480), (10, 15)),
        ((32, 32), (1, 1)),
        ((5, 70), (1, 2)),
    ],
)
def test_any_size_of_a_resnet(size: tuple[int, int], grid: tuple[int, int]) -> None:
    features, keys, *_ = dense_encoder(resnet(), keys="projected")(images(*size))
    assert features.shape == (1, 32, *grid)
    assert keys is not None
    assert keys.shape[1] == grid[0] * grid[1]


def test_padding_is_right_below_and_zero() -> None:
    encoder, picture = dense_encoder(tower()), images(50, 61)
    padded = torch.zeros(1, 3, 56, 64, dtype=torch.float64)
    padded[:, :, :50, :61] = picture
    assert torch.equal(encoder(picture).features, encoder(padded).features)


@pytest.mark.parametrize("grid", [(20, 30), (3, 4), (7, 9)])
def test_position_table_with_offset(grid: tuple[int, int]) -> None:
    """Cell i of n is read at (i + 1/2) · 7/(n + 0.1) - 1/2 of the table's 7 cells."""
    visual = tower()
    encoder = dense_encoder(visual, positions="offset")
    assert isinstance(encoder, VitDense)
    table = encoder.position_table(grid)

    def cubic(t: float) -> float:
        t = abs(t)
        if t < 1:
            return 1.25 * t**3 - 2.25 * t**2 + 1
        return -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    def matrix(count: int) -> Tensor:
        made = torch.zeros(count, 7, dtype=torch.float64)
        for row in range(count):
            at = (row + 0.5) * 7 / (count + 0.1) - 0.5
            for tap in range(math.floor(at) - 1, math.floor(at) + 3):
                made[row, min(max(tap, 0), 6)] += cubic(at - tap)
        return made

    native = visual.positional_embedding
    square = native[1:].reshape(7, 7, 64)
    if grid != (7, 7):
        square = torch.einsum("hi,wj,ijd->hwd", matrix(grid[0]), matrix(grid[1]), square)
    assert (table[1:] - square.reshape(-1, 64)).abs().max() < 1e-12
    exact = dense_encoder(visual)
    assert isinstance(exact, VitDense)
    assert (table - exact.position_table(grid)).abs().max() > 1e-4


@pytest.mark.parametrize("grid", [(20, 30), (3, 4), (7, 9)])
def test_position_table(grid: tuple[int, int]) -> None:
    visual = tower()
    encoder = dense_encoder(visual)
    assert isinstance(encoder, VitDense)
    table = encoder.position_table(grid)
    native = visual.positional_embedding
    square = native[1:].reshape(1, 7, 7, 64).permute(0, 3, 1, 2)
    expected = F.interpolate(square, size=grid, mode="bicubic", align_corners=False, antialias=False)
    assert torch.equal(table[0], native[0])
    assert torch.equal(table[1:], expected.permute(0, 2, 3, 1).reshape(-1, 64))


def test_position_table_goes_by_the_grid_not_by_its_token_count() -> None:
    """1x49 has the tokens of 7x7; the reference would read it with the 7x7 table."""
    encoder = dense_encoder(tower())
    assert isinstance(encoder, VitDense)
    native = encoder.position_table((7, 7))
    assert native is encoder.visual.positional_embedding
    assert (encoder.position_table((1, 49))[1:] - native[1:]).abs().max() > 0.01


def test_position_tables_are_cached_and_bounded() -> None:
    encoder = dense_encoder(tower())
    assert isinstance(encoder, VitDense)
    first = encoder.position_table((2, 3))
    assert encoder.position_table((2, 3)) is first
    for width in range(4, 40):
        encoder.position_table((2, width))
    again = encoder.position_table((2, 3))
    assert again is not first, "old tables are dropped"
    assert torch.equal(again, first)


@pytest.mark.parametrize(
    "pooling", [{}, {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}]
)
@pytest.mark.parametrize("quick_gelu", [False, True])
def test_image_embedding_is_open_clips(pooling: dict[str, Any], quick_gelu: bool) -> None:
    visual = tower(quick_gelu=quick_gelu, **pooling)
    picture = images(56, 56, batch=2)
    assert (dense_encoder(visual).image_embedding(picture) - visual(picture)).abs().max() < 1e-12


def test_image_embedding_of_a_resnet() -> None:
    visual, picture = resnet(), images(64, 64, batch=2)
    assert (dense_encoder(visual).image_embedding(picture) - visual(picture)).abs().max() < 1e-12
    assert dense_encoder(visual).image_embedding(images(100, 200)).shape == (1, 32)


@pytest.mark.parametrize(
    "custom",
    [
        {},
        {"ls_init_value": 0.3},
        {"qk_norm": True},
        {"scale_attn_inner": True},
        {"scale_attn": True},
        {"scale_heads": True, "scale_fc": True},
    ],
)
def test_value_path_is_attention_to_oneself(custom: dict[str, Any]) -> None:
    """A token that sees itself alone gets its own value: a block on one token is the value path."""
    visual = tower(**custom)
    block = visual.transformer.resblocks[-1]
    tokens = torch.randn(1, 6, 64, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = load_head("maskclip").vit(VitLayer(block, tokens, (1, 5)))
    for i in range(1, 6):
        assert (values[:, i - 1] - block(tokens[:, i : i + 1])[:, 0]).abs().max() < 1e-12


def test_reference_view_shares_every_tensor() -> None:
    visual = tower(quick_gelu=True)
    view = reference_view(visual)
    own, shared = dict(visual.named_parameters()), dict(view.named_parameters())
    assert own.keys() == shared.keys()
    assert all(own[name] is shared[name] for name in own)
    assert {m.eps for m in view.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in visual.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert not any(type(m).__name__ == "QuickGELU" for m in view.modules())
    assert sum(type(m).__name__ == "QuickGELU" for m in visual.modules()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("head", ALONE)
def test_compiles(head: str) -> None:
    """One graph without breaks; for one of the heads, two image sizes."""
    torch.compiler.reset()  # else the heads together pass its limit
    encoder = dense_encoder(
        tower(layers=2).float(), head=head, keys="projected" if HEADS[head].keys else None
    )
    assert isinstance(encoder, VitDense)
    compiled = torch.compile(encoder.encode, fullgraph=True, backend="aot_eager")
    for grid in ((7, 7), (5, 9)) if head == "maskclip" else ((5, 9),):
        picture = images(8 * grid[0], 8 * grid[1]).float()
        table = encoder.position_table(grid)
        with torch.no_grad():
            expected, got = encoder.encode(picture, table), compiled(picture, table)
        assert (got.features - expected.features).abs().max() < 1e-5


def test_value_head_is_value_and_projection_alone() -> None:
    """On the tensors of the state dict: LN1, value, out_proj, ln_post, proj, nothing else."""
    visual = tower()
    picture = images(40, 56)
    with torch.no_grad():
        features, keys, *_ = dense_encoder(visual, head="value", keys="projected")(picture)
        reference = dense_encoder(visual, head="maskclip", keys="projected")(picture)
        x = _last_block_input(visual, picture)
    state = {name: tensor.detach() for name, tensor in visual.state_dict().items()}
    last = f"transformer.resblocks.{len(visual.transformer.resblocks) - 1}."
    width = x.shape[-1]
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    y = (x - mean) / (variance + 1e-5).sqrt() * state[last + "ln_1.weight"] + state[last + "ln_1.bias"]
    weight, bias = state[last + "attn.in_proj_weight"], state[last + "attn.in_proj_bias"]
    out, out_bias = state[last + "attn.out_proj.weight"], state[last + "attn.out_proj.bias"]
    value = (y @ weight[2 * width :].T + bias[2 * width :]) @ out.T + out_bias
    expected_keys = (y @ weight[width : 2 * width].T + bias[width : 2 * width]) @ out.T + out_bias
    mean, variance = value.mean(-1, keepdim=True), value.var(-1, keepdim=True, unbiased=False)
    value = (value - mean) / (variance + 1e-5).sqrt() * state["ln_post.weight"] + state["ln_post.bias"]
    expected = (value @ state["proj"])[:, 1:].mT.unflatten(-1, features.shape[-2:])
    assert (features - expected).abs().max() < 1e-10
    assert keys is not None and reference.keys is not None
    assert (keys - expected_keys[:, 1:]).abs().max() < 1e-10
    assert torch.equal(keys, reference.keys)
    assert (features - reference.features).abs().max() > 0.01


def _last_block_input(visual: Any, picture: Tensor) -> Tensor:
    """(B, 1 + L, W): every block but the last, as open_clip runs them, on the encoder's positions."""
    x = visual.conv1(picture).flatten(2).mT
    token = visual.class_embedding.expand(len(x), 1, -1)
    table = dense_encoder(visual).position_table((picture.shape[-2] // 8, picture.shape[-1] // 8))
    x = visual.ln_pre(torch.cat([token, x], 1) + table)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    return x


def test_towers_without_class_token() -> None:
    with pytest.raises(MaskMillError, match="no class token"):
        dense_encoder(nn.Linear(2, 2))
