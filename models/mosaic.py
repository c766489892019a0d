"""Label maps of an image too large for its scores, from the scores of windows that overlap.

Shapes: C classes, K of them, h w the grid of a window's scores, W the image's width.

Where windows overlap, their scores are averaged at the image's pixels, and then the class is chosen. Windows
come row by row. Held are the scores of the windows that are still needed: two or three of a row in full, of
the others the cells that reach into the next row of windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.errors import FailedWork
from models.labelmap import (
    CPU_TILE_BYTES,
    CPU_TILE_COLUMNS,
    GPU_TILE_BYTES,
    decide,
    finite_ranges,
    interpolation,
    one_thread,
)

MOST_BYTES = 2 << 30
"""Of scores that are held. Only hundreds of classes on the grid of pixels of a very wide image exceed it."""

Rule = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Averaged scores (rows, K, columns) and the ids (K,) of their classes -> class ids and uint8 confidence,
both (rows, columns)."""


def spread(length: int, window: int, overlap: int) -> list[int]:
    """Starts of windows that cover an axis, evenly spread, each overlapping the next by ``overlap`` or more.

    Args:
        length: of the axis.
        window: length of each window; one window covers a shorter axis.
        overlap: less than ``window``.
    """
    if length <= window:
        return [0]
    steps = -(-(length - window) // (window - overlap))
    return [step * (length - window) // steps for step in range(steps + 1)]


class Block(NamedTuple):
    """Labels of a part of the image.

    Attributes:
        left: the block's first column.
        labels, confidence: (rows, columns); see ``models.labelmap.label_map``.
    """

    left: int
    labels: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class _Scores:
    """Scores of one window, on rows of its grid.

    Attributes:
        values: fp32 (rows, K, w).
        first: the row of the grid that ``values`` begin with.
        grid, network: (h, w) of the whole window's grid, and (H, W) of the network's input.
        ids: int64 (K,), ascending.
        floor: what a class has that is not among ``ids``.
    """

    values: Tensor
    first: int
    grid: tuple[int, int]
    network: tuple[int, int]
    ids: Tensor
    floor: Tensor


class Mosaic:
    """Puts windows together.

    Args:
        size: (H, W) of the image.
        window: (H, W) of every window, at most ``size``.
        tops, lefts: where windows begin, ascending, from 0 to the image's end.
        num_classes: C.
        rule: chooses the class.

    Attributes:
        held_bytes: scores that are held.
    """

    def __init__(
        self,
        size: tuple[int, int],
        window: tuple[int, int],
        tops: Sequence[int],
        lefts: Sequence[int],
        *,
        num_classes: int,
        rule: Rule,
    ) -> None:
        for starts, side, length in zip((tops, lefts), window, size, strict=True):
            assert starts[0] == 0 and starts[-1] + side == length, "windows cover the image"
            assert all(0 < b - a <= side for a, b in itertools.pairwise(starts)), "without gaps"
        self._size, self._window, self._tops, self._lefts = size, window, list(tops), list(lefts)
        self._num_classes, self._rule = num_classes, rule
        self._held: dict[tuple[int, int], _Scores] = {}

    @property
    def held_bytes(self) -> int:
        """See the class."""
        return sum(each.values.numel() * each.values.element_size() for each in self._held.values())

    def add(
        self,
        row: int,
        column: int,
        scores: Tensor,
        *,
        network_size: tuple[int, int],
        ids: Tensor | None = None,
    ) -> Block:
        """Take the next window, in order of rows and then columns.

        Args:
            row, column: its place among ``tops`` and ``lefts``.
            scores: fp32 (K, h, w), as the rule takes them: cosines times their temperature, for instance.
            network_size: (H, W) of the network's input.
            ids: (K,), ascending, the classes that the scores are of; None if all.

        Returns:
            The part of the image that no later window reaches: from the window's top to that of the next row
            of windows, and from its left to the next window.

        Raises:
            MaskMillError: ``labelling_failed`` for scores that are not finite, or need too much memory.
        """
        lowest = finite_ranges(scores)[1].min()
        if ids is None:
            ids = torch.arange(self._num_classes)
        self._held[row, column] = _Scores(
            scores.float().permute(1, 0, 2).contiguous(),
            0,
            (scores.shape[1], scores.shape[2]),
            network_size,
            ids.cpu(),
            lowest,
        )
        if self.held_bytes > MOST_BYTES:
            raise FailedWork(
                "labelling_failed",
                f"The scores of windows in a row would take more than {MOST_BYTES >> 30} GiB.",
                "Use fewer classes, windows=cells instead of pixels, or a smaller large_overlap.",
            )
        block = self._block(row, column)
        self._release(row, column)
        return block

    def _block(self, row: int, column: int) -> Block:
        top, bottom = self._span(self._tops, row, self._size[0])
        left, right = self._span(self._lefts, column, self._size[1])
        device = self._held[row, column].values.device
        labels = torch.empty(bottom - top, right - left, dtype=torch.int32, device=device)
        confidence = torch.empty(bottom - top, right - left, dtype=torch.uint8, device=device)
        least = right - left if device.type != "cpu" else CPU_TILE_COLUMNS
        with torch.inference_mode(), one_thread(device):
            for y0, y1 in _cuts(self._tops[:row], self._window[0], top, bottom):
                for x0, x1 in _cuts(self._lefts[:column], self._window[1], left, right):
                    for a in range(x0, x1, least):
                        b = min(x1, a + least)
                        for begin, end, label, sure in self._tiles(y0, y1, a, b, row, column):
                            labels[begin - top : end - top, a - left : b - left] = label
                            confidence[begin - top : end - top, a - left : b - left] = sure
        return Block(left, labels, confidence)

    @staticmethod
    def _span(starts: Sequence[int], index: int, length: int) -> tuple[int, int]:
        return starts[index], starts[index + 1] if index + 1 < len(starts) else length

    def _tiles(
        self, top: int, bottom: int, left: int, right: int, row: int, column: int
    ) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """Labels of an area in which no window begins or ends: first row, last, class ids, confidence."""
        over = [
            (r, c, self._held[r, c])
            for r in range(row + 1)
            if self._tops[r] + self._window[0] > top
            for c in range(column + 1)
            if self._lefts[c] + self._window[1] > left
        ]
        ids = torch.unique(torch.cat([each.ids for _, _, each in over]))
        device = over[0][2].values.device
        everything = all(len(each.ids) == len(ids) for _, _, each in over)
        parts = []
        for r, c, each in over:
            across, down = (
                interpolation(each.grid[i], each.network[i], self._window[i], first, last, device)
                for i, first, last in (
                    (1, left - self._lefts[c], right - self._lefts[c]),
                    (0, top - self._tops[r], bottom - self._tops[r]),
                )
            )
            cells = each.values[
                down.first - each.first : down.last - each.first, :, across.first : across.last
            ]
            parts.append((each, down, (cells @ across.weights.T).flatten(1)))
        tile_bytes = CPU_TILE_BYTES if device.type == "cpu" else GPU_TILE_BYTES
        rows = max(1, tile_bytes // (4 * len(ids) * (right - left)))
        for begin in range(top, bottom, rows):
            end = min(bottom, begin + rows)
            total = torch.zeros(end - begin, len(ids), right - left, device=device)
            for each, down, wide in parts:
                low, high = down.lows[begin - top], down.highs[end - 1 - top]
                weights = down.weights[begin - top : end - top, low - down.first : high - down.first]
                part = weights @ wide[low - down.first : high - down.first]
                part = part.view(end - begin, len(each.ids), right - left)
                if everything:
                    total += part
                else:  # refined scores are of a window's likeliest classes only
                    here = torch.isin(ids, each.ids).to(device)
                    total[:, here] += part
                    total[:, ~here] += each.floor.to(device)
            label, sure = self._rule(total.div_(len(over)), ids.to(device))
            yield begin, end, label, sure

    def _release(self, row: int, column: int) -> None:
        """Let go of scores that no later block needs."""
        last = column + 1 == len(self._lefts)
        next_left = self._size[1] if last else self._lefts[column + 1]
        next_top = self._size[0] if row + 1 == len(self._tops) else self._tops[row + 1]
        for r, c in list(self._held):
            if not last and self._lefts[c] + self._window[1] > next_left:
                continue
            if self._tops[r] + self._window[0] <= next_top:
                del self._held[r, c]
            else:
                self._held[r, c] = self._lower_part(self._held[r, c], next_top - self._tops[r])

    def _lower_part(self, scores: _Scores, begin: int) -> _Scores:
        """The rows of the grid that a window's pixels from ``begin`` on read."""
        height = self._window[0]
        needed = interpolation(
            scores.grid[0], scores.network[0], height, begin, height, scores.values.device
        ).first
        if needed <= scores.first:
            return scores
        return replace(scores, values=scores.values[needed - scores.first :].clone(), first=needed)


def _cuts(starts: Sequence[int], window: int, first: int, last: int) -> Iterator[tuple[int, int]]:
    """[first, last) cut where earlier windows end."""
    edges = sorted({first, last, *(start + window for start in starts if first < start + window < last)})
    yield from itertools.pairwise(edges)


def best_class(thresholds: Tensor | None, ignore_index: int, *, share: bool = False) -> Rule:
    """The rule of ``models.labelmap.label_map``.

    Args:
        thresholds: fp32 (C,) minimum confidences, or None.
        ignore_index: of pixels below.
        share: the confidence is the share of the positive scores, not the softmax.
    """

    def choose(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        index, p = decide(scores, share=share)
        labels = ids[index]
        if thresholds is not None:
            labels = torch.where(p < thresholds.to(p.device)[labels], ignore_index, labels)
        return labels, p.mul_(255).round_()

    return choose
