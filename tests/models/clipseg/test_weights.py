"""CLIPSeg's weights: the authors' names, Hugging Face's layout in both directions, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import hub
from models.clip.loading import Clip, load_clip, load_source
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.clipseg.decoder import ClipSeg, build_clipseg, mix, normalize
from models.clipseg.weights import (
    hugging_face_config,
    hugging_face_state,
    load_clipseg,
    save_clipseg,
    save_decoder,
)
from models.errors import MaskMillError
from models.settings import ClipSegConfig

RELEASED = Path(__file__).resolve().parents[4] / "shared" / "data" / "clipseg" / "rd16-uni.pth"
SMALL: dict[str, Any] = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 4, "width": 64, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CONFIG = ClipSegConfig(reduce_dim=16, extract_layers=(0, 2, 3), feedforward=48)
REFINED = ClipSegConfig(reduce_dim=16, extract_layers=(0, 1, 3), feedforward=48, refined=True)
PROMPTS = ["a cat", "Two  RED cars, on a bridge!", "naïve café"]


def small_clip(config: dict[str, Any] = SMALL, seed: int = 0, **options: Any) -> Clip:
    source = WeightSource("small", f"random:{seed}", config, None, seed, OPENAI_MEAN, OPENAI_STD)
    return load_source(source, **options)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return small_clip()


def pixels(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: ClipSeg, images: Tensor, prompts: list[str]) -> Tensor:
    return model(images, model.encode_text(prompts))


def same_decoder(one: ClipSeg, other: ClipSeg) -> bool:
    mine, theirs = one.decoder.state_dict(), other.decoder.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def scramble(module: nn.Module) -> None:
    """Weights that let every term show in the logits."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim < 2:
                parameter.copy_(0.2 * noise + ("norm" in name and name.endswith("weight")))
            else:
                upsampling = parameter.ndim == 4 and parameter.shape[2] > 3 and "conv" in name
                fan_in = parameter.shape[0] if upsampling else parameter[0].numel()
                parameter.copy_(noise * fan_in**-0.5)


def error(call: Callable[[], object]) -> MaskMillError:
    with pytest.raises(MaskMillError) as caught:
        call()
    return caught.value


