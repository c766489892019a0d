"""Heads with a helper against plain re-derivations: of CLIP, of the helper, of the formulas."""

from __future__ import annotations

import functools
import math
from typing import Any

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.dense import dense_encoder
from models.clip.heads import lposs, proxy
from models.clip.loading import Clip, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.errors import MaskMillError
from models.helper import Helper, helper_of
from models.maskclip import MaskClip
from models.settings import MaskClipSettings
from tests.models.clip.inputs import classifier, photographs

PATCH, WIDTH, HEADS = 16, 48, 3
SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": WIDTH, "head_width": 16, "patch_size": PATCH},
    "text_cfg": {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1},
}
HELPER = {"helper": "test_vit", "helper_weights": "random:3"}
GRIDS = [(4, 4), (5, 7), (6, 3)]


@functools.cache
def small_clip(dtype: torch.dtype = torch.float64) -> Clip:
    source = WeightSource("small", "random:5", SMALL, None, 5, OPENAI_MEAN, OPENAI_STD)
    return load_source(source, dtype=dtype, towers="visual")


@functools.cache
def helper(dtype: torch.dtype = torch.float64) -> Helper:
    made = helper_of(MaskClipSettings(head="proxy", **HELPER), dtype=dtype)
    assert made is not None
    made.tower.patch_embed.proj.weight *= 4  # random weights alone find all patches alike
    return made


@functools.cache
def fine_helper(patch: int) -> Helper:
    """A helper of other patches, from the same builder of timm."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        tower = timm.models.VisionTransformer(
            img_size=8 * patch, patch_size=patch, embed_dim=24, depth=2, num_heads=2, num_classes=0,
            dynamic_img_size=True,
        )  # fmt: skip
    return Helper(
        helper().source, tower.eval().double().requires_grad_(False), torch.device("cpu"), torch.float64
    )


# --- plain towers, for one image, on tensors of the state dicts ---------------------------------------------


def norm(x: Tensor, state: dict[str, Tensor], name: str, eps: float) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    scaled = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    d = q.shape[1] // heads
    found = []
    for at in range(0, q.shape[1], d):
        logits = q[:, at : at + d] @ k[:, at : at + d].T / math.sqrt(d)
        weights = (logits - logits.amax(1, keepdim=True)).exp()
        found.append(weights / weights.sum(1, keepdim=True) @ v[:, at : at + d])
    return torch.cat(found, 1)


def cells(image: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
    """Rows of a linear map of every patch (L, W)."""
    side = weight.shape[-1]
    found = [
        (weight * image[:, y : y + side, x : x + side]).sum((1, 2, 3)) + bias
        for y in range(0, image.shape[1], side)
        for x in range(0, image.shape[2], side)
    ]
    return torch.stack(found)


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_helper(made: Helper, image: Tensor) -> tuple[Tensor, Tensor]:
    """Last tokens behind the norm, and values of the last attention (L, K), of an image of whole patches."""
    tower, state = made.tower, made.tower.state_dict()
    patch, width = made.stride, tower.embed_dim
    grid = (image.shape[1] // patch, image.shape[2] // patch)
    native = tower.patch_embed.grid_size
    table = state["pos_embed"][0]
    around = F.interpolate(
        table[1:].T.unflatten(1, native)[None].float(), grid, mode="bicubic", antialias=True
    )[0]
    x = cells(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"])
    x = x + (table[1:] if grid == tuple(native) else around.flatten(1).T.to(x.dtype))
    x = torch.cat([state["cls_token"][0] + table[:1], x])
    values = x
    for layer in range(len(tower.blocks)):
        name = f"blocks.{layer}"
        y = norm(x, state, f"{name}.norm1", 1e-6)
        packed = y @ state[f"{name}.attn.qkv.weight"].T + state[f"{name}.attn.qkv.bias"]
        values = packed[:, 2 * width :]
        mixed = attend(
            packed[:, :width], packed[:, width : 2 * width], values, tower.blocks[0].attn.num_heads
        )
        x = x + mixed @ state[f"{name}.attn.proj.weight"].T + state[f"{name}.attn.proj.bias"]
        y = norm(x, state, f"{name}.norm2", 1e-6)
        y = gelu(y @ state[f"{name}.mlp.fc1.weight"].T + state[f"{name}.mlp.fc1.bias"])
        x = x + y @ state[f"{name}.mlp.fc2.weight"].T + state[f"{name}.mlp.fc2.bias"]
    return norm(x, state, "norm", 1e-6)[1:], values[1:]


def plain_clip(image: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens before the last block (1 + L, W), and its ln_1 of the patches (L, W)."""
    visual = small_clip().visual
    state = {name: tensor.double() for name, tensor in visual.state_dict().items()}
    grid = (image.shape[1] // PATCH, image.shape[2] // PATCH)
    table = dense_encoder(visual).position_table(grid)  # type: ignore[union-attr, operator]
    x = torch.cat([state["class_embedding"][None], cells(image, state["conv1.weight"], 0.0)]) + table
    x = norm(x, state, "ln_pre", 1e-5)
    for layer in range(3):
        name = f"transformer.resblocks.{layer}"
        y = norm(x, state, f"{name}.ln_1", 1e-5)
        q, k, v = (y @ state[f"{name}.attn.in_proj_weight"].T + state[f"{name}.attn.in_proj_bias"]).chunk(
            3, 1
        )
        mixed = attend(q, k, v, HEADS)
        x = x + mixed @ state[f"{name}.attn.out_proj.weight"].T + state[f"{name}.attn.out_proj.bias"]
        y = norm(x, state, f"{name}.ln_2", 1e-5)
        y = gelu(y @ state[f"{name}.mlp.c_fc.weight"].T + state[f"{name}.mlp.c_fc.bias"])
        x = x + y @ state[f"{name}.mlp.c_proj.weight"].T + state[f"{name}.mlp.c_proj.bias"]
    return x, norm(x[1:], state, "transformer.resblocks.3.ln_1", 1e-5)


def last(name: str) -> Tensor:
    return small_clip().visual.state_dict()[f"transformer.resblocks.3.{name}"].double()


def embedded(x: Tensor) -> Tensor:
    state = small_clip().visual.state_dict()
    return norm(x, state, "ln_post", 1e-5) @ state["proj"]


def normalised(image: Tensor, mean: Any, std: Any) -> Tensor:
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (mean, std))
    return (image.double() / 255 - mean) / std


