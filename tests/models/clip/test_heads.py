"""Every dense head against a plain re-derivation from its formulas: per image, per attention head, in loops.

The re-derivations work on the tensors of the state dict alone and share no code with ``models``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from models.catalogue import HEADS
from models.clip.dense import dense_encoder
from models.clip.heads import calibrated
from models.clip.heads.base import HeadOptions
from models.errors import MaskMillError
from models.settings import MaskClipSettings

PATCH, WIDTH, HEAD_WIDTH, NATIVE = 8, 48, 16, 7
TEXT = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
GRIDS = [(7, 7), (5, 9), (9, 6)]


@functools.cache
def tower(layers: int = 12) -> Any:
    """Variances are raised, so that thresholds and softmaxes do something."""
    vision: dict[str, Any] = {
        "image_size": NATIVE * PATCH, "layers": layers, "width": WIDTH, "head_width": HEAD_WIDTH,
        "patch_size": PATCH,
    }  # fmt: skip
    return seeded(vision)


@functools.cache
def resnet() -> Any:
    return seeded({"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16})


def seeded(vision: dict[str, Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.CLIP(embed_dim=32, vision_cfg=vision, text_cfg=TEXT, quick_gelu=True)
        for name, parameter in model.visual.named_parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
            if "in_proj_weight" in name or "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.data *= 2
    return model.visual.eval().double().requires_grad_(False)


def pictures(grid: tuple[int, int], batch: int = 2, cell: int = PATCH) -> Tensor:
    generator = torch.Generator().manual_seed(grid[0])
    noise = torch.randn(batch, 3, grid[0] * cell, grid[1] * cell, generator=generator, dtype=torch.float64)
    noise[:, :, : grid[0] * cell // 2] *= 0.2  # two regions, so that some patches are alike
    return noise


# --- the re-derivation --------------------------------------------------------------------------------------


class Plain:
    """A ViT from its state dict, for one image; tokens are (N, W)."""

    def __init__(self, visual: Any) -> None:
        self.state = {name: tensor.detach().clone() for name, tensor in visual.state_dict().items()}
        self.depth = len(visual.transformer.resblocks)

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(-1, keepdim=True)
        scaled = (x - mean) / (variance + 1e-5).sqrt()
        return scaled * self.state[name + ".weight"] + self.state[name + ".bias"]

    def part(self, layer: int, name: str) -> Tensor:
        return self.state[f"transformer.resblocks.{layer}.{name}"]

    def qkv(self, y: Tensor, layer: int) -> list[list[Tensor]]:
        """q, k, v; of each, one (N, d) per attention head."""
        packed = y @ self.part(layer, "attn.in_proj_weight").T + self.part(layer, "attn.in_proj_bias")
        return [
            [
                packed[:, part * WIDTH + at : part * WIDTH + at + HEAD_WIDTH]
                for at in range(0, WIDTH, HEAD_WIDTH)
            ]
            for part in range(3)
        ]

    def out(self, x: Tensor, layer: int) -> Tensor:
        return x @ self.part(layer, "attn.out_proj.weight").T + self.part(layer, "attn.out_proj.bias")

    def ln_1(self, x: Tensor, layer: int) -> Tensor:
        return self.norm(x, f"transformer.resblocks.{layer}.ln_1")

    def rest(self, x: Tensor, layer: int) -> Tensor:
        """x plus the MLP."""
        y = self.norm(x, f"transformer.resblocks.{layer}.ln_2")
        y = y @ self.part(layer, "mlp.c_fc.weight").T + self.part(layer, "mlp.c_fc.bias")
        y = y * torch.sigmoid(1.702 * y)
        return x + y @ self.part(layer, "mlp.c_proj.weight").T + self.part(layer, "mlp.c_proj.bias")

    def outputs(self, image: Tensor, table: Tensor) -> list[Tensor]:
        """Tokens after every block but the last."""
        h, w = image.shape[1] // PATCH, image.shape[2] // PATCH
        tokens = [self.state["class_embedding"]]
        for i in range(h):
            for j in range(w):
                cell = image[:, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
                tokens.append((self.state["conv1.weight"] * cell).sum((1, 2, 3)))
        x = self.norm(torch.stack(tokens) + table, "ln_pre")
        found = []
        for layer in range(self.depth - 1):
            q, k, v = self.qkv(self.ln_1(x, layer), layer)
            mixed = [softmax(a @ b.T / math.sqrt(HEAD_WIDTH)) @ c for a, b, c in zip(q, k, v, strict=True)]
            x = self.rest(x + self.out(torch.cat(mixed, 1), layer), layer)
            found.append(x)
        return found

    def embedded(self, patches: Tensor) -> Tensor:
        return self.norm(patches, "ln_post") @ self.state["proj"]


def softmax(x: Tensor) -> Tensor:
    x = (x - x.max(1, keepdim=True).values).exp()
    return x / x.sum(1, keepdim=True)


Mixing = Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]
"""q, k, v (N, d) of one attention head, class token first -> (N, d)."""


def qq(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    return softmax(q @ q.T / math.sqrt(q.shape[1])) @ v


def kk(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    return softmax(k @ k.T / math.sqrt(k.shape[1])) @ v


def both(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    return qq(q, k, v, grid) + kk(q, k, v, grid)


def near(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], sigma: float = 5.0) -> Tensor:
    logits = k @ k.T / math.sqrt(k.shape[1])
    for i in range(1, len(k)):
        for j in range(1, len(k)):
            (y, x), (t, s) = divmod(i - 1, grid[1]), divmod(j - 1, grid[1])
            logits[i, j] += math.exp(-((y - t) ** 2 + (x - s) ** 2) / (2 * sigma**2))
    return softmax(logits) @ v


def turned(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], alpha: float = 0.08) -> Tensor:
    d = q.shape[1]
    weight = q.square().sum(1).sqrt()
    weight[0] = 0
    weight = weight / weight.sum()
    q_c = q - sum(weight[t] * q[t] for t in range(len(q)))
    k_c = k - sum(weight[t] * k[t] for t in range(len(k)))
    m = k_c.T @ q_c
    square = m.T @ m
    size = square.square().sum().sqrt()
    # Newton–Schulz for the inverse root, written out for the one matrix.
    y, z = square / size + 1e-6 * torch.eye(d, dtype=q.dtype), torch.eye(d, dtype=q.dtype)
    for _ in range(5):
        y, z = (
            0.5 * y @ (3 * torch.eye(d, dtype=q.dtype) - z @ y),
            0.5 * (3 * torch.eye(d, dtype=q.dtype) - z @ y) @ z,
        )
    rotation = m @ z / math.sqrt(size)
    return softmax((q @ (k @ rotation).T + alpha * k_c @ k_c.T) / math.sqrt(d)) @ v


MIXING: dict[str, tuple[Mixing, bool]] = {
    "qq": (qq, False),
    "kk": (kk, False),
    "nn": (near, False),
    "sclip": (both, True),
    "pa": (turned, False),
}


def plain_mixing(
    head: str, plain: Plain, outputs: list[Tensor], grid: tuple[int, int], **how: float
) -> Tensor:
    mix, whole = MIXING[head]
    x, last = outputs[-1], plain.depth - 1
    q, k, v = plain.qkv(plain.ln_1(x, last), last)
    mixed = torch.cat([mix(*each, grid, **how) for each in zip(q, k, v, strict=True)], 1)
    mixed = plain.out(mixed, last)
    return plain.embedded((plain.rest(x + mixed, last) if whole else mixed)[1:])


def plain_sc(plain: Plain, outputs: list[Tensor], grid: tuple[int, int]) -> Tensor:
    """Steps 1 to 6 of the method, for 12 blocks; ``outputs[i]`` is the output of block i + 1."""
    h, w = grid
    count, last = h * w, plain.depth - 1
    late = outputs[10][1:]
    distance = torch.stack([(late - late[i]).square().sum(1) for i in range(count)])
    neighbours = [[j for j in distance[i].argsort().tolist() if j != i][:30] for i in range(count)]
    reach = [float(distance[i, neighbours[i][-1]]) for i in range(count)]
    # Local reachability density with the row's own distance, and the factor itself.
    density = [
        len(neighbours[i]) / sum(max(float(distance[i, j]), reach[i]) for j in neighbours[i])
        for i in range(count)
    ]
    score = torch.tensor(
        [sum(density[j] for j in neighbours[i]) / len(neighbours[i]) / density[i] for i in range(count)],
        dtype=late.dtype,
    )
    bad = (score > torch.quantile(score, 0.95)).tolist()
    assert any(bad), "the test is about outliers"

    def mend(x: Tensor) -> Tensor:
        made = x.clone()
        for at in range(count):
            if bad[at]:
                y, z = divmod(at, w)
                around = [
                    x[t * w + s]
                    for t in range(max(0, y - 1), min(h, y + 2))
                    for s in range(max(0, z - 1), min(w, z + 2))
                    if (t, s) != (y, z) and not bad[t * w + s]
                ]
                if around:
                    made[at] = torch.stack(around).mean(0)
        return made

    def cosines(x: Tensor) -> Tensor:
        unit = x / x.square().sum(1, keepdim=True).sqrt()
        return unit @ unit.T

    def average(similar: Tensor, x: Tensor) -> Tensor:
        made = torch.empty_like(x)
        for i in range(count):
            weight = torch.tensor([s if s >= 0.4 else 0.0 for s in similar[i].tolist()], dtype=x.dtype)
            made[i] = (weight[:, None] * x).sum(0) / (weight.sum() + 1e-6)
        return made

    middle = cosines(mend(outputs[8][1:]))
    share = (middle < 0.4).double().mean()
    assert 0.02 < share < 0.98 - 1 / count, f"the threshold should bite: {share}"
    low = cosines(outputs[3][1:])
    logits = 3 * (middle - middle.mean())
    logits[logits < 0] = -math.inf
    shared = softmax(logits)

    def attend(x: Tensor, cls: Tensor) -> Tensor:
        _, k, v = plain.qkv(plain.ln_1(x, last), last)
        mixed = [
            0.5 * (shared + softmax(b @ b.T / math.sqrt(HEAD_WIDTH))) @ c for b, c in zip(k, v, strict=True)
        ]
        return plain.out(torch.cat(mixed, 1), last) + 0.3 * cls

    y = average(low, attend(average(middle, mend(late)), outputs[10][0]))
    span = sum(outputs[i] for i in range(3, 10))
    z = average(low, attend(span[1:], span[0]))
    return plain.embedded(y + z)


# --- parity -------------------------------------------------------------------------------------------------


def expected_features(head: str, grid: tuple[int, int], images: Tensor, **how: float) -> Tensor:
    visual = tower()
    plain = Plain(visual)
    table = dense_encoder(visual).position_table(grid)
    found = []
    for image in images:
        outputs = plain.outputs(image, table)
        read = (
            plain_sc(plain, outputs, grid)
            if head == "sc"
            else plain_mixing(head, plain, outputs, grid, **how)
        )
        found.append(read.T.unflatten(1, grid))
    return torch.stack(found)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("head", [*MIXING, "sc"])
def test_parity_on_a_vit(head: str, grid: tuple[int, int]) -> None:
    images = pictures(grid)
    expected = expected_features(head, grid, images)
    with torch.inference_mode():
        found = dense_encoder(tower(), head=head)(images).features
        assert relative(found, expected) < 1e-10
        single = [dense_encoder(tower(), head=head)(image[None]).features for image in images]
        assert relative(torch.cat(single), expected) < 1e-10
        rough = dense_encoder(seeded_copy(), head=head)(images).features
    assert rough.dtype == torch.float32
    assert relative(rough.double(), expected) < 1e-5


@functools.cache
def seeded_copy() -> Any:
    import copy

    return copy.deepcopy(tower()).float()


def test_settings_of_single_heads() -> None:
    images, grid = pictures((5, 9)), (5, 9)
    for head, options, how in (
        ("nn", HeadOptions(sigma=1.5), {"sigma": 1.5}),
        ("pa", HeadOptions(alpha=0.3), {"alpha": 0.3}),
    ):
        with torch.inference_mode():
            found = dense_encoder(tower(), head=head, options=options)(images).features
            usual = dense_encoder(tower(), head=head)(images).features
        assert relative(found, expected_features(head, grid, images, **how)) < 1e-10
        assert relative(found, usual) > 1e-4
    with pytest.raises(MaskMillError, match="sigma means nothing to head kk"):
        MaskClipSettings(head="kk", sigma=2)
    with pytest.raises(MaskMillError, match="Did you mean value"):
        MaskClipSettings(head="values")


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
@pytest.mark.parametrize("head", MIXING)
def test_parity_on_a_resnet(head: str, size: tuple[int, int]) -> None:
    """The pool attends with the mean token in the place of a class token; there is no residual and no MLP."""
    visual, grid = resnet(), (size[0] // 32, size[1] // 32)
    images = pictures(grid, batch=2, cell=32)
    state = {name: tensor.detach() for name, tensor in visual.attnpool.state_dict().items()}
    with torch.inference_mode():
        found = dense_encoder(visual, head=head)(images).features
        trunk = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(images)))))
    for image, features in zip(trunk, found, strict=True):
        x = image.flatten(1).T
        x = torch.cat([x.mean(0, keepdim=True), x])
        q, k, v = (x @ state[f"{name}_proj.weight"].T + state[f"{name}_proj.bias"] for name in "qkv")
        d = q.shape[1] // visual.attnpool.num_heads
        mixed = torch.cat(
            [
                MIXING[head][0](q[:, at : at + d], k[:, at : at + d], v[:, at : at + d], grid)
                for at in range(0, q.shape[1], d)
            ],
            1,
        )
        expected = (mixed @ state["c_proj.weight"].T + state["c_proj.bias"])[1:].T.unflatten(1, grid)
        assert relative(features, expected) < 1e-10


def test_every_head_works_on_both_towers_or_says_why() -> None:
    for head, entry in HEADS.items():
        if entry.helper:
            with pytest.raises(MaskMillError, match="needs a helper tower"):
                dense_encoder(tower(), head=head)
            continue
        if entry.tower:
            for visual in (tower(), resnet()):
                with pytest.raises(MaskMillError, match="last block of another tower than CLIP's"):
                    dense_encoder(visual, head=head)
            continue
        assert dense_encoder(tower(), head=head)(pictures((3, 5))).features.shape == (2, 32, 3, 5)
        if entry.vit_only:
            with pytest.raises(MaskMillError, match="Use a ViT, or one of the heads maskclip"):
                dense_encoder(resnet(), head=head)
        else:
            assert dense_encoder(resnet(), head=head)(pictures((2, 3), cell=32)).features.shape == (
                2,
                32,
                2,
                3,
            )


# --- the self-calibrated head at its edges ------------------------------------------------------------------


def test_layers_of_other_depths() -> None:
    assert calibrated.layers(12) == (3, 8, 3, 4, 5, 6, 7, 8, 9)
    assert calibrated.layers(24) == (6, 16, 6, 8, 10, 12, 14, 16, 18)
    for depth in range(2, 50):
        assert max(calibrated.layers(depth)) <= depth - 2
    with pytest.raises(MaskMillError, match="one block only"):
        dense_encoder(tower(1), head="sc")


@pytest.mark.parametrize("grid", [(1, 1), (1, 2), (4, 5), (1, 40)], ids=str)
def test_small_and_flat_grids(grid: tuple[int, int]) -> None:
    for images in (pictures(grid), torch.zeros(1, 3, grid[0] * PATCH, grid[1] * PATCH, dtype=torch.float64)):
        features = dense_encoder(tower(), head="sc")(images).features
        assert torch.isfinite(features).all()


def test_equal_patches_are_no_outliers() -> None:
    assert not calibrated.outliers(torch.ones(2, 40, 6)).any()
    x = torch.randn(1, 60, 6, generator=torch.Generator().manual_seed(0))
    x[0, 7] *= 50
    assert calibrated.outliers(x)[0, 7]
    assert calibrated.outliers(torch.ones(2, 1, 6)).sum() == 0


def test_an_outlier_among_outliers_stays() -> None:
    x = torch.arange(9.0)[None, :, None]
    every = torch.ones(1, 9, dtype=torch.bool)
    assert torch.equal(calibrated.repaired(x, every, (3, 3)), x)
    corner = torch.zeros(1, 9, dtype=torch.bool)
    corner[0, 0] = True
    mended = calibrated.repaired(x, corner, (3, 3))
    assert mended[0, 0, 0] == pytest.approx((1 + 3 + 4) / 3)
    assert torch.equal(mended[0, 1:], x[0, 1:])