# --- Hugging Face's layout ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, REFINED], ids=["plain", "refined"])
def test_transformers_loads_what_is_saved(clip: Clip, config: ClipSegConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    model = build_clipseg(clip, config)
    scramble(model.decoder)
    save_clipseg(model, tmp_path / "model")
    reference, report = transformers.CLIPSegForImageSegmentation.from_pretrained(
        tmp_path / "model", output_loading_info=True
    )
    assert not any(report.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    processor = transformers.CLIPSegProcessor.from_pretrained(tmp_path / "model")
    photo = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)
    inputs = processor(text=PROMPTS, images=[photo] * 3, padding=True, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, 352, 352)
    ours = normalize(torch.from_numpy(photo).permute(2, 0, 1)[None], 352)
    assert (inputs["pixel_values"][:1] - ours).abs().max() < 0.02  # it resizes in whole grey levels
    with torch.no_grad():
        expected = reference.eval()(**inputs).logits
    assert expected.std() > 0.05
    found = logits(model, inputs["pixel_values"][:1], PROMPTS)[0]
    assert (found - expected).abs().max() < 1e-4
    again = load_clipseg(tmp_path / "model")
    assert again.decoder.config == config
    assert same_decoder(again, model)
    for name, tensor in clip.model.state_dict().items():
        assert torch.equal(again.clip.model.state_dict()[name], tensor), name
    assert torch.equal(
        logits(again, pixels(1, 3, 50, 64), PROMPTS), logits(model, pixels(1, 3, 50, 64), PROMPTS)
    )


@pytest.mark.parametrize("refined", [False, True], ids=["plain", "refined"])
def test_what_transformers_saves_is_loaded(refined: bool, tmp_path: Path) -> None:
    """With the oddities of old checkpoints: a stored position_ids buffer and settings in *_config_dict."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    torch.manual_seed(0)
    text = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
            "eos_token_id": 2}  # fmt: skip
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 3,
              "image_size": 64, "patch_size": 16}  # fmt: skip
    reference = transformers.CLIPSegForImageSegmentation(
        transformers.CLIPSegConfig(
            text_config=text, vision_config=vision, projection_dim=24, extract_layers=[0, 2], reduce_dim=8,
            decoder_intermediate_size=32, decoder_num_attention_heads=2, conditional_layer=1,
            use_complex_transposed_convolution=refined, initializer_factor=1.0,
        )
    ).eval()  # fmt: skip
    scramble(reference)
    reference.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["clip.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(state, tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["vision_config_dict"] = {**vision}
    settings["vision_config"] = {"hidden_size": 1}
    (tmp_path / "config.json").write_text(json.dumps(settings))

    model = load_clipseg(tmp_path)
    assert model.decoder.config == ClipSegConfig(
        reduce_dim=8, extract_layers=(0, 2), refined=refined, heads=2, feedforward=32, cond_layer=1
    )
    images = pixels(3, 3, 96, 96)
    tokens = model.clip.tokenizer(PROMPTS)
    with torch.no_grad():
        expected = reference(pixel_values=images, input_ids=tokens).logits
        conditionals = model.encode_text(PROMPTS)
        theirs = reference.clip.get_text_features(tokens).pooler_output
        assert (conditionals - theirs).abs().max() < 2e-5
        found = model(images, conditionals[:, None])[:, 0]
    assert (found - expected).abs().max() < 1e-4
    assert expected.std() > 0.05
    assert load_clipseg(tmp_path, extract_layers=(1, 2)).decoder.extract_layers == (1, 2)
    assert model.clip.fingerprint == load_clipseg(tmp_path).clip.fingerprint
    assert model.fingerprint != load_clipseg(tmp_path, extract_layers=(1, 2)).fingerprint


def test_the_bundled_clip_in_hugging_faces_layout(tmp_path: Path) -> None:
    """Another patch, the plain GELU and a cut vocabulary: transformers reads tokens and weights as we do."""
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    toy = load_clip("toyclip", "bundled")
    model = build_clipseg(toy, ClipSegConfig(reduce_dim=16, extract_layers=(0, 1, 2)))
    save_clipseg(model, tmp_path)
    again = load_clipseg(tmp_path)
    assert again.clip.name == "toyclip"
    prompts = ["a photo of a ladybug.", "three chessboards on sand", "quixotic"]
    assert torch.equal(again.clip.tokenizer(prompts), toy.tokenizer(prompts))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in prompts:
        row = toy.tokenizer([prompt])[0]
        assert tokenizer(prompt)["input_ids"] == row[row != 0].tolist()
    reference = transformers.CLIPSegForImageSegmentation.from_pretrained(tmp_path).eval()
    images = pixels(1, 3, 96, 96)
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = reference(pixel_values=images.expand(3, -1, -1, -1), **tokens).logits
    assert (logits(again, images, prompts)[0] - expected).abs().max() < 1e-4
    assert expected.std() > 0.05


def test_with_another_clip_and_in_half_precision(clip: Clip, tmp_path: Path) -> None:
    model = build_clipseg(clip, CONFIG)
    save_clipseg(model, tmp_path)
    other = small_clip(seed=1)
    assert load_clipseg(tmp_path, clip=other).clip is other
    half = load_clipseg(tmp_path, dtype=torch.bfloat16)
    assert half.clip.dtype == half.decoder.dtype == torch.bfloat16
    assert {reader.weight.dtype for reader in half.decoder.readers.values()} == {torch.float32}
    images = pixels(1, 3, 64, 64)
    exact = logits(model, images, PROMPTS)
    rounded = logits(half, images, PROMPTS)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.1 * exact.std()
    save_clipseg(half, tmp_path / "half")
    saved = load_file(tmp_path / "half" / "model.safetensors")
    assert saved["decoder.layers.0.mlp.fc1.weight"].dtype == torch.bfloat16


def test_hub_names(clip: Clip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the hub's cache is read without a network; one that is not there is an error."""
    model = build_clipseg(clip, CONFIG)
    snapshot = tmp_path / "models--ORG--clipseg" / "snapshots" / "abc"
    save_clipseg(model, snapshot)
    refs = tmp_path / "models--ORG--clipseg" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    assert same_decoder(load_clipseg("ORG/clipseg", cache_dir=str(tmp_path)), model)
    monkeypatch.setattr(hub, "reachable", lambda host: False)
    missing = error(lambda: load_clipseg("ORG/other", cache_dir=str(tmp_path)))
    assert missing.code == "weights_missing"
    lines = missing.remedy.splitlines()
    assert "  curl -fLO https://huggingface.co/ORG/other/resolve/main/model.safetensors" in lines
    assert "  mkdir -p other && cp config.json other/" in lines and "  --weights other" in lines


# --- the authors' files, and ours -----------------------------------------------------------------------


def authors_file(path: Path, model: ClipSeg, change: dict[str, Tensor | None] | None = None) -> Path:
    state = {
        **model.decoder.state_dict(),
        "reduce.weight": torch.zeros(16, 64),
        "reduce.bias": torch.zeros(16),
    }
    for name, tensor in (change or {}).items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    torch.save(state, path)
    return path


@pytest.mark.parametrize("config", [CONFIG, REFINED], ids=["plain", "refined"])
@pytest.mark.parametrize("extra", [True, False], ids=["with reduce", "without"])
def test_authors_files(clip: Clip, config: ClipSegConfig, extra: bool, tmp_path: Path) -> None:
    model = build_clipseg(clip, config)
    change = None if extra else {"reduce.weight": None, "reduce.bias": None}
    path = authors_file(tmp_path / "rd16.pth", model, change)
    found = load_clipseg(path, clip=clip, extract_layers=config.extract_layers)
    assert found.decoder.config == config
    assert same_decoder(found, model)
    assert not found.decoder.training
    assert all(parameter.requires_grad for parameter in found.decoder.parameters())


BAD: dict[str, tuple[dict[str, Tensor | None], list[str]]] = {
    "a tensor too few": ({"blocks.1.norm1.bias": None}, ["Missing: blocks.1.norm1.bias"]),
    "a tensor too many": ({"extra_blocks.0.linear1": torch.zeros(16)}, ["extra_blocks.0.linear1"]),
    "half a refined head": (
        {"trans_conv.0.weight": torch.zeros(16, 16, 3, 3)},
        ["Missing: trans_conv.2.weight, trans_conv.4.weight"],
    ),
    "a CLIP": ({"film_mul.weight": None, "clip_model.visual.proj": torch.zeros(2)}, ["film_mul.weight"]),
    "a CLIP beside it": ({"model.proj": torch.zeros(2)}, ["Unexpected: model.proj"]),
    "another shape": ({"film_add.bias": torch.zeros(17)}, ["film_add.bias (17,), not (16,)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_tensors_are_named(clip: Clip, name: str, tmp_path: Path) -> None:
    change, words = BAD[name]
    path = authors_file(tmp_path / "w.pth", build_clipseg(clip, CONFIG), change)
    found = error(lambda: load_clipseg(path, clip=clip, extract_layers=(0, 2, 3)))
    assert found.code == "weights_do_not_fit"
    for word in words:
        assert word in found.message


@pytest.mark.slow
def test_wrong_tensors_in_hugging_faces_layout_are_named(clip: Clip, tmp_path: Path) -> None:
    model = build_clipseg(clip, REFINED)
    save_clipseg(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for lost in ("clip.visual_projection.weight", "decoder.transposed_convolution.4.bias"):
        save_file({name: t for name, t in state.items() if name != lost}, tmp_path / "model.safetensors")
        found = error(lambda: load_clipseg(tmp_path))
        assert found.code == "weights_do_not_fit"
        assert f"Missing: {lost}" in found.message
    save_file(state, tmp_path / "model.safetensors")
    # A refined file under a plain configuration must not leave a random head.
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["use_complex_transposed_convolution"] = False
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = error(lambda: load_clipseg(tmp_path))
    assert "Missing: decoder.transposed_convolution.bias" in found.message
    assert "Unexpected: decoder.transposed_convolution.0.bias" in found.message


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("the pickle ran code",)


def test_pickles_do_not_run_code(clip: Clip, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"film_mul.weight": torch.zeros(1), "evil": Evil()}, tmp_path / "evil.pth")
    assert error(lambda: load_clipseg(tmp_path / "evil.pth", clip=clip)).code == "model_damaged"
    assert "ran code" not in capsys.readouterr().out


@pytest.mark.parametrize("patch", [16, 8])
def test_decoder_files(patch: int, tmp_path: Path) -> None:
    """Everything that tensors do not tell comes back, and a refined head for any patch has a place."""
    clip = small_clip({**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_size": patch}})
    config = ClipSegConfig(
        reduce_dim=16, extract_layers=(0, 2), refined=True, heads=2, feedforward=48, cond_layer=1, dropout=0.3
    )
    model = build_clipseg(clip, config)
    path = tmp_path / "decoder.safetensors"
    save_decoder(model, path)
    again = load_clipseg(path, clip=clip)
    assert again.decoder.config == config
    assert same_decoder(again, model)
    assert again.fingerprint == model.fingerprint
    assert error(lambda: save_decoder(model, path)).code == "output_exists"
    save_decoder(model, path, overwrite=True)
    other = small_clip(model.clip.source.config, seed=1)
    assert error(lambda: load_clipseg(path, clip=other)).code == "weights_do_not_fit"


# --- what is refused ------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(clip: Clip, tmp_path: Path) -> None:
    model = build_clipseg(clip, CONFIG)
    (tmp_path / "config.json").write_text("mine")
    assert error(lambda: save_clipseg(model, tmp_path)).code == "output_exists"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "mine"
    save_clipseg(model, tmp_path, overwrite=True)
    assert same_decoder(load_clipseg(tmp_path), model)


def test_what_hugging_face_cannot_hold(clip: Clip, tmp_path: Path) -> None:
    refined = ClipSegConfig(reduce_dim=8, extract_layers=(0, 1), refined=True)
    fine = small_clip({**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "patch_size": 8}})
    pooled = small_clip({**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "pool_type": "avg"}})
    for model in (
        build_clipseg(fine, refined),
        build_clipseg(pooled, CONFIG),
        build_clipseg(small_clip(towers="visual"), CONFIG),
    ):
        assert error(lambda model=model: save_clipseg(model, tmp_path / "x")).code == "model_unsupported"
        assert not (tmp_path / "x").exists()


SETTINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "another model": (lambda s: s.update(model_type="clip"), "model_type"),
    "an activation": (lambda s: s["text_config"].update(hidden_act="relu"), "activations"),
    "two activations": (lambda s: s["text_config"].update(hidden_act="gelu"), "activations"),
    "a norm": (lambda s: s["vision_config"].update(layer_norm_eps=1e-6), "layer norms"),
    "a vocabulary": (lambda s: s["text_config"].update(vocab_size=1000), "vocabulary"),
    "a patch": (
        lambda s: (
            s["vision_config"].update(patch_size=8),
            s.update(use_complex_transposed_convolution=True),
        ),
        "refined head",
    ),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_configurations_that_are_refused(clip: Clip, name: str, tmp_path: Path) -> None:
    change, word = SETTINGS[name]
    save_clipseg(build_clipseg(clip, CONFIG), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    change(settings)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    found = error(lambda: load_clipseg(tmp_path))
    assert found.code == "model_unsupported"
    assert word in found.message


def test_sources_that_are_not_there(clip: Clip, tmp_path: Path) -> None:
    model = build_clipseg(clip, CONFIG)
    file = authors_file(tmp_path / "w.pth", model)
    (tmp_path / "folder").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text("{")
    shutil.copy(file, tmp_path / "torn" / "model.safetensors")
    calls: list[tuple[str, Callable[[], object]]] = [
        ("weights_missing", lambda: load_clipseg(file)),
        ("weights_missing", lambda: load_clipseg(tmp_path / "nothing.pth", clip=clip)),
        ("weights_missing", lambda: load_clipseg(tmp_path / "folder")),
        ("model_unsupported", lambda: load_clipseg(tmp_path / "torn")),
        ("setting_invalid", lambda: load_clipseg(file, clip=clip, extract_layers=(1, 2))),
        ("weights_do_not_fit", lambda: load_clipseg(file, clip=clip)),  # (3, 6, 9) of a tower with 4 blocks
    ]
    for code, call in calls:
        assert error(call).code == code


# --- the released decoder, at full size -----------------------------------------------------------------


@pytest.mark.slow
def test_the_released_decoder_at_full_size() -> None:
    """The authors' rd16 on a ViT-B/16 with random weights (its masks mean nothing), against transformers."""
    if not RELEASED.is_file():
        pytest.skip(f"the released decoder is not there: {RELEASED.name} in shared/data/clipseg")
    model = load_clipseg(RELEASED, clip=load_clip("ViT-B-16-quickgelu", "random:0"))
    assert model.decoder.config == ClipSegConfig(reduce_dim=16)
    raw = torch.load(RELEASED, weights_only=True, map_location="cpu")
    state = model.decoder.state_dict()
    assert {name for name in raw if not name.startswith("reduce.")} == set(state)
    assert all(torch.equal(tensor, raw[name]) for name, tensor in state.items())

    same_as_transformers(model)
    paper = build_clipseg(model.clip, ClipSegConfig(extract_layers=(3, 7, 9), refined=True))
    scramble(paper.decoder)
    same_as_transformers(paper)


@torch.no_grad()
def same_as_transformers(model: ClipSeg) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference implementation")
    with torch.device("meta"):
        reference = transformers.CLIPSegForImageSegmentation(
            transformers.CLIPSegConfig(**hugging_face_config(model))
        )
    reference.load_state_dict(hugging_face_state(model), assign=True)
    for part in (reference.clip.text_model, reference.clip.vision_model):
        part.embeddings.position_ids = torch.arange(part.embeddings.position_ids.shape[1])[None]
    reference.eval()
    images, example = pixels(1, 3, 352, 352), 2 * pixels(1, 3, 224, 224)
    tokens = model.clip.tokenizer(PROMPTS[:1])
    text, image = model.encode_text(PROMPTS[:1]), model.encode_prompt_images(example)
    theirs_text = reference.clip.get_text_features(tokens).pooler_output
    theirs_image = reference.clip.get_image_features(example).pooler_output
    assert (text - theirs_text).abs().max() < 2e-5
    assert (image - theirs_image).abs().max() < 2e-5
    found = model(images, torch.cat([text, mix(text, image, 0.3)]))[0]
    theirs = torch.cat([theirs_text, 0.3 * theirs_text + 0.7 * theirs_image])
    expected = reference(pixel_values=images.expand(2, -1, -1, -1), conditional_embeddings=theirs).logits
    assert (found - expected).abs().max() < 1e-4
    assert found.std() > 0.3
