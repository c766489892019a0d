"""Timing and rows, shared by all items."""

from __future__ import annotations

import functools
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from models.clip.text import TextClassifier


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        item: name of the item.
        what: what was measured.
        value: with its unit, ready to print.
        ratio: to what it is compared with; None if there is nothing.
        to: what it is compared with.
        target: smallest good ratio; None if there is none.
    """

    item: str
    what: str
    value: str
    ratio: float | None = None
    to: str = ""
    target: float | None = None


class Bench:
    """What an item measures with, and where its rows go.

    Args:
        item: name of the item.
        rows: file that gets a line of JSON per row, at once.
        seconds: how long the item may take; it should leave out what would take longer.
        toy: whether everything is tiny.
    """

    def __init__(self, item: str, rows: Path, seconds: float, *, toy: bool) -> None:
        self.item, self.toy = item, toy
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float32 if toy else torch.bfloat16
        self._rows = rows
        self._end = time.monotonic() + seconds

    def add(
        self, what: str, value: str, ratio: float | None = None, to: str = "", target: float | None = None
    ) -> None:
        """Write a row."""
        row = Row(self.item, what, value, ratio, to, target)
        with self._rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")

    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def seconds(self, work: Callable[[], object], *, repeats: int = 7) -> float:
        """Median seconds of some work after two warm-up runs; fewer repeats if time is short."""
        self._once(work)  # may compile
        usual = self._once(work)
        fitting = int(0.2 * max(0.0, self.left()) / max(usual, 1e-9))
        repeats = 2 if self.toy else max(1, min(repeats, fitting))
        return statistics.median(self._once(work) for _ in range(repeats))

    def _once(self, work: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    @functools.cached_property
    def matmul_flops(self) -> float:
        """Measured floating-point operations a second of a large matrix product in ``dtype``."""
        side = 256 if self.toy else 8192
        a, b = (torch.randn(side, side, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * side**3 / self.seconds(lambda: a @ b, repeats=15)

    @functools.cached_property
    def bandwidth(self) -> float:
        """Measured bytes a second of a large copy in the GPU's memory, reading and writing."""
        source = torch.empty(2**20 if self.toy else 2**31, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.seconds(lambda: target.copy_(source), repeats=15)


def random_text(width: int, classes: int) -> TextClassifier:
    """A classifier of random rows, one per class."""
    rows = torch.randn(classes, width, generator=torch.Generator().manual_seed(0))
    return TextClassifier(F.normalize(rows, dim=-1), torch.arange(classes), classes)


def random_images(batch: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """Smooth random colours with some noise, uint8 (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(batch, 3, max(2, height // 32), max(2, width // 32), generator=generator)
    smooth = F.interpolate(255 * small, (height, width), mode="bicubic")
    noise = 12 * torch.randn(smooth.shape, generator=generator)
    return (smooth + noise).clamp(0, 255).to(torch.uint8)


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
