"""CLIPSeg against transformers' on the same random weights, and against a plain re-derivation in fp64.

transformers knows square images and patch 16; the re-derivation works on the decoder's tensors alone and
covers the rest.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from models.clip.loading import Activations, Clip, load_clip, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.clipseg.decoder import (
    ABLATIONS,
    ClipSeg,
    ClipSegDecoder,
    build_clipseg,
    layer_norm,
    mix,
    normalize,
    post_norm_block,
    refined_head,
)
from models.clipseg.weights import hugging_face_config, hugging_face_state
from models.errors import MaskMillError
from models.settings import ClipSegConfig

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 11, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PROMPTS = ["a cat", "two red cars on a bridge", "glass"]


def small_clip(seed: int = 0, *, patch: int = 16, dtype: torch.dtype = torch.float32) -> Clip:
    config = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_size": patch, "image_size": 14 * patch}}
    return load_source(
        WeightSource("small", f"random:{seed}", config, None, seed, OPENAI_MEAN, OPENAI_STD), dtype=dtype
    )


def scramble(decoder: nn.Module, seed: int = 0) -> None:
    """Weights that let every term show in the logits: nothing is zero, one, or too small to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in decoder.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim == 1:
                tensor.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            else:
                upsampling = tensor.ndim == 4 and "trans_conv.0" not in name
                fan_in = tensor.shape[0] if upsampling else tensor[0].numel()
                tensor.copy_(noise * fan_in**-0.5)


def small_clipseg(config: ClipSegConfig, clip: Clip | None = None) -> ClipSeg:
    model = build_clipseg(clip or small_clip(), config)
    scramble(model.decoder)
    return model


