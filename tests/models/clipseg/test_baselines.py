"""CLIP-Deconv and ViTSeg against re-derivations from the tensors and from timm's own modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.loading import Clip, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.clipseg.baselines import (
    ClipDeconvConfig,
    ClipDeconvDecoder,
    ViTSegConfig,
    build_clip_deconv,
    build_vitseg,
)
from models.clipseg.decoder import ClipSeg, build_clipseg
from models.clipseg.weights import load_baseline, load_clipseg, save_clipseg, save_decoder
from models.errors import MaskMillError
from models.settings import ClipSegConfig

SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
TINY = ViTSegConfig(reduce_dim=8, feedforward=32, extract_layers=(1, 3, 4), tower="test_vit")  # 160 x 160
PROMPTS = ["a cat", "two red cars", "glass"]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_source(WeightSource("small", "random:0", SMALL, None, 0, OPENAI_MEAN, OPENAI_STD))


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(call: Callable[[], object]) -> MaskMillError:
    with pytest.raises(MaskMillError) as caught:
        call()
    return caught.value


# --- CLIP-Deconv ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(64, 64), (50, 90)])
def test_clip_deconv(clip: Clip, height: int, width: int) -> None:
    model = build_clip_deconv(clip, ClipDeconvConfig(reduce_dim=12, reduce2_dim=20, extract_layer=2))
    images, conditionals = pixels(2, 3, height, width), model.encode_text(PROMPTS)
    with torch.no_grad():
        logits = model(images, conditionals)
    assert logits.shape == (2, 3, height, width)
    state = {name: tensor.double() for name, tensor in model.decoder.state_dict().items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    activations = clip.activations(images, (2,))
    h, w = activations.grid
    for b, p in [(0, 0), (1, 2)]:
        c = conditionals[p].double()
        x = linear("film_mul", c) * linear("reduce", activations.layers[0][b].double()) + linear(
            "film_add", c
        )
        x = linear("reduce2.2", linear("reduce2.0", x).relu())[1:]
        kernel = state["trans_conv.weight"][:, 0]
        tiles = torch.einsum("yxd,dkl->ykxl", x.reshape(h, w, -1), kernel)
        expected = (tiles.reshape(16 * h, 16 * w) + state["trans_conv.bias"])[:height, :width]
        torch.testing.assert_close(logits[b, p].double(), expected, atol=1e-5, rtol=0)
    assert logits.std() > 0.01


def test_clip_deconv_has_the_papers_size_and_names() -> None:
    decoder = ClipDeconvDecoder(ClipDeconvConfig())
    assert decoder.extract_layers == (9,)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 139_585
    names = ("reduce", "film_mul", "film_add", "reduce2.0", "reduce2.2", "trans_conv")
    assert set(decoder.state_dict()) == {f"{name}.{leaf}" for name in names for leaf in ("weight", "bias")}


def test_clip_deconv_is_not_clipseg(clip: Clip, tmp_path: Path) -> None:
    model = build_clip_deconv(clip, ClipDeconvConfig(extract_layer=2))
    seg = build_clipseg(clip, ClipSegConfig(extract_layers=(0, 2)))
    assert model.fingerprint != seg.fingerprint
    assert model.fingerprint == build_clip_deconv(clip, ClipDeconvConfig(extract_layer=2)).fingerprint
    assert error(lambda: save_clipseg(model, tmp_path / "x")).code == "model_unsupported"
    assert error(lambda: build_clip_deconv(clip)).code == "weights_do_not_fit"  # block 9 of 4
    assert error(lambda: ClipDeconvConfig(reduce_dim=0)).code == "setting_invalid"


# --- ViTSeg ---------------------------------------------------------------------------------------------


def test_vitseg(clip: Clip) -> None:
    """timm's own forward pass with hooks; CLIPSeg's decoder, which has its own tests."""
    model = build_vitseg(clip, TINY, weights="random:3")
    images = pixels(2, 3, 320, 40)  # halved along one side and stretched four times along the other
    torch.manual_seed(3)
    tower = timm.create_model("test_vit", num_classes=0).eval()
    taken: dict[int, Tensor] = {}
    for index in TINY.extract_layers:
        tower.blocks[index].register_forward_hook(
            lambda module, inputs, output, index=index: taken.__setitem__(index, output)
        )
    squeezed = images[:, :, ::2].repeat_interleave(4, dim=3)
    with torch.no_grad():
        pooled = tower(squeezed)
        activations = model.encode_image(images)
        for ours, index in zip(activations.layers, TINY.extract_layers, strict=True):
            torch.testing.assert_close(ours, taken[index], atol=2e-5, rtol=0)
        examples = model.encode_prompt_images(images)
        state = model.decoder.state_dict()
        expected = pooled @ state["prompt_projection.weight"].T + state["prompt_projection.bias"]
        torch.testing.assert_close(examples, expected, atol=2e-5, rtol=0)

        texts = model.encode_text(PROMPTS)
        torch.testing.assert_close(texts, clip.model.encode_text(clip.tokenizer(PROMPTS)), atol=2e-5, rtol=0)
        logits = model.decode(activations, texts)
        square = model.decoder([taken[index] for index in TINY.extract_layers], texts, (10, 10))
    assert square.shape == (2, 3, 160, 160)
    back = square.repeat_interleave(2, dim=2)[..., ::4]
    torch.testing.assert_close(logits, back, atol=2e-5, rtol=0)
    assert examples.shape == (2, 32)
    assert logits.std() > 0.01


def test_the_papers_tower() -> None:
    tower = timm.create_model(ViTSegConfig().tower, num_classes=0, depth=1)
    assert tower.patch_embed.img_size == (384, 384)
    assert tower.embed_dim == 768
    assert ViTSegConfig().extract_layers == (3, 7, 9)


def test_vitsegs_random_map_is_seeded_saved_and_frozen(clip: Clip) -> None:
    one, same, other = (build_vitseg(clip, TINY, weights="random:0", seed=seed) for seed in (0, 0, 1))
    weights = [model.decoder.state_dict()["prompt_projection.weight"] for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.fingerprint == same.fingerprint != other.fingerprint
    trained = {name for name, parameter in one.decoder.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in one.decoder.state_dict() if not name.startswith("prompt_projection")}
    assert not any(parameter.requires_grad for parameter in one.tower.parameters())
    other.decoder.load_state_dict(one.decoder.state_dict())
    images = pixels(1, 3, 64, 64)
    assert torch.equal(one.encode_prompt_images(images), other.encode_prompt_images(images))


def test_vitseg_learns_with_a_frozen_tower(clip: Clip) -> None:
    model = build_vitseg(clip, TINY, weights="random:0")
    before = model.fingerprint
    activations = model.encode_image(pixels(1, 3, 96, 96))
    conditional = model.encode_text(PROMPTS[:1])
    target = torch.zeros(1, 1, 96, 96)
    target[..., :48] = 1
    optimizer = torch.optim.AdamW([p for p in model.decoder.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.binary_cross_entropy_with_logits(model.decode(activations, conditional), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]  # six seeds, 1 and 2 threads: 0.58 to 0.67
    assert model.fingerprint != before


def test_vitseg_weights(clip: Clip, tmp_path: Path) -> None:
    tower = timm.create_model("test_vit")  # with the classifier that files have
    torch.save(tower.state_dict(), tmp_path / "vit.pth")
    model = build_vitseg(clip, TINY, weights=str(tmp_path / "vit.pth"))
    for name, tensor in model.tower.state_dict().items():
        assert torch.equal(tensor, tower.state_dict()[name])
    other = build_vitseg(clip, TINY, weights="random:0")
    assert other.fingerprint != model.fingerprint
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("weights_missing", lambda: build_vitseg(clip, TINY, weights=str(tmp_path / "none.pth"))),
        ("weights_do_not_fit", lambda: build_vitseg(clip, TINY, weights=str(tmp_path / "wrong.pth"))),
        ("name_unknown", lambda: build_vitseg(clip, ViTSegConfig(tower="resnet50"), weights="random:0")),
        (
            "name_unknown",
            lambda: build_vitseg(
                clip,
                ViTSegConfig(tower="test_vit2"),
                weights="random:0",  # with register tokens
            ),
        ),
        (
            "weights_do_not_fit",
            lambda: build_vitseg(
                clip, ViTSegConfig(tower=TINY.tower, extract_layers=(3, 6)), weights="random:0"
            ),
        ),
    ]
    for code, call in calls:
        assert error(call).code == code


def test_all_have_the_methods_of_clipseg(clip: Clip) -> None:
    images, examples = pixels(1, 3, 48, 80), pixels(2, 3, 40, 40, seed=1)
    models: list[ClipSeg] = [
        build_clipseg(clip, ClipSegConfig(reduce_dim=8, extract_layers=(1, 2))),
        build_clip_deconv(clip, ClipDeconvConfig(reduce_dim=8, extract_layer=1)),
        build_vitseg(clip, TINY, weights="random:0"),
    ]
    for model in models:
        conditionals = torch.cat([model.encode_text(PROMPTS), model.encode_prompt_images(examples)])
        assert conditionals.dtype == torch.float32
        activations = model.encode_image(images)
        with torch.no_grad():
            logits = model.decode(activations, conditionals)
            assert logits.shape == (1, 5, 48, 80)
            assert torch.equal(model(images, conditionals), logits)
            few = model.decode(activations, conditionals, prompts_at_once=2)
        torch.testing.assert_close(few, logits, atol=1e-5, rtol=0)
        assert (logits[:, 0] - logits[:, 3]).abs().max() > 1e-3


def test_files(clip: Clip, tmp_path: Path) -> None:
    """Settings and tensors come back, the random map with them; a file of another kind is refused by name."""
    config = ClipDeconvConfig(reduce_dim=8, reduce2_dim=12, extract_layer=1)
    models: list[ClipSeg] = [
        build_clip_deconv(clip, config, seed=5),
        build_vitseg(clip, TINY, weights="random:0", seed=5),
    ]
    for model in models:
        path = tmp_path / f"{type(model.decoder).__name__}.safetensors"
        save_decoder(model, path)
        again = load_baseline(path, clip, tower="random:0")
        assert type(again) is type(model)
        assert again.decoder.config == model.decoder.config
        assert again.fingerprint == model.fingerprint
        refused = error(lambda path=path: load_clipseg(path, clip=clip))
        assert refused.code == "weights_do_not_fit"
    seg = tmp_path / "seg.safetensors"
    save_decoder(build_clipseg(clip, ClipSegConfig(extract_layers=(0, 2))), seg)
    assert error(lambda: load_baseline(seg, clip)).code == "weights_do_not_fit"
    assert error(lambda: load_baseline(tmp_path / "none.safetensors", clip)).code == "weights_missing"
