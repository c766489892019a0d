"""Every network on a fake GPU: no tensor is left on another device, and the host hardly ever waits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.catalogue import HEADS
from models.clip.dense import dense_encoder
from models.clip.loading import Clip, Towers, load_source
from models.clip.text import TextClassifier, build_text_classifier
from models.clip.weights import OPENAI_MEAN, OPENAI_STD, WeightSource
from models.clipseg.baselines import ClipDeconvConfig, ViTSegConfig, build_clip_deconv, build_vitseg
from models.clipseg.decoder import ClipSeg, build_clipseg, mix, normalize
from models.clipseg.masked_attention import AttentionMask, masked_embedding
from models.clipseg.visual_prompts import MODES, TABLE2, visual_prompt
from models.clipseg.whitening import fold, whiten
from models.device import DTYPES
from models.helper import helper_of
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import ClipSegConfig, MaskClipSettings, StudentConfig
from models.student.deeplab import DeepLab
from tests.fake_cuda import CUDA, PRECISIONS, FakeGpu, fake_cuda, on_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
VIT: dict[str, Any] = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": TEXT,
}
RESNET: dict[str, Any] = VIT | {
    "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16, "patch_size": None}
}
TRUNK = {"embed_dim": 32, "depth": 2, "num_heads": 2}
RADIO: dict[str, Any] = {
    "embed_dim": 24,
    "tower": "radio",
    "vision_cfg": {
        "trunk": "naflexvit_base_patch16_radio_v3",
        "patch_size": 16,
        "options": {**TRUNK, "pos_embed_grid_size": (8, 8)},
        "head": (16, 1),
    },
    "text_cfg": {"context_length": 8, "vocab_size": 9, "width": 16, "heads": 2, "layers": 1},
}
TIPS: dict[str, Any] = {
    "embed_dim": 32,
    "tower": "tips",
    "vision_cfg": {
        "trunk": "vit_base_patch14_reg1_tipsv2",
        "patch_size": 14,
        "options": {**TRUNK, "img_size": 56},
    },
    "text_cfg": {"width": 32, "heads": 2, "layers": 1, "mlp": 16, "vocab_size": 9},
}
CLASSES = 5


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_cuda() as gpu:
        yield gpu


def clip(config: dict[str, Any] = VIT, precision: str = "fp32", towers: Towers = "visual") -> Clip:
    source = WeightSource("tiny", "random:3", config, None, 3, OPENAI_MEAN, OPENAI_STD)
    return load_source(source, device=CUDA, dtype=DTYPES[precision], towers=towers)


def classifier(width: int = 24, *, rows: int = CLASSES) -> TextClassifier:
    """The last class has more than one row if there are more rows than classes."""
    embeddings = F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(0)), dim=-1)
    return TextClassifier(embeddings, torch.arange(rows).clamp(max=CLASSES - 1), CLASSES)


def pictures(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


# --- the fake GPU itself ------------------------------------------------------------------------------------


def test_devices_must_not_be_mixed(gpu: FakeGpu) -> None:
    there = torch.zeros(1, 3, 4, 4).to(CUDA)
    assert F.conv2d(there, torch.zeros(2, 3, 3, 3, device=CUDA)).device == CUDA
    for mixed in (
        lambda: there + torch.zeros(4),
        lambda: F.conv2d(there, torch.zeros(2, 3, 3, 3)),
        lambda: torch.cat([there, torch.zeros(1, 3, 4, 4)]),
        lambda: torch.zeros(4, 4).masked_fill_(there[0, 0] > 0, 1),
    ):
        with pytest.raises(Exception, match=r"[Uu]nhandled FakeTensor Device|device"):
            mixed()
    assert torch.arange(3).sum().item() == 3, "the CPU is real"


def test_waits_of_the_host_are_noted(gpu: FakeGpu) -> None:
    there = torch.zeros(3).to(CUDA, non_blocking=True)
    assert not gpu.waits
    waits: list[Callable[[], object]] = [
        lambda: there.to("cpu"),
        lambda: there.cpu(),
        lambda: bool(there.sum() > 0),
        lambda: float(there.sum()),
        lambda: there.tolist(),
        lambda: there[there > 0],
        lambda: there.nonzero(),
        lambda: torch.bincount(there.long(), minlength=3),
        lambda: torch.zeros(2).to(CUDA),
        lambda: torch.tensor([1.0, 2.0], device=CUDA),
        lambda: there.new_tensor([1.0]),
    ]
    for number, wait in enumerate(waits, start=1):
        wait()
        assert gpu.waits, number
        gpu.waits.clear()
    there.cpu()
    assert gpu.waits == ["tests/models/test_fake_cuda.py:test_waits_of_the_host_are_noted copy"]


# --- MaskCLIP -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
def test_dense_heads(gpu: FakeGpu, config: dict[str, Any], precision: str) -> None:
    tower = clip(config, precision)
    for head, profile, keys in itertools.product(HEADS, ("reference", "weights"), (None, "projected", "raw")):
        if (keys and not HEADS[head].keys) or (config is RESNET and HEADS[head].vit_only):
            continue
        if not HEADS[head].alone:
            continue  # in test_maskclip
        if head != "maskclip" and (profile, keys) != ("weights", None):
            continue  # profile and keys have nothing to do with the head
        encoder = dense_encoder(tower.visual, head=head, profile=profile, keys=keys)
        gpu.waits.clear()
        dense = encoder(torch.zeros(2, 3, 70, 90, device=CUDA))
        assert on_gpu(dense.features) and dense.features.dtype == DTYPES[precision]
        assert (dense.keys is not None) == bool(keys)
        assert not gpu.waits


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_stats": "clip", "profile": "weights", "head": "value"},
        {"pd_threshold": 0.5},
        {"ks_threshold": 1.0, "pd_threshold": 0.5},
        {"ks_threshold": 0.9, "ks_axis": "channel", "ks_source": "raw"},
        {"window": 64, "window_stride": 32},
        {"window": 64, "window_stride": 32, "windows": "pixels", "positions": "offset"},
        {"window": 64, "window_stride": 32, "windows": "splice"},
        {"head": "proxy", "helper": "test_vit", "helper_weights": "random:0"},
        {
            "head": "lposs",
            "helper": "test_vit",
            "helper_weights": "random:0",
            "window": 64,
            "window_stride": 32,
        },
        {"refine": "pamr", "refine_classes": 3, "refine_pixels": 4000},
        {"refine": "tlp", "refine_cells": 9},
        {"refine": "lposs+", "refine_classes": 3, "refine_steps": 1},
        {"window": 64, "window_stride": 32, "ks_threshold": 1.0, "pd_threshold": 0.5},
    ],
    ids=str,
)
def test_maskclip(gpu: FakeGpu, settings: dict[str, Any], precision: str) -> None:
    reading = MaskClipSettings(**settings)
    helper = helper_of(reading, device=CUDA, dtype=DTYPES[precision])
    for config, rows in ((VIT, CLASSES), (RESNET, CLASSES + 2)):
        if config is RESNET and HEADS[reading.head].vit_only:
            continue
        model = MaskClip(clip(config, precision), classifier(rows=rows), reading, helper=helper)
        images = pictures(2, 3, 64, 90).to(CUDA)
        gpu.waits.clear()
        scores = model.grid_scores(images)
        assert on_gpu(scores) and scores.shape[:2] == (2, CLASSES) and scores.dtype == torch.float32
        assert not gpu.waits
        assert on_gpu(model.refine(images, scores, (80, 90)).scores)
        assert not gpu.waits
    assert on_gpu(model.grid_scores(pictures(1, 3, 64, 90))), "images from the host"
    assert all(on_gpu(found) and found.shape == (80, 90) for found in model.label(images[0], size=(80, 90)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (RADIO, {"head": "radseg"}),
        (RADIO, {"head": "radseg", "window": 64, "window_stride": 32, "windows": "splice"}),
        (TIPS, {"window": 56, "window_stride": 28, "windows": "pixels"}),
    ],
    ids=["radio", "radio-windows", "tips"],
)
def test_towers_of_timm(
    gpu: FakeGpu, config: dict[str, Any], settings: dict[str, Any], precision: str
) -> None:
    reading = MaskClipSettings(profile="weights", image_stats="clip", **settings)
    model = MaskClip(clip(config, precision), classifier(config["embed_dim"]), reading)
    images = pictures(2, 3, 96, 130).to(CUDA)
    gpu.waits.clear()
    scores = model.grid_scores(images)
    assert on_gpu(scores) and scores.shape[:2] == (2, CLASSES) and scores.dtype == torch.float32
    assert not gpu.waits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_class_names(gpu: FakeGpu, precision: str) -> None:
    found = build_text_classifier(
        clip(precision=precision, towers="text"),
        [["cat", "kitty"], ["dog"]],
        templates=["a {}.", "a photo of a {}."],
    )
    assert found.embeddings.shape == (3, 24) and not on_gpu(found.embeddings)


@pytest.mark.parametrize("classes", [CLASSES, 300])
@pytest.mark.parametrize("temperature", [100.0, None])
def test_label_maps(gpu: FakeGpu, temperature: float | None, classes: int) -> None:
    scores = torch.rand(classes, 6, 9)
    options: dict[str, Any] = {
        "network_size": (96, 144),
        "image_size": (1100, 70),  # in more than one part
        "temperature": temperature,
        "thresholds": torch.full((classes,), 0.5),
        "ignore_index": max(255, classes),
    }
    expected = label_map(scores, **options)
    for repeat in range(2):
        gpu.waits.clear()
        labels, confidence = label_map(scores.to(CUDA, non_blocking=True), **options)
        assert on_gpu(labels) and on_gpu(confidence)
        for found, real in zip((labels, confidence), expected, strict=True):
            assert (found.shape, found.dtype) == (real.shape, real.dtype)
        if repeat:  # the first one copies the matrices of these sizes
            assert gpu.waits == ["models/labelmap.py:finite_ranges copy"]


# --- students -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "config",
    [
        {"decoder": "deeplabv2", "backbone": "resnet50c"},
        {"decoder": "deeplabv3plus", "backbone": "resnet50"},
        {"decoder": "light", "backbone": "light", "learned_background": True, "normalize_features": True},
    ],
    ids=lambda config: config["decoder"],
)
def test_students(gpu: FakeGpu, config: dict[str, Any], precision: str) -> None:
    student = DeepLab(StudentConfig(embed_dim=24, **config), classifier(rows=CLASSES + 1))
    student.eval().to(CUDA, DTYPES[precision])
    student.set_classifier(classifier(rows=CLASSES + 2))
    images = pictures(2, 3, 40, 56).to(CUDA)
    gpu.waits.clear()
    logits = student(images)
    assert on_gpu(logits) and logits.shape == (2, student.num_classes, 40, 56)
    assert not gpu.waits


# --- CLIPSeg ------------------------------------------------------------------------------------------------


def clipseg(kind: str, precision: str) -> ClipSeg:
    tower = clip(precision=precision, towers="both")
    if kind == "deconv":
        model = build_clip_deconv(tower, ClipDeconvConfig(reduce_dim=8, extract_layer=2))
    elif kind == "vitseg":
        config = ViTSegConfig(reduce_dim=8, feedforward=16, extract_layers=(1, 3), tower="test_vit")
        model = build_vitseg(tower, config, weights="random:0")
    else:
        settings = {
            "reduce_dim": 8,
            "feedforward": 16,
            "extract_layers": (0, 2),
            "refined": kind == "refined",
        }
        model = build_clipseg(tower, ClipSegConfig(**settings))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", ["plain", "refined", "deconv", "vitseg"])
def test_clipseg_with_words_and_pictures(gpu: FakeGpu, kind: str, precision: str) -> None:
    model = clipseg(kind, precision)
    model.decoder.cast(DTYPES[precision])
    images = pictures(2, 3, 64, 80).to(CUDA)
    words = model.encode_text(["a cat", "two red cars"])
    gpu.waits.clear()
    pixels = normalize(images)
    shown = model.encode_prompt_images(normalize(images, 64))
    mixed = mix(words, shown, torch.rand(2).to(CUDA, non_blocking=True))
    assert on_gpu(model(pixels, mixed))
    assert model(pixels, torch.stack([words, mixed])).shape == (2, 2, 64, 80)
    many = model.decode(model.encode_image(pixels), words.repeat(5, 1), prompts_at_once=3)
    assert many.shape == (2, 10, 64, 80) and many.dtype == torch.float32
    assert not gpu.waits
    assert len(model.fingerprint) == 64


@pytest.mark.parametrize("mode", MODES)
def test_visual_prompts(gpu: FakeGpu, mode: str) -> None:
    images, masks = torch.rand(2, 3, 40, 48), torch.ones(2, 40, 48)
    there = visual_prompt(images.to(CUDA), masks.to(CUDA), mode, size=32)
    here = visual_prompt(images, masks, mode, size=32)
    assert on_gpu(there) and there.shape == here.shape and there.dtype == here.dtype


@pytest.mark.parametrize("name", TABLE2)
def test_image_operations(gpu: FakeGpu, name: str) -> None:
    images, masks = torch.rand(2, 3, 40, 48), torch.ones(2, 40, 48)
    for there in (TABLE2[name](images.to(CUDA), masks.to(CUDA)), TABLE2[name](images.to(CUDA), masks)):
        assert on_gpu(there) and there.shape == TABLE2[name](images, masks).shape


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("masks_on", ["cpu", CUDA], ids=str)
@pytest.mark.parametrize("tokens", ["cls", "patches"])
def test_masked_attention(gpu: FakeGpu, tokens: Any, masks_on: Any, precision: str) -> None:
    images, masks = torch.zeros(2, 3, 64, 64, device=CUDA), torch.ones(2, 64, 64).to(masks_on)
    for layers in ("last", "all"):
        found = masked_embedding(clip(precision=precision), images, masks, AttentionMask(tokens, layers))
        assert on_gpu(found) and found.shape == (2, 24)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", ["plain", "deconv", "vitseg"])
def test_whitening(gpu: FakeGpu, kind: str, keep: bool) -> None:
    model = clipseg(kind, "fp32")
    pixels = normalize(pictures(2, 3, 64, 64).to(CUDA))
    words = model.encode_text(["a cat", "glass"])
    whiten(model.decoder, lambda: model(pixels, words), keep=keep)
    assert on_gpu(model(pixels, words))
    folded = fold(model.decoder.state_dict())
    assert all(on_gpu(tensor) for tensor in folded.values())
    assert not any("whitening" in name for name in folded)


def test_numpy_is_no_shortcut(gpu: FakeGpu) -> None:
    with pytest.raises(TypeError):
        torch.zeros(2, device=CUDA).numpy()
    assert np.array_equal(torch.zeros(2, device=CUDA).cpu().numpy(), [1, 1]), "what is read are ones"