def plain_proxy(image: Tensor, made: Helper) -> Tensor:
    """Features (M, D) of an image of whole patches of both towers."""
    tokens, _ = plain_helper(made, normalised(image, made.mean, made.std))
    _, y = plain_clip(normalised(image, OPENAI_MEAN, OPENAI_STD))
    values = y @ last("attn.in_proj_weight")[2 * WIDTH :].T + last("attn.in_proj_bias")[2 * WIDTH :]
    own, other = ((image.shape[1] // side, image.shape[2] // side) for side in (PATCH, made.stride))
    if own != other:
        values = F.interpolate(values.T.unflatten(1, own)[None], other, mode="bilinear")[0].flatten(1).T
    unit = tokens / tokens.square().sum(1, keepdim=True).sqrt()
    alike = unit @ unit.T
    logits = 3.0 * (alike - 1.2 * alike.sum() / alike.numel())
    left_out = logits < 0
    assert left_out.any() and not left_out.diagonal().any(), "the threshold should bite"
    weights = torch.where(left_out, 0.0, logits.exp())
    mixed = weights / weights.sum(1, keepdim=True) @ values
    return embedded(mixed @ last("attn.out_proj.weight").T + last("attn.out_proj.bias"))


def plain_maskclip(image: Tensor) -> Tensor:
    """Features (L, D) of the reference's head: values, residual, MLP."""
    x, y = plain_clip(normalised(image, OPENAI_MEAN, OPENAI_STD))
    values = y @ last("attn.in_proj_weight")[2 * WIDTH :].T + last("attn.in_proj_bias")[2 * WIDTH :]
    x = x[1:] + values @ last("attn.out_proj.weight").T + last("attn.out_proj.bias")
    state = small_clip().visual.state_dict()
    y = norm(x, state, "transformer.resblocks.3.ln_2", 1e-5)
    y = gelu(y @ last("mlp.c_fc.weight").T + last("mlp.c_fc.bias"))
    return embedded(x + y @ last("mlp.c_proj.weight").T + last("mlp.c_proj.bias"))


def lposs_system(values: Tensor, places: list[tuple[int, int]], neighbours: int) -> Tensor:
    """I - 0.95 Wn (M, M) as a dense matrix, edge by edge."""
    count = len(values)
    unit = values / values.square().sum(1, keepdim=True).sqrt()
    alike = unit @ unit.T
    one_way = torch.zeros(count, count, dtype=values.dtype)
    for i in range(count):
        for j in alike[i].argsort(descending=True)[:neighbours].tolist():
            one_way[i, j] = max(float(alike[i, j]), 0.0) ** 3 * math.exp(
                -0.01 * math.dist(places[i], places[j])
            )
    weights = one_way + one_way.T
    weights.fill_diagonal_(0)
    assert (weights == 0).double().mean() > 0.1, "not all should be neighbours"
    root = weights.sum(1).rsqrt()
    return torch.eye(count, dtype=values.dtype) - 0.95 * root[:, None] * weights * root


def ten_steps(matrix: Tensor, right: Tensor) -> Tensor:
    """0.05 x (M, P), class by class."""
    found = []
    for y in right.T:
        x, r, p = torch.zeros_like(y), y.clone(), y.clone()
        for _ in range(10):
            a = (r @ r) / (p @ matrix @ p)
            x, new = x + a * p, r - a * matrix @ p
            p = new + (new @ new) / (r @ r) * p
            r = new
        found.append(0.05 * x)
    return torch.stack(found, 1)


def plain_lposs(
    image: Tensor, corners: list[tuple[int, int]], side: tuple[int, int], near: int
) -> list[Tensor]:
    """Cosines (P, h, w) of windows of an image, after they agree."""
    grid = (side[0] // PATCH, side[1] // PATCH)
    right, values, places = [], [], []
    for y, x in corners:
        part = image[:, y : y + side[0], x : x + side[1]]
        right.append(cosines(plain_maskclip(part), grid).flatten(1).T)
        values.append(plain_helper(helper(), normalised(part, helper().mean, helper().std))[1])
        places += [(y + 8 + PATCH * i, x + 8 + PATCH * j) for i in range(grid[0]) for j in range(grid[1])]
    solved = ten_steps(lposs_system(torch.cat(values), places, near), torch.cat(right))
    return [part.T.unflatten(1, grid) for part in solved.split(grid[0] * grid[1])]


# --- parity -------------------------------------------------------------------------------------------------


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def labeller(
    head: str, made: Helper | None = None, dtype: torch.dtype = torch.float64, **how: Any
) -> MaskClip:
    reading = MaskClipSettings(head=head, image_stats="clip", profile="weights", **HELPER, **how)
    return MaskClip(small_clip(dtype), classifier(SMALL["embed_dim"]), reading, helper=made or helper(dtype))


def cosines(features: Tensor, grid: tuple[int, int]) -> Tensor:
    rows = classifier(SMALL["embed_dim"]).embeddings.double()
    return (features @ rows.T / features.square().sum(1, keepdim=True).sqrt()).T.unflatten(1, grid)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_parity_of_proxy(grid: tuple[int, int]) -> None:
    images = photographs(grid[0] * PATCH, grid[1] * PATCH)
    expected = torch.stack([cosines(plain_proxy(image, helper()), grid) for image in images])
    model = labeller("proxy")
    assert relative(model.grid_scores(images), expected) < 1e-10
    with torch.inference_mode():
        mean, std = (255 * torch.tensor(each, dtype=torch.float64) for each in (OPENAI_MEAN, OPENAI_STD))
        both = (images.double() - mean[:, None, None]) / std[:, None, None]
        together = model.encoder(both).features
    single = torch.stack([plain_proxy(image, helper()).T.unflatten(1, grid) for image in images])
    assert relative(together, single) < 1e-10
    rough = labeller("proxy", dtype=torch.float32).grid_scores(images)
    assert rough.dtype == torch.float32 and relative(rough, expected) < 1e-5


@pytest.mark.parametrize("patch", [8, 14, 20])
def test_grids_of_other_patches(patch: int) -> None:
    """Values are resized to the helper's grid; images are padded to whole patches of both."""
    made, whole = fine_helper(patch), math.lcm(PATCH, patch)
    model = labeller("proxy", made)
    images = photographs(whole, 2 * whole, batch=1)
    grid = (whole // patch, 2 * whole // patch)
    expected = cosines(plain_proxy(images[0], made), grid)
    assert relative(model.grid_scores(images)[0], expected) < 1e-10
    assert model.encoder.stride == patch
    for size in [(50, 70), (7, 3), (61, 130)]:
        scores = model.grid_scores(photographs(*size, batch=1))
        assert scores.shape[2:] == (-(-size[0] // patch), -(-size[1] // patch))
        assert torch.isfinite(scores).all()


def test_windows_of_proxy() -> None:
    images = photographs(80, 112, batch=1)
    places = [(y, x) for y in (0, 16) for x in (0, 32, 48)]
    expected = torch.zeros(6, 80, 112, dtype=torch.float64)
    on_cells = torch.zeros(6, 5, 7, dtype=torch.float64)
    count, seen = torch.zeros(80, 112), torch.zeros(5, 7)
    for y, x in places:
        part = cosines(plain_proxy(images[0][:, y : y + 64, x : x + 64], helper()), (4, 4))
        expected[:, y : y + 64, x : x + 64] += F.interpolate(part[None], (64, 64), mode="bilinear")[0]
        count[y : y + 64, x : x + 64] += 1
        on_cells[:, y // 16 : y // 16 + 4, x // 16 : x // 16 + 4] += part
        seen[y // 16 : y // 16 + 4, x // 16 : x // 16 + 4] += 1
    windows = {"window": 64, "window_stride": 32}
    assert (
        relative(labeller("proxy", windows="pixels", **windows).grid_scores(images)[0], expected / count)
        < 1e-10
    )
    assert relative(labeller("proxy", **windows).grid_scores(images)[0], on_cells / seen) < 1e-10


def test_splice_of_one_window_is_identity() -> None:
    images = photographs(64, 64, batch=1)
    whole = labeller("proxy").grid_scores(images)
    spliced = labeller("proxy", window=64, window_stride=32, windows="splice").grid_scores(images)
    assert relative(spliced, whole) < 1e-12


def test_affinity_of_maps_without_structure() -> None:
    """Equal values stay what they are, whatever the features; equal features leave each patch its own."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 30, 5, generator=generator)
    values = torch.randn(2, 1, 7, generator=generator).expand(2, 30, 7)
    assert torch.allclose(proxy.affinity_mix(features, values), values, atol=1e-6)
    values = torch.randn(2, 30, 7, generator=generator)
    assert torch.allclose(proxy.affinity_mix(torch.ones(2, 30, 5), values), values)


def test_affinity_in_groups_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, values = (torch.randn(2, 50, k, generator=generator, dtype=torch.float64) for k in (5, 7))
    whole = proxy.affinity_mix(features, values)
    monkeypatch.setattr(proxy, "ENTRIES", 350)
    assert torch.allclose(proxy.affinity_mix(features, values), whole, atol=1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_parity_of_lposs(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lposs, "NEIGHBOURS", 6)
    size = (grid[0] * PATCH, grid[1] * PATCH)
    images = photographs(*size)
    expected = torch.stack([plain_lposs(image, [(0, 0)], size, 6)[0] for image in images])
    model = labeller("lposs")
    assert relative(model.grid_scores(images), expected) < 1e-10
    before = labeller("proxy").grid_scores(images)
    assert relative(before, expected) > 1e-3
    rough = labeller("lposs", dtype=torch.float32).grid_scores(images)
    assert rough.dtype == torch.float32 and relative(rough, expected) < 1e-5
    with torch.inference_mode():
        statistics = (255 * torch.tensor(each, dtype=torch.float64) for each in (OPENAI_MEAN, OPENAI_STD))
        mean, std = (each[:, None, None] for each in statistics)
        together = model.scores(model.encoder((images.double() - mean) / std))
    assert relative(together, expected) < 1e-10


@pytest.mark.parametrize("rule", ["pixels", "cells"])
def test_one_graph_over_all_windows(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lposs, "NEIGHBOURS", 25)
    images = photographs(80, 112, batch=1)
    corners = [(y, x) for y in (0, 16) for x in (0, 32, 48)]
    parts = plain_lposs(images[0], corners, (64, 64), 25)
    unit = 1 if rule == "pixels" else PATCH
    expected = torch.zeros(6, 80 // unit, 112 // unit, dtype=torch.float64)
    count = torch.zeros(expected.shape[1:])
    for (y, x), part in zip(corners, parts, strict=True):
        rows, columns = (slice(at // unit, (at + 64) // unit) for at in (y, x))
        whole = F.interpolate(part[None], (64, 64), mode="bilinear")[0] if rule == "pixels" else part
        expected[:, rows, columns] += whole
        count[rows, columns] += 1
    found = labeller("lposs", windows=rule, window=64, window_stride=32).grid_scores(images)[0]
    assert relative(found, expected / count) < 1e-10


def test_graph_in_groups_of_rows_and_of_flat_features(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    features, y = (torch.randn(50, k, generator=generator, dtype=torch.float64) for k in (5, 3))
    places = torch.cartesian_prod(torch.arange(5.0), torch.arange(10.0)).double()
    monkeypatch.setattr(lposs, "NEIGHBOURS", 9)
    whole = lposs.graph_of(features, places).spread(y)
    monkeypatch.setattr(lposs, "ENTRIES", 350)
    assert torch.allclose(lposs.graph_of(features, places).spread(y), whole, atol=1e-12)
    alone = lposs.graph_of(features[:1], places[:1]).spread(y[:1])
    assert torch.equal(alone, torch.zeros(1, 3, dtype=torch.float64)), "a node has no edge to itself"
    flat = lposs.graph_of(torch.ones(50, 5), places.float()).spread(torch.ones(50, 3))
    assert torch.isfinite(flat).all()


def test_lposs_with_a_helper_of_other_patches() -> None:
    model = labeller("lposs", fine_helper(8))
    for size in [(50, 70), (7, 3)]:
        scores = model.grid_scores(photographs(*size, batch=1))
        assert scores.shape[2:] == (-(-size[0] // 8), -(-size[1] // 8))
        assert torch.isfinite(scores).all()


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "proxy"}, "helper names none"),
        ({"head": "nn", "helper": "test_vit"}, "helper means nothing to head nn"),
        ({"head": "proxy", "helper": "test_vit", "ks_threshold": 1.0}, "needs keys"),
        (
            {"head": "lposs", "helper": "test_vit", "window": 64, "window_stride": 32, "windows": "splice"},
            "makes the cosines of all windows agree",
        ),
    ],
)
def test_settings_that_do_not_fit(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MaskMillError, match=message):
        MaskClipSettings(**settings)


def test_windows_are_whole_cells_of_both_towers() -> None:
    with pytest.raises(MaskMillError, match="window = 64 is no multiple of the 112 pixels"):
        labeller("proxy", fine_helper(14), window=64, window_stride=32)


def test_a_resnet_has_no_such_head() -> None:
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}
    resnet = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=SMALL["text_cfg"]).visual
    with pytest.raises(MaskMillError, match="Use a ViT, or one of the heads maskclip"):
        dense_encoder(resnet, head="proxy", helper=helper().view(torch.zeros(3, 1, 1), torch.ones(3, 1, 1)))
