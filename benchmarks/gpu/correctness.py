"""Item 1: MaskCLIP and CLIPSeg in each precision against fp64 on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu.bench import Bench, random_images, random_text
from models.clip.loading import load_clip
from models.clip.text import build_text_classifier
from models.clipseg.decoder import build_clipseg, normalize
from models.labelmap import label_map
from models.maskclip import MaskClip
from models.settings import ClipSegConfig, MaskClipSettings
from pipeline.toyworld.scenes import CLASSES, generate

Compute = Callable[[torch.device, torch.dtype], Tensor]
PRECISIONS = {
    "fp32, no TF32": (torch.float32, False),
    "fp32": (torch.float32, True),
    "bf16": (torch.bfloat16, True),
    "fp16": (torch.float16, True),
}
AGREEMENT = 0.995


def run(bench: Bench) -> None:
    """Relative error of the scores, and share of pixels with the same label."""
    photos = random_images(1 if bench.toy else 2, 64, 96) if bench.toy else random_images(2, 320, 480)
    scenes = torch.from_numpy(generate(seed=1, count=2 if bench.toy else 16, size=128)[0]).permute(0, 3, 1, 2)
    models = [("bundled CLIP, toy scenes", "toyclip", "bundled", scenes)]
    if not bench.toy:
        models += [
            ("ViT-B/16, random weights", "ViT-B-16-quickgelu", "random:0", photos),
            ("RN50, random weights", "RN50-quickgelu", "random:0", photos),
        ]
    for name, model, pretrained, images in models:
        compare(bench, f"MaskCLIP, {name}", maskclip(model, pretrained, images), labels=True)
    clip = ("toyclip", "bundled") if bench.toy else ("ViT-B-16-quickgelu", "random:0")
    compare(bench, f"CLIPSeg, {clip[0]}", clipseg(*clip, photos), labels=False)


def compare(bench: Bench, name: str, compute: Compute, *, labels: bool) -> None:
    """Add a row for each precision."""
    exact = compute(torch.device("cpu"), torch.float64)
    for precision, (dtype, tf32) in PRECISIONS.items():
        with _tf32(tf32):
            found = compute(bench.device, dtype).double().cpu()
        error = float((found - exact).norm() / exact.norm())
        bench.add(
            f"{name}, {precision}: relative error of the scores", f"{error:.1e}", None, "fp64 on the CPU"
        )
        if labels:
            same = torch.stack([_labels(a) == _labels(b) for a, b in zip(found, exact, strict=True)])
            share = float(same.float().mean())
            target = AGREEMENT if precision == "bf16" else None
            bench.add(f"{name}, {precision}: same labels", f"{share:.2%}", share, "fp64 on the CPU", target)


def maskclip(model: str, pretrained: str, images: Tensor) -> Compute:
    """Cosines of a MaskCLIP."""
    towers = load_clip(model, pretrained, towers="both" if model == "toyclip" else "visual")
    if model == "toyclip":
        text = build_text_classifier(towers, [[name] for name in CLASSES], templates="toyworld")
    else:
        text = random_text(towers.embed_dim, 21)

    def compute(device: torch.device, dtype: torch.dtype) -> Tensor:
        clip = load_clip(model, pretrained, device=device, dtype=dtype, towers="visual")
        return MaskClip(clip, text, MaskClipSettings()).grid_scores(images)

    return compute


def clipseg(model: str, pretrained: str, images: Tensor) -> Compute:
    """Logits of a CLIPSeg with an untrained decoder for three texts."""
    layers = (0, 1, 2) if model == "toyclip" else (3, 6, 9)
    texts = build_clipseg(load_clip(model, pretrained), ClipSegConfig(extract_layers=layers)).encode_text(
        ["a ladybug", "grass", "a cloud"]
    )

    def compute(device: torch.device, dtype: torch.dtype) -> Tensor:
        clip = load_clip(model, pretrained, device=device, dtype=dtype, towers="visual")
        network = build_clipseg(clip, ClipSegConfig(extract_layers=layers))
        network.decoder.cast(dtype)
        with torch.inference_mode():
            return network(normalize(images.to(device)), texts)

    return compute


def _labels(scores: Tensor) -> Tensor:
    size = (16 * scores.shape[-2], 16 * scores.shape[-1])
    return label_map(scores.float(), network_size=size, image_size=size)[0]


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = allowed and before
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
