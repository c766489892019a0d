"""The confusion matrix as a picture that can be read with 2 classes and with 171."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

DPI = 130
CELL_INCH = 0.15
"""The smallest cell that a line of 6 point text fits."""
MAX_ANNOTATED = 24
MAX_LABEL = 28


def plot_confusion(path: Path, confusion: npt.NDArray[np.int64], names: Sequence[str], *, title: str) -> None:
    """Draw where the pixels of each class went, as shares of its true pixels.

    Args:
        path: of the PNG file.
        confusion: (C, C + 1) pixel counts, row truth, column prediction, last column "no class".
        names: C class names.
        title: above the picture.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(names)
    total = confusion.sum(1, keepdims=True)
    shares = np.where(total > 0, confusion / np.maximum(total, 1), np.nan)
    side = max(CELL_INCH, 5.0 / count, 0.42 if count <= MAX_ANNOTATED else 0) if count else CELL_INCH
    side = min(side, 1.2)
    labels = [_short(name) for name in names]
    margin = 0.075 * max(map(len, labels), default=1) + 0.9
    size = (side * (count + 1) + margin + 1.0, side * count + margin + 0.8)
    figure = Figure(figsize=size, dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (margin / size[0], margin / size[1], side * (count + 1) / size[0], side * count / size[1])
    )
    axes.set_facecolor("#d9d9d9")  # classes without a true pixel
    # The root spreads small shares: most mistakes are a few per cent.
    norm = PowerNorm(0.5, 0, 1)
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest", aspect="auto")
    font = 6 if count > MAX_ANNOTATED else 9
    axes.set_xticks(range(count + 1), [*labels, "no class"], rotation=90, fontsize=font)
    axes.set_yticks(range(count), labels, fontsize=font)
    axes.tick_params(length=2, pad=2)
    if count > MAX_ANNOTATED:
        axes.tick_params(labeltop=True, top=True)
        axes.set_xticks(np.arange(0.5, count), minor=True)
        axes.set_yticks(np.arange(0.5, count - 1), minor=True)
        axes.grid(which="minor", color="#e6e6e6", linewidth=0.3)
        axes.tick_params(which="minor", length=0)
    else:
        for row, column in np.argwhere(shares >= 0.005):
            value = shares[row, column]
            color = "white" if norm(value) > 0.6 else "#1a1a1a"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("predicted", fontsize=10)
    axes.set_ylabel("true", fontsize=10)
    height = min(side * count, 5.0)
    bar_axes = figure.add_axes(
        (
            (margin + side * (count + 1) + 0.2) / size[0],
            (margin + side * count - height) / size[1],
            0.15 / size[0],
            height / size[1],
        )
    )
    bar = figure.colorbar(image, cax=bar_axes, ticks=[0, 0.01, 0.05, 0.25, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "25 %", "50 %", "100 %"], fontsize=8)
    unit = ", in per cent" if count <= MAX_ANNOTATED else ""
    figure.text(
        0.15 / size[0],
        1 - 0.12 / size[1],
        f"{title}\nshare of each true class's pixels{unit}",
        va="top",
        fontsize=10,
        parse_math=False,
    )
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)
    with warnings.catch_warnings():
        # Scripts that the font does not have become boxes; the table beside the picture has the names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.15)


def _short(name: str) -> str:
    return name if len(name) <= MAX_LABEL else name[: MAX_LABEL - 1] + "…"
