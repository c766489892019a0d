"""Item 2: the forward pass of MaskCLIP by model, size and batch, eager and compiled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu.bench import Bench, first_line, random_images, random_text
from models.clip.dense import VitDense
from models.clip.loading import load_clip
from models.maskclip import MaskClip
from models.settings import MaskClipSettings

MODELS = ("ViT-B-16-quickgelu", "ViT-L-14-quickgelu")
SIZES = ((448, 448), (512, 683))
BATCHES = (1, 8, 16, 32, 64)
CLASSES = 171
TARGET = 0.45
SHORTEST = 5.0
LONGEST_COMPILATION = 45.0


def run(bench: Bench) -> None:
    """Images a second, share of a matrix product's speed, and peak memory."""
    bench.add("matrix product, the ceiling", f"{bench.matmul_flops / 1e12:.1f} TFLOP/s")
    for name in ("toyclip",) if bench.toy else MODELS:
        weights = "bundled" if bench.toy else "random:0"
        clip = load_clip(name, weights, device=bench.device, dtype=bench.dtype, towers="visual")
        text = random_text(clip.embed_dim, CLASSES)
        whole = MaskClip(clip, text, MaskClipSettings())
        for size in ((64, 96),) if bench.toy else SIZES:
            what = f"{name} {size[0]}x{size[1]}"
            rates = {
                batch: measure(bench, f"{what}, batch {batch}", whole, random_images(batch, *size))
                for batch in ((1, 2) if bench.toy else BATCHES)
            }
            best = max(rates, key=rates.__getitem__)
            with fast_path(enabled=False):
                measure(
                    bench, f"{what}, batch {best}, without the fast path", whole, random_images(best, *size)
                )
            compiled(bench, f"{what}, batch {best}, compiled", whole, (best, *size), rates[best])
        side = 32 if bench.toy else 224
        windows = MaskClip(clip, text, MaskClipSettings(window=side, window_stride=side // 2))
        images = random_images(2 if bench.toy else 8, 2 * side, 2 * side)
        measure(bench, f"{name} {2 * side}x{2 * side} in windows of {side}", windows, images)


def measure(bench: Bench, name: str, model: MaskClip, images: Tensor) -> float:
    """Add a row; returns images/s, 0 if there is no time or memory."""
    if bench.left() < SHORTEST and not bench.toy:
        bench.add(name, "left out: no time left")
        return 0.0
    images = images.to(bench.device)
    cuda = bench.device.type == "cuda"
    try:
        # The counter does not know the operation that the fast path is.
        with fast_path(enabled=False), FlopCounterMode(display=False) as counter:
            model.grid_scores(images)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        rate = len(images) / bench.seconds(lambda: model.grid_scores(images))
    except torch.OutOfMemoryError as error:
        bench.add(name, first_line(error))
        return 0.0
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB" if cuda else ""
    share = counter.get_total_flops() / len(images) * rate / bench.matmul_flops
    bench.add(name, f"{rate:.1f} images/s{memory}", share, "matrix product's FLOP/s", TARGET)
    return rate


def compiled(bench: Bench, name: str, model: MaskClip, shape: tuple[int, int, int], eager: float) -> None:
    """The same with the encoder compiled, and what it gains."""
    if bench.left() < LONGEST_COMPILATION and not bench.toy:
        bench.add(name, "left out: no time left")
        return
    encoder = model.encoder
    assert isinstance(encoder, VitDense)
    batch, height, width = shape
    images = encoder.whole_patches(torch.randn(batch, 3, height, width, device=bench.device))
    table = encoder.position_table((images.shape[-2] // encoder.stride, images.shape[-1] // encoder.stride))
    # The toy run tests the capture only: inductor would compile C++ for a minute.
    encode = torch.compile(encoder.encode, dynamic=False, backend="eager" if bench.toy else "inductor")

    @torch.inference_mode()
    def work() -> Tensor:
        return model.scores(encode(images, table))

    try:
        seconds = bench.seconds(work)
    except Exception as error:  # no compiler, or one that fails
        bench.add(name, first_line(error))
        return
    bench.add(name, f"{batch / seconds:.1f} images/s", batch / seconds / max(eager, 1e-9), "eager")


@contextlib.contextmanager
def fast_path(*, enabled: bool) -> Iterator[None]:
    """Let ``nn.MultiheadAttention`` use its fused operation, or not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