def pixels(batch: int, height: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def as_transformers(model: ClipSeg) -> Any:
    """transformers' CLIPSeg with the same weights."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    reference = transformers.CLIPSegForImageSegmentation(
        transformers.CLIPSegConfig(**hugging_face_config(model))
    )
    reference.load_state_dict(hugging_face_state(model))
    return reference.eval()


@pytest.fixture(scope="module")
def clip() -> Clip:
    return small_clip()


# --- transformers ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("side", [224, 352])
@pytest.mark.parametrize("layers", [(3, 6, 9), (3, 7, 9)], ids=str)
@pytest.mark.parametrize("refined", [False, True], ids=["plain", "refined"])
def test_same_as_transformers(clip: Clip, refined: bool, layers: tuple[int, ...], side: int) -> None:
    config = ClipSegConfig(reduce_dim=16, extract_layers=layers, refined=refined, feedforward=128)
    model = small_clipseg(config, clip)
    reference = as_transformers(model)
    images, examples = pixels(2, side, side), pixels(3, side, side, seed=1)
    tokens = clip.tokenizer(PROMPTS)
    with torch.no_grad():
        text, image = model.encode_text(PROMPTS), model.encode_prompt_images(examples)
        theirs_text = reference.clip.get_text_features(tokens).pooler_output
        theirs_image = reference.clip.get_image_features(examples).pooler_output
        torch.testing.assert_close(text, theirs_text, atol=2e-5, rtol=0)
        torch.testing.assert_close(image, theirs_image, atol=2e-5, rtol=0)
        weight = torch.tensor([0.2, 0.5, 0.9])
        mixed = mix(text, image, weight)
        activations = model.encode_image(images)
        for name, ours, theirs in [
            ("text", text, {"input_ids": tokens}),
            ("image", image, {"conditional_pixel_values": examples}),
            ("mixed", mixed, {"conditional_embeddings": weight[:, None] * theirs_text
                              + (1 - weight[:, None]) * theirs_image}),
        ]:  # fmt: skip
            logits = model.decode(activations, ours)
            assert logits.shape == (2, 3, side, side)
            assert logits.std() > 0.3, "logits that could hide a mistake"
            expected = reference(pixel_values=images[1:].expand(3, -1, -1, -1), **theirs).logits
            assert (logits[1] - expected).abs().max() < 1e-4, name


@pytest.mark.parametrize("config", [
    ClipSegConfig(reduce_dim=64, extract_layers=(3,), feedforward=64),
    ClipSegConfig(reduce_dim=8, extract_layers=(0, 4, 9, 10), heads=2, cond_layer=2, feedforward=64),
], ids=["layer3", "later"])  # fmt: skip
def test_other_decoders_as_transformers(clip: Clip, config: ClipSegConfig) -> None:
    model = small_clipseg(config, clip)
    reference = as_transformers(model)
    images = pixels(1, 96, 96)
    with torch.no_grad():
        logits = model(images, model.encode_text(PROMPTS))[0]
        expected = reference(
            pixel_values=images.expand(3, -1, -1, -1), input_ids=clip.tokenizer(PROMPTS)
        ).logits
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert logits.std() > 0.3


# --- the re-derivation ----------------------------------------------------------------------------------


def derived_logits(
    decoder: nn.Module, layers: list[Tensor], conditional: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Logits (H, W) of one image and one prompt in fp64, token by token as the paper writes it."""
    config = decoder.config
    state = {name: tensor.double() for name, tensor in decoder.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    a = torch.zeros(())
    for index, activation in enumerate(reversed(layers)):
        a = linear(f"reduces.{index}", activation.double()) + a
        if index == config.cond_layer:
            a = linear("film_mul", conditional.double()) * a + linear("film_add", conditional.double())
        block = f"blocks.{index}"
        packed = a @ state[f"{block}.self_attn.in_proj_weight"].T + state[f"{block}.self_attn.in_proj_bias"]
        heads = []
        for q, k, v in zip(*(part.chunk(config.heads, 1) for part in packed.chunk(3, 1)), strict=True):
            heads.append((q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v)
        a = norm(f"{block}.norm1", a + linear(f"{block}.self_attn.out_proj", torch.cat(heads, 1)))
        a = norm(f"{block}.norm2", a + linear(f"{block}.linear2", linear(f"{block}.linear1", a).relu()))

    def up(name: str, x: Tensor) -> Tensor:
        kernel, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        c, k = kernel.shape[1], kernel.shape[2]
        tiles = torch.einsum("dyx,dckl->cykxl", x, kernel)
        return tiles.reshape(c, x.shape[1] * k, x.shape[2] * k) + bias[:, None, None]

    x = a[1:].T.reshape(-1, *grid)
    if not config.refined:
        return up("trans_conv", x)[0]
    x = F.conv2d(x[None], state["trans_conv.0.weight"], state["trans_conv.0.bias"], padding=1)[0].relu()
    return up("trans_conv.4", up("trans_conv.2", x).relu())[0]


@pytest.mark.parametrize(("height", "width"), [(32, 96), (100, 60), (176, 704), (15, 17)])
@pytest.mark.parametrize("refined", [False, True], ids=["plain", "refined"])
def test_any_size(clip: Clip, refined: bool, height: int, width: int) -> None:
    # 176 x 704 has 22 * 22 tokens; code that takes the root of their number scrambles it.
    model = small_clipseg(ClipSegConfig(reduce_dim=8, feedforward=32, refined=refined), clip)
    images, conditionals = pixels(2, height, width), model.encode_text(PROMPTS)
    activations = model.encode_image(images)
    grid = (-(-height // 16), -(-width // 16))
    assert activations.grid == grid
    with torch.no_grad():
        logits = model.decode(activations, conditionals)
    assert logits.shape == (2, 3, height, width)
    padded = F.pad(images, (0, 16 * grid[1] - width, 0, 16 * grid[0] - height))
    # The tower itself at this size: transformers' agrees on squares (above), open_clip's modules elsewhere.
    layers = tower_by_hand(clip, padded, grid, (3, 6, 9))
    for b, p in [(0, 0), (1, 2)]:
        expected = derived_logits(model.decoder, [layer[b] for layer in layers], conditionals[p], grid)
        torch.testing.assert_close(logits[b, p].double(), expected[:height, :width], atol=1e-4, rtol=0)


def tower_by_hand(clip: Clip, images: Tensor, grid: tuple[int, int], layers: tuple[int, ...]) -> list[Tensor]:
    visual = clip.visual
    table = visual.positional_embedding
    square = table[1:].reshape(1, 14, 14, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(square, grid, mode="bicubic", align_corners=False)[0].flatten(1).T
    x = visual.conv1(images).flatten(2).transpose(1, 2)
    x = torch.cat([visual.class_embedding.expand(len(x), 1, -1), x], 1)
    x = visual.ln_pre(x + torch.cat([table[:1], resized]))
    taken = []
    for index, block in enumerate(visual.transformer.resblocks):
        x = block(x)
        if index in layers:
            taken.append(x)
    return taken


@pytest.mark.parametrize("patch", [7, 8, 14, 32])
@pytest.mark.parametrize("refined", [False, True], ids=["plain", "refined"])
def test_any_patch(patch: int, refined: bool) -> None:
    decoder = ClipSegDecoder(
        ClipSegConfig(reduce_dim=8, extract_layers=(1, 2), refined=refined, feedforward=16),
        width=12, embed_dim=6, patch=patch,
    ).eval()  # fmt: skip
    scramble(decoder)
    layers, conditional = [torch.randn(1, 1 + 2 * 3, 12) for _ in range(2)], torch.randn(1, 6)
    with torch.no_grad():
        logits = decoder(layers, conditional, (2, 3))
    assert logits.shape == (1, 1, 2 * patch, 3 * patch)
    expected = derived_logits(decoder, [layer[0] for layer in layers], conditional[0], (2, 3))
    torch.testing.assert_close(logits[0, 0].double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("patch", "kernels"), [(16, (4, 4)), (32, (8, 4)), (14, (7, 2)), (8, (4, 2)), (7, (7, 1))]
)
def test_refined_factors(patch: int, kernels: tuple[int, int]) -> None:
    head = refined_head(8, patch)
    assert isinstance(head, nn.Sequential)
    assert (head[2].kernel_size[0], head[4].kernel_size[0]) == kernels


# --- the CLIP beneath -----------------------------------------------------------------------------------


def test_activations_and_embeddings_are_open_clips(clip: Clip) -> None:
    images = pixels(2, 224, 224)
    found = clip.activations(images, (0, 4, 10))
    expected = clip.visual.forward_intermediates(
        images, indices=[0, 4, 10], output_fmt="NLC", output_extra_tokens=True
    )
    patches, extra = expected["image_intermediates"], expected["image_intermediates_prefix"]
    for ours, rest, first in zip(found.layers, patches, extra, strict=True):
        torch.testing.assert_close(ours, torch.cat([first, rest], 1), atol=2e-5, rtol=0)
    torch.testing.assert_close(clip.encode_image(images), clip.model.encode_image(images), atol=2e-5, rtol=0)
    text = clip.encode_text(PROMPTS, normalize=False)
    torch.testing.assert_close(text, clip.model.encode_text(clip.tokenizer(PROMPTS)), atol=2e-5, rtol=0)
    assert not torch.allclose(text.norm(dim=1), torch.ones(3), atol=0.1)


def test_the_tower_runs_once_and_no_further_than_needed(clip: Clip) -> None:
    model = small_clipseg(ClipSegConfig(reduce_dim=8, extract_layers=(2, 5), feedforward=16), clip)
    runs: list[int] = []
    blocks = clip.visual.transformer.resblocks
    hooks = [
        block.ln_1.register_forward_hook(lambda *_, index=index: runs.append(index))
        for index, block in enumerate(blocks)
    ]
    model(pixels(1, 64, 64), torch.randn(7, 32))
    for hook in hooks:
        hook.remove()
    assert runs == [0, 1, 2, 3, 4, 5]


# --- prompts --------------------------------------------------------------------------------------------


def test_prompts_do_not_see_each_other(clip: Clip) -> None:
    model = small_clipseg(ClipSegConfig(reduce_dim=8, feedforward=32), clip)
    activations = model.encode_image(pixels(2, 64, 96))
    shared = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    own = torch.stack([shared, shared.flip(0)])
    with torch.no_grad():
        together = model.decode(activations, shared)
        for p in range(5):
            alone = model.decode(activations, shared[p : p + 1])
            torch.testing.assert_close(together[:, p], alone[:, 0], atol=2e-5, rtol=0)
        torch.testing.assert_close(
            model.decode(activations, shared, prompts_at_once=2), together, atol=2e-5, rtol=0
        )
        each = model.decode(activations, own)
        torch.testing.assert_close(model.decode(activations, own, prompts_at_once=3), each, atol=2e-5, rtol=0)
    torch.testing.assert_close(each[0], together[0], atol=2e-5, rtol=0)
    torch.testing.assert_close(each[1], together[1].flip(0), atol=2e-5, rtol=0)
    assert (together[:, 0] - together[:, 1]).abs().max() > 0.5


def test_mix() -> None:
    text, image = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(mix(text, image, 0.25), 0.25 * text + 0.75 * image)
    each = mix(text, image, torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(each, torch.stack([image[0], text[1], (text[2] + image[2]) / 2]))


# --- precision and training -----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str)
def test_half_precision(clip: Clip, dtype: torch.dtype, tolerance: float) -> None:
    """Rounded inputs and weights, but norms and softmax as exact as in fp32."""
    model = small_clipseg(ClipSegConfig(reduce_dim=16, feedforward=64), clip)
    decoder = model.decoder
    # A residual stream of some hundreds: its squares are beyond fp16 (65504).
    layers = [300 * torch.randn(1, 10, 64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    conditional = torch.randn(2, 32, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        low = decoder.to(dtype)([layer.to(dtype) for layer in layers], conditional, (3, 3))
        exact = decoder.float()([layer.to(dtype).float() for layer in layers], conditional, (3, 3))
    assert low.dtype == dtype
    assert torch.isfinite(low).all()
    assert (low.float() - exact).abs().mean() < tolerance * exact.std()
    activations = Activations(tuple(layer.to(dtype) for layer in layers), (3, 3), (48, 48))
    with torch.no_grad():
        assert model.decode(activations, conditional).dtype == torch.float32


def test_half_precision_norm_is_rounded_once() -> None:
    norm = nn.LayerNorm(64)
    scramble(norm)
    x = 300 * torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16):
        low, weight, bias = x.to(dtype), norm.weight.to(dtype).float(), norm.bias.to(dtype).float()
        expected = F.layer_norm(low.float(), (64,), weight, bias).to(dtype)
        half = nn.LayerNorm(64).to(dtype)
        half.load_state_dict(norm.state_dict())
        assert torch.equal(layer_norm(half, low), expected)


def test_fp64(clip: Clip) -> None:
    exact = small_clip(dtype=torch.float64)
    model = small_clipseg(ClipSegConfig(reduce_dim=8, feedforward=32), clip)
    double = ClipSeg(exact, small_clipseg(model.decoder.config, clip).decoder.double())
    images = pixels(1, 64, 64)
    conditional = model.encode_text(PROMPTS)
    with torch.no_grad():
        logits = double(images.double(), conditional.double())
        assert logits.dtype == torch.float64
        torch.testing.assert_close(model(images, conditional).double(), logits, atol=1e-4, rtol=0)


def test_training(clip: Clip) -> None:
    model = build_clipseg(clip, ClipSegConfig(reduce_dim=16, feedforward=64))
    images, conditional = pixels(2, 64, 64), model.encode_text(PROMPTS[:2])[:, None]
    target = torch.zeros(2, 1, 64, 64)
    target[:, :, 16:48, 16:48] = 1
    activations = model.encode_image(images)
    torch.manual_seed(0)  # of the dropout
    model.decoder.train()
    with torch.no_grad():
        first, second = (model.decode(activations, conditional) for _ in range(2))
        assert not torch.equal(first, second), "no dropout"
        model.decoder.eval()
        assert torch.equal(model.decode(activations, conditional), model.decode(activations, conditional))
    model.decoder.train()
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.binary_cross_entropy_with_logits(model.decode(activations, conditional), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]  # six seeds, 1 and 2 threads: 0.10 to 0.29
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_where_dropout_is() -> None:
    """A rate of 1 at each of the four places takes out exactly what comes before it."""
    config = ClipSegConfig(reduce_dim=16, feedforward=32, dropout=0.3)
    block = ClipSegDecoder(config, width=8, embed_dim=8).blocks[0]
    assert isinstance(block, nn.TransformerEncoderLayer)
    scramble(block)
    places = [block.self_attn, block.dropout1, block.dropout, block.dropout2]
    rates = ["dropout", "p", "p", "p"]
    assert [getattr(place, rate) for place, rate in zip(places, rates, strict=True)] == [0.3] * 4
    x = torch.randn(2, 3, 7, 16)

    def expected(gone: int | None) -> Tensor:
        flat = x.flatten(0, 1)
        mixed = block.self_attn(flat, flat, flat, need_weights=False)[0]
        if gone == 0:
            mixed = block.self_attn.out_proj.bias.expand_as(flat)
        y = block.norm1(flat + (0 if gone == 1 else mixed))
        hidden = block.linear1(y).relu() * (gone != 2)
        return block.norm2(y + (0 if gone == 3 else block.linear2(hidden)))

    with torch.no_grad():
        for gone in (None, 0, 1, 2, 3):
            for index, (place, rate) in enumerate(zip(places, rates, strict=True)):
                setattr(place, rate, float(index == gone))
            block.eval()
            reference, whole = expected(gone), expected(None)
            out = post_norm_block(block.train(), x).flatten(0, 1)
            torch.testing.assert_close(out, reference, atol=1e-5, rtol=0)
            if gone is not None:
                assert not torch.allclose(out, whole, atol=1e-2)


def test_seeds(clip: Clip) -> None:
    config = ClipSegConfig(reduce_dim=8, feedforward=16)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (build_clipseg(clip, config, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    for name, tensor in one.decoder.state_dict().items():
        assert torch.equal(tensor, same.decoder.state_dict()[name])


def test_fingerprint_covers_what_changes_the_mask(clip: Clip) -> None:
    config = ClipSegConfig(reduce_dim=8, feedforward=16)
    base = build_clipseg(clip, config).fingerprint
    layers = build_clipseg(clip, ClipSegConfig(reduce_dim=8, feedforward=16, extract_layers=(3, 7, 9)))
    changed = build_clipseg(clip, config)
    with torch.no_grad():
        changed.decoder.trans_conv.bias += 1e-3  # type: ignore[union-attr,operator]
    others = {layers.fingerprint, changed.fingerprint, build_clipseg(small_clip(1), config).fingerprint}
    assert len(others | {base}) == 4


# --- settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("config", "count"), [
    (ClipSegConfig(), 1_073_153),
    (ClipSegConfig(refined=True), 1_127_009),
    (ClipSegConfig(reduce_dim=16), 263_681),
    (ABLATIONS["d128"], 2_238_465),
])  # fmt: skip
def test_parameter_counts(config: ClipSegConfig, count: int) -> None:
    assert sum(parameter.numel() for parameter in ClipSegDecoder(config).parameters()) == count


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_run(clip: Clip, name: str) -> None:
    model = build_clipseg(clip, ABLATIONS[name])
    with torch.no_grad():
        assert model(pixels(1, 48, 32), torch.randn(2, 32)).shape == (1, 2, 48, 32)


def test_normalize() -> None:
    images = torch.randint(0, 256, (2, 3, 50, 70), dtype=torch.uint8)
    expected = v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.Resize((32, 48), antialias=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ])(images)  # fmt: skip
    torch.testing.assert_close(normalize(images, (32, 48)), expected, atol=1e-5, rtol=0)
    assert normalize(images, 352).shape == (2, 3, 352, 352)
    assert normalize(images).shape == images.shape


@pytest.mark.parametrize("settings", [
    {"extract_layers": ()}, {"extract_layers": (6, 3)}, {"extract_layers": (-1, 3)}, {"reduce_dim": 6},
    {"cond_layer": 3}, {"dropout": 1.0}, {"feedforward": 0},
], ids=str)  # fmt: skip
def test_wrong_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(MaskMillError) as caught:
        ClipSegConfig(**settings)
    assert caught.value.code == "setting_invalid"


def test_decoders_that_do_not_fit(clip: Clip) -> None:
    for decoder in (
        ClipSegDecoder(ClipSegConfig(reduce_dim=8)),
        ClipSegDecoder(ClipSegConfig(reduce_dim=8), width=64, embed_dim=32, patch=8),
        ClipSegDecoder(ClipSegConfig(reduce_dim=8, extract_layers=(3, 11)), width=64, embed_dim=32),
    ):
        with pytest.raises(MaskMillError) as caught:
            ClipSeg(clip, decoder)
        assert caught.value.code == "weights_do_not_fit"


def test_a_resnet_is_refused() -> None:
    resnet = load_clip("RN50", "random:0", towers="visual")
    with pytest.raises(MaskMillError) as caught:
        build_clipseg(resnet)
    assert caught.value.code == "model_unsupported"
    with pytest.raises(MaskMillError):
        resnet.activations(pixels(1, 64, 64), (0,))
