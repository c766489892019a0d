"""Turn class scores on a grid into a label map at image size, in bounded memory.

Shapes: C classes, h w grid, H W image pixels.

The reference resizes the scores of all classes twice (bilinear, align_corners False), from the grid to the
network's input size and from there to the image, and takes the argmax; 171 classes on 4000x3000 pixels take
8 GB. Both steps are linear and separable. Here they are composed into one banded matrix per axis (in fp64, a
part of the axis at a time), and the image is computed in tiles that fit the cache, each of them down to label
and confidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.errors import FailedWork

Indices = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float64]

CPU_TILE_BYTES = 1_000_000  # of scores: half of a common L2 cache
CPU_TILE_COLUMNS = 512
GPU_TILE_BYTES = 256_000_000
_PART = 1024  # rows or columns per interpolation matrix
_LONG_PART = 8192  # the same where the other side is short, if the matrix stays below
_MATRIX = 1 << 18  # values
_NEGLIGIBLE = 30.0  # nats: a class this far below another one everywhere adds under 1e-13 to a softmax


class Subset(NamedTuple):
    """Which classes scores are of, if not of all.

    Attributes:
        ids: int64 (K,), ascending.
        num_classes: of all.
    """

    ids: Tensor
    num_classes: int


def label_map(
    scores: Tensor,
    *,
    network_size: tuple[int, int],
    image_size: tuple[int, int],
    temperature: float | None = 100.0,
    thresholds: Tensor | None = None,
    ignore_index: int = 255,
    subset: Subset | None = None,
) -> tuple[Tensor, Tensor]:
    """Label every pixel with its best class.

    Equal to ``interpolate(grid → network size) → interpolate(→ image size) → argmax`` in exact arithmetic;
    ties go to the lower class id.

    Args:
        scores: fp32 (C, h, w) on any device.
        network_size: (H, W) of the network's input, without padding.
        image_size: (H, W) of the result.
        temperature: the confidence is ``softmax(temperature * scores)`` of the chosen class, taken at image
            size. None if the scores are sums of probabilities (key smoothing); the confidence is then the
            chosen class's share of the positive scores.
        thresholds: (C,); pixels with a confidence below their class's threshold get ``ignore_index``.
        ignore_index: at least C.
        subset: the classes that the scores are of; thresholds are still those of all C.

    Returns:
        labels (H, W), uint8, or uint16 with more than 254 classes or ``ignore_index`` above 255; confidence
        uint8 (H, W), round(255 p). Both are on the scores' device.

    Raises:
        MaskMillError: ``labelling_failed``.
    """
    classes = len(scores) if subset is None else subset.num_classes
    assert ignore_index >= classes, "the ignore index must not be a class"
    limits = None
    if thresholds is not None:
        limits = thresholds.to(scores.device, torch.float32, non_blocking=True)
    # Everything runs in one thread: on a busy machine a single parallel operation costs as much as the map.
    with torch.inference_mode(), one_thread(scores.device):
        if subset is not None and limits is not None:
            limits = limits[subset.ids]
        return _tiled(scores, network_size, image_size, temperature, limits, ignore_index, subset)


def _tiled(
    scores: Tensor,
    network_size: tuple[int, int],
    image_size: tuple[int, int],
    temperature: float | None,
    limits: Tensor | None,
    ignore_index: int,
    subset: Subset | None,
) -> tuple[Tensor, Tensor]:
    classes, h, w = scores.shape
    device = scores.device
    kept = _contenders(scores, temperature).to(device, non_blocking=True)
    scores = scores[kept].float()
    if temperature is not None:
        scores = scores * temperature  # once here rather than per pixel; the order of classes stays
    limits = None if limits is None else limits[kept]
    wide = (classes if subset is None else subset.num_classes) > 254 or ignore_index > 255
    kept = kept if subset is None else subset.ids[kept]
    ids = kept.to(torch.int32) if wide else kept.to(torch.uint8)

    height, width = image_size
    labels = torch.empty(height, width, dtype=torch.int32 if wide else torch.uint8, device=device)
    confidence = torch.empty(height, width, dtype=torch.uint8, device=device)
    tile_bytes = CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
    count = len(kept)
    # A tile of a long, thin image is as large as any other: their number follows the pixels, not a side.
    least_columns = CPU_TILE_COLUMNS if device.type == "cpu" else _PART
    tile_columns = max(least_columns, min(_long_part(w, width), tile_bytes // (4 * count * height)))
    tile_columns = min(width, tile_columns)
    part = _PART if width >= least_columns else max(_PART, _long_part(h, height))
    tile_rows = min(height, part, max(1, tile_bytes // (4 * count * tile_columns)))
    # Allocated once: fresh pages for every tile would cost more than the arithmetic.
    memory = torch.empty(tile_rows * count * tile_columns, device=device)
    by_row = scores.permute(1, 0, 2).reshape(h * count, w)
    for left in range(0, width, tile_columns):
        right = min(width, left + tile_columns)
        columns = interpolation(w, network_size[1], width, left, right, device)
        across = columns.weights.T.contiguous()
        stretched = (by_row[:, columns.first : columns.last] @ across).view(h, count * (right - left))
        for start in range(0, height, part):
            stop = min(height, start + part)
            rows = interpolation(h, network_size[0], height, start, stop, device)
            for top in range(start, stop, tile_rows):
                bottom = min(stop, top + tile_rows)
                low, high = rows.lows[top - start], rows.highs[bottom - 1 - start]
                shape = (bottom - top, count, right - left)
                tile = memory[: shape[0] * shape[1] * shape[2]].view(shape[0], -1)
                weights = rows.weights[top - start : bottom - start, low - rows.first : high - rows.first]
                torch.mm(weights, stretched[low:high], out=tile)
                index, p = decide(tile.view(shape), share=temperature is None)
                label = ids[index]
                if limits is not None:
                    label = torch.where(p < limits[index], ignore_index, label)
                labels[top:bottom, left:right] = label
                confidence[top:bottom, left:right] = p.mul_(255).round_()
    return labels.to(torch.uint16) if wide else labels, confidence


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Run the tiles in the calling thread.

    Each tile takes a dozen operations of about 50 microseconds. For 30 classes on 500x375, two threads take
    11 ms instead of 15 if both cores are free, but ten times as long if not, because every operation waits
    for the descheduled thread.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def decide(tile: Tensor, *, share: bool) -> tuple[Tensor, Tensor]:
    """Best class (ties: the lowest id) and its confidence in a tile (rows, C, columns), which is overwritten.

    The confidence is the softmax over C or, with ``share``, the share of the positive values.
    """
    count = tile.shape[1]
    best = tile.amax(1, keepdim=True)
    # torch.max with indices is not vectorised along an inner axis. Marking the winners, with higher marks for
    # lower ids, and taking the highest mark is several times faster.
    small = count <= 255
    marks = torch.arange(count, 0, -1, dtype=torch.uint8 if small else torch.int32, device=tile.device)[
        :, None
    ]
    won = tile == best
    index = count - (won.view(torch.uint8).mul_(marks) if small else won * marks).amax(1).long()
    if share:
        total = tile.clamp_(min=0).sum(1)
        p = best[:, 0].clamp(min=0) / total.clamp_(min=torch.finfo(tile.dtype).tiny)
    else:
        # exp of less than -80 is denormal, ten times slower and negligible.
        p = tile.sub_(best).clamp_(min=-80).exp_().sum(1).reciprocal_()
    return index, p


def _contenders(scores: Tensor, temperature: float | None) -> Tensor:
    """Ascending ids, on the CPU, of the classes that can win a pixel or affect its confidence.

    Interpolated values stay within the range of the grid values, so a class whose maximum is far below
    another's minimum can be left out. Prompt denoising produces many of these. The range of each class also
    shows NaN and infinite values, so the host waits for a GPU once per image.

    Raises:
        MaskMillError: ``labelling_failed``.
    """
    ranges = finite_ranges(scores)
    if temperature is None:
        return torch.arange(len(scores))
    highest, lowest = ranges
    return (temperature * (highest - lowest.max()) > -_NEGLIGIBLE).nonzero().flatten()


def finite_ranges(scores: Tensor) -> Tensor:
    """The highest and the lowest score of each class, (2, C) on the CPU.

    Args:
        scores: (C, h, w).

    Raises:
        MaskMillError: ``labelling_failed`` if a score is NaN or infinite.
    """
    ranges = torch.stack([scores.amax((1, 2)), scores.amin((1, 2))]).cpu()
    if not bool(torch.isfinite(ranges).all()):
        raise FailedWork(
            "labelling_failed",
            "The class scores hold NaN or infinite values.",
            "float16 overflows with some weights: use bfloat16 or float32. Else the weights are damaged.",
        )
    return ranges


def _long_part(grid: int, image: int) -> int:
    """Positions along an axis of ``image`` pixels whose interpolation matrix stays small.

    p positions read about ``p * grid / image + 3`` cells.
    """
    ratio = grid / image
    return min(_LONG_PART, int((math.sqrt(9 + 4 * ratio * _MATRIX) - 3) / (2 * ratio)))


class Interpolation(NamedTuple):
    """Both resizes composed, for a part of an axis.

    Attributes:
        weights: fp32 (positions, cells), on the device of the scores.
        first, last: this part reads the grid cells [first, last).
        lows, highs: each position reads the cells [low, high).
    """

    weights: Tensor
    first: int
    last: int
    lows: list[int]
    highs: list[int]


@lru_cache(maxsize=64)
def interpolation(
    grid: int, network: int, image: int, start: int, stop: int, device: torch.device
) -> Interpolation:
    """Compose the resizes grid to network to image for the image's positions [start, stop)."""
    outer = _bilinear(network, image, start, stop)
    begin, end = int(outer[0][0].min()), int(outer[1][0].max()) + 1
    inner = _bilinear(grid, network, begin, end)
    first, last = int(inner[0][0].min()), int(inner[1][0].max()) + 1
    dense = np.zeros((end - begin, last - first))
    for index, weight in inner:
        np.add.at(dense, (np.arange(end - begin), index - first), weight)
    matrix = outer[0][1][:, None] * dense[outer[0][0] - begin]
    matrix += outer[1][1][:, None] * dense[outer[1][0] - begin]
    used = matrix != 0
    low = first + used.argmax(1)
    high = last - used[:, ::-1].argmax(1)
    weights = torch.from_numpy(matrix.astype(np.float32)).to(device)
    return Interpolation(weights, first, last, low.tolist(), high.tolist())


def _bilinear(source: int, target: int, start: int, stop: int) -> tuple[tuple[Indices, Weights], ...]:
    """The two (source index, weight) pairs of ``F.interpolate`` for the target positions [start, stop)."""
    position = np.maximum((np.arange(start, stop) + 0.5) * (source / target) - 0.5, 0)
    low = np.minimum(np.floor(position).astype(np.int64), source - 1)
    part = position - low
    return (low, 1 - part), (np.minimum(low + 1, source - 1), part)
