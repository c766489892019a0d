"""Item 3: class scores to label maps, against plain operations and a compiled kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.bench import Bench, first_line
from models.labelmap import label_map

SIZES = ((512, 683), (1024, 2048))
CLASSES = (20, 171, 1000)


def run(bench: Bench) -> None:
    """Milliseconds an image, and the share of the memory's bandwidth."""
    bench.add("copy, the bandwidth", f"{bench.bandwidth / 1e9:.0f} GB/s")
    for size in ((64, 96),) if bench.toy else SIZES:
        for classes in (3, 20) if bench.toy else CLASSES:
            grid = (-(-size[0] // 16), -(-size[1] // 16))
            scores = 0.2 + 0.05 * torch.randn(classes, *grid, device=bench.device)
            name = f"{size[0]}x{size[1]}, {classes} classes"
            if bench.left() < 10 and not bench.toy:
                bench.add(name, "left out: no time left")
                continue
            ours = bench.seconds(functools.partial(label_map, scores, network_size=size, image_size=size))
            # Every class score at image size, written and read once.
            ideal = 2 * 4 * classes * size[0] * size[1] / bench.bandwidth
            bench.add(
                f"{name}: label_map", f"{1e3 * ours:.2f} ms", ideal / ours, "two passes over the scores"
            )
            several(bench, name, scores, size, ours)
            against(bench, f"{name}: plain operations", plain, scores, size, ours)
            if size == SIZES[0] or bench.toy:
                kernel = torch.compile(plain, dynamic=False, backend="eager" if bench.toy else "inductor")
                against(bench, f"{name}: plain operations, compiled", kernel, scores, size, ours)


def several(bench: Bench, name: str, scores: Tensor, size: tuple[int, int], one: float) -> None:
    """Eight images in a row, of which the GPU should not be idle in between."""

    def work() -> None:
        for _ in range(8):
            label_map(scores, network_size=size, image_size=size)

    seconds = bench.seconds(work) / 8
    bench.add(f"{name}: label_map, 8 in a row", f"{1e3 * seconds:.2f} ms", one / seconds, "one at a time")


def against(
    bench: Bench,
    name: str,
    work: Callable[[Tensor, tuple[int, int]], object],
    scores: Tensor,
    size: tuple[int, int],
    ours: float,
) -> None:
    """Add a row of another way."""
    try:
        seconds = bench.seconds(functools.partial(work, scores, size))
    except Exception as error:  # out of memory, or no compiler
        bench.add(name, first_line(error))
        return
    bench.add(name, f"{1e3 * seconds:.2f} ms", seconds / ours, "label_map")


@torch.inference_mode()
def plain(scores: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Resize all scores, softmax, best class."""
    up = F.interpolate(scores[None], size, mode="bilinear")[0]
    confidence, labels = (100 * up).softmax(0).max(0)
    return labels.to(torch.uint8), (255 * confidence).round().to(torch.uint8)
