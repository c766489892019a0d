"""Charts, drawn with matplotlib, as inline SVG in the page's colours or as PNG files.

Charts fit the width of a phone; a wider screen shows several side by side. The same SVG works in light, dark
and print modes, because its colours become CSS variables of the page. Sizes are in CSS pixels.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from pipeline.metrics.names import percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Placeholder colours, each replaced by a CSS variable of the page.
ACCENT, SECOND, INK, SOFT, LINE = "#00a001", "#00a002", "#00a003", "#00a004", "#00a005"
_VARIABLES = {ACCENT: "accent", SECOND: "second", INK: "ink", SOFT: "soft", LINE: "line"}
#: Colour of a full cell of a large confusion matrix, visible on light and dark pages.
_HEAT = (62, 118, 232)
_TEXT = 11.5
_TICK = 4


@dataclass(frozen=True)
class Point:
    """A point of a curve; ``low`` and ``high`` bound its interval, if any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def nice_top(largest: float) -> float:
    """Round up to an axis limit: 1, 1.5, 2, 3, 4, 5, 6 or 8 times a power of ten."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    steps = (power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10))
    return next(step for step in steps if step >= largest * (1 - 1e-9))


def reliability(bins: Sequence[Sequence[int]]) -> Markup:
    """Reliability diagram: share of correct pixels per confidence bin, with a histogram below.

    Args:
        bins: per bin, the number of pixels, the number of correct ones, and the sum of confidences in 0..255.
    """
    figure = _figure(328, 388)
    upper = _axes(figure, left=46, top=8, width=272, height=272)
    lower = _axes(figure, left=46, top=304, width=272, height=46)
    most = max((count for count, _, _ in bins), default=0) or 1
    total = sum(count for count, _, _ in bins) or 1
    width = 1 / len(bins)
    for index, (count, correct, confidence) in enumerate(bins):
        if not count:
            continue
        share, mean, left = correct / count, confidence / count / 255, (index + 0.003 * len(bins)) * width
        ends = f"{100 * index * width:.0f} to {100 * (index + 1) * width:.0f} %"
        title = (
            f"confidence {ends}: {percent(share)} % correct at a mean confidence of {percent(mean)} %, "
            f"{percent(count / total)} % of the pixels"
        )
        bar: dict[str, Any] = {"width": 0.94 * width, "align": "edge", "clip_on": False}
        _name(upper.bar(left, share, color=ACCENT, alpha=0.3, **bar)[0], "fill", title)
        _name(lower.bar(left, count / most, color=SOFT, alpha=0.45, **bar)[0], "count", title)
        _dot(upper, mean, share, title)
    _name(upper.plot([0, 1], [0, 1], color=INK, alpha=0.6, dashes=(4, 3), lw=1.25, clip_on=False)[0], "ideal")
    ticks = (0, 0.5, 1)
    _frame(upper, (0, 1), (0, 1), ys=ticks, percent_ys=True)
    _frame(lower, (0, 1), (0, 1), xs=ticks, ys=(0,))
    lower.set_xticklabels([f"{100 * tick:g}" for tick in ticks])
    lower.set_yticklabels([""])
    upper.set_ylabel("correct, %", labelpad=4, color=SOFT, fontsize=_TEXT)
    lower.set_xlabel("confidence, %", labelpad=3, color=SOFT, fontsize=_TEXT)
    upper.text(0, -18 / 272, "pixels per bin", color=SOFT, fontsize=_TEXT, va="baseline")
    return _svg(
        figure, f"Reliability diagram of {len(bins)} bins: share of correct pixels against confidence"
    )


def curve(
    points: Sequence[Point],
    *,
    label: str,
    others: Sequence[Sequence[Point]] = (),
    references: Sequence[float] = (),
    published: Sequence[Point] = (),
    xs: Sequence[float],
    top: float,
    bottom: float = 0.0,
) -> Markup:
    """One curve of a set of small multiples: with its intervals, and the other curves in grey behind it.

    All values are fractions of 1, shown in percent.

    Args:
        points: points of this curve, by x.
        label: description for screen readers.
        others: the other curves.
        references: values drawn as dashed horizontal lines.
        published: published values, drawn as squares.
        xs: all x positions of the section, in order, as ticks.
        top: upper end of the y axis.
        bottom: lower end of the y axis.
    """
    width = 186
    figure = _figure(240, 140)
    axes = _axes(figure, left=44, top=8, width=width, height=110)
    ends = (xs[0], xs[-1]) if len(xs) > 1 else (xs[0] - 0.5, xs[0] + 0.5)
    for other in others:
        if len(other) > 1:
            _line(axes, [p.x for p in other], [p.y for p in other], "faint", color=SOFT, lw=1, alpha=0.28)
    for value in references:
        _line(axes, ends, (value, value), "reference", color=SECOND, lw=1.5, dashes=(3.3, 2.7))
    known = [(p.x, p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if len(known) > 1:
        edge = [(x, high) for x, _, high in known] + [(x, low) for x, low, _ in reversed(known)]
        (band,) = axes.fill(*zip(*edge, strict=True), color=ACCENT, alpha=0.2, lw=0, clip_on=False)
        _name(band, "band")
    if len(points) > 1:
        _line(axes, [p.x for p in points], [p.y for p in points], "main", color=ACCENT, lw=2)
    for x, low, high in known:
        _line(axes, (x, x), (low, high), "whisker", color=ACCENT, lw=1.25)
    for p in points:
        within = "" if p.low is None or p.high is None else f" (95 %: {percent(p.low)} to {percent(p.high)})"
        _dot(axes, p.x, p.y, f"{p.x:g}: {percent(p.y)} %{within}")
    for p in published:
        title = f"published at {p.x:g}: {percent(p.y)} %"
        square = _line(axes, (p.x, p.x), (p.y, p.y), "theirs", title, color=SECOND, lw=7)
        square.set_solid_capstyle("projecting")
    # Skip labels that would overlap.
    every = max(1, math.ceil(len(xs) * max(len(f"{x:g}") for x in xs) * 7 / width))
    _frame(axes, ends, (bottom, top), xs=xs[::every], ys=(bottom, (bottom + top) / 2, top), percent_ys=True)
    return _svg(figure, label)


def trace(points: Sequence[Point], *, label: str, marks: Sequence[float] = ()) -> Markup:
    """A line through many points, such as a loss by step, from step 0 on.

    Args:
        points: by x, at least two.
        label: description for screen readers.
        marks: x positions drawn as dashed vertical lines.
    """
    from matplotlib.ticker import MaxNLocator

    width = 226
    figure = _figure(280, 146)
    axes = _axes(figure, left=44, top=8, width=width, height=112)
    ends = min(0.0, points[0].x), points[-1].x
    values = [point.y for point in points]
    bottom = min(0.0, *values)
    top = max(nice_top(max(values)), bottom + 1e-9)
    for mark in marks:
        if ends[0] < mark < ends[1]:
            _line(axes, (mark, mark), (bottom, top), "reference", color=SECOND, lw=1.5, dashes=(3.3, 2.7))
    thin = points[:: max(1, len(points) // (2 * width))]  # more points than pixels only enlarge the page
    _line(axes, [p.x for p in thin], [p.y for p in thin], "main", color=ACCENT, lw=1.75)
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(*ends)
    xs = [x for x in map(float, ticks) if ends[0] <= x <= ends[1]]
    _frame(axes, ends, (bottom, top), xs=xs, ys=(bottom, (bottom + top) / 2, top))
    if xs[-1] == ends[1]:  # beyond the axis there is no room for half of a long number
        axes.get_xticklabels()[-1].set_horizontalalignment("right")
    return _svg(figure, label)


def heat(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Colour strength in [0, 1]: the square root, so that a few per cent of confusion are visible."""
    return np.sqrt(np.clip(shares, 0, 1))


def matrix_picture(shares: NDArray[np.float64], label: str) -> Markup:
    """A confusion matrix of many classes: one pixel per pair, ids along both axes.

    Args:
        shares: (C, C + 1) in [0, 1], row true class, column predicted class, last column "no class".
        label: description for screen readers.
    """
    rows, columns = shares.shape
    pixels = np.empty((rows, columns, 4), np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.rint(255 * heat(shares))
    side = 310
    tall = side * rows / columns
    figure = _figure(346, math.ceil(24 + tall))
    axes = _axes(figure, left=30, top=20, width=side, height=tall)
    axes.imshow(pixels, interpolation="none", aspect="auto", clip_on=False)
    ids = range(0, rows, int(nice_top(rows / 9)))
    axes.set(xticks=ids, yticks=ids)
    axes.tick_params(bottom=False, left=False, labelbottom=False, labeltop=True, colors=SOFT, labelsize=_TEXT)
    axes.spines[:].set(visible=True, color=LINE, linewidth=1)
    return _svg(figure, label)


def save_confusion(path: Path, confusion: NDArray[np.int64], names: Sequence[str], *, title: str) -> None:
    """Save a confusion matrix with class names as a PNG, legible from 2 to 171 classes.

    Args:
        path: the PNG file.
        confusion: (C, C + 1) pixel counts, row true class, column predicted class, last column "no class".
        names: C class names.
        title: title of the picture.
    """
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    count = len(names)
    few = count <= 24
    total = confusion.sum(1, keepdims=True)
    shares = np.where(total > 0, confusion / np.maximum(total, 1), np.nan)
    labels = [name if len(name) <= 28 else f"{name[:27]}…" for name in names]
    # In inches; the smallest cell fits a line of 6-point text.
    side = min(1.2, max(0.15, 5 / max(count, 1), 0.42 if few else 0))
    figure = Figure(figsize=(side * (count + 1) + 2.5, side * count + 2.5), dpi=130)
    axes = figure.add_axes(
        (0, 0, side * (count + 1) / figure.get_figwidth(), side * count / figure.get_figheight())
    )
    axes.set_facecolor("#d9d9d9")  # avoids 0 / 0 for classes without true pixels
    norm = PowerNorm(0.5, 0, 1)  # the square root spreads small shares: most confusions are a few per cent
    image = axes.imshow(shares, cmap="Blues", norm=norm, interpolation="nearest", aspect="auto")
    size = 9 if few else 6
    axes.set_xticks(range(count + 1), [*labels, "no class"], rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(count), labels, fontsize=size, parse_math=False)
    axes.tick_params(length=2, pad=2, top=not few, labeltop=not few)
    for row, column in np.argwhere(shares >= 0.005) if few else ():
        value = shares[row, column]
        color = "white" if norm(value) > 0.6 else "#1a1a1a"
        axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    unit = ", in per cent" if few else ""
    axes.set_title(
        f"{title}\nshare of each true class's pixels{unit}", loc="left", fontsize=10, parse_math=False
    )
    bar = figure.colorbar(
        image, ax=axes, ticks=[0, 0.01, 0.05, 0.25, 0.5, 1], fraction=0.15 / side / (count + 1), pad=0.02
    )
    bar.ax.set_yticklabels(["0", "1 %", "5 %", "25 %", "50 %", "100 %"], fontsize=8)
    with warnings.catch_warnings():
        # Scripts missing from the font become boxes; the table next to the picture has the names.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15)


# --- SVG ---


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72))  # so that a matplotlib point is a pixel


def _axes(figure: Figure, *, left: float, top: float, width: float, height: float) -> Axes:
    full_width, full_height = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
    axes = figure.add_axes(
        (left / full_width, 1 - (top + height) / full_height, width / full_width, height / full_height)
    )
    axes.patch.set_visible(False)
    axes.spines[:].set_visible(False)
    return axes


def _frame(
    axes: Axes,
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    *,
    xs: Sequence[float] = (),
    ys: Sequence[float] = (),
    percent_ys: bool = False,
) -> None:
    """Set limits, ticks and grid lines. Ticks are lines: matplotlib's would need page-wide unique ids."""
    tick = _TICK * (y_ends[1] - y_ends[0]) / (axes.bbox.height * 72 / axes.figure.dpi)
    for x in xs:
        _line(axes, (x, x), (y_ends[0], y_ends[0] - tick), "tick", color=SOFT, lw=1, zorder=0)
    for y in ys:
        _line(axes, x_ends, (y, y), "grid", color=LINE, lw=1, zorder=0)
    axes.set(xlim=x_ends, ylim=y_ends)
    axes.set_xticks(xs, [f"{x:,.10g}" for x in xs])
    axes.set_yticks(ys, [f"{100 * y if percent_ys else y:.3g}" for y in ys])
    axes.tick_params(bottom=False, left=False, colors=SOFT, labelsize=_TEXT, pad=6)


def _line(axes: Axes, xs: Any, ys: Any, name: str, title: str = "", **style: Any) -> Any:
    (line,) = axes.plot(xs, ys, clip_on=False, solid_joinstyle="round", **style)
    _name(line, name, title)
    return line


def _dot(axes: Axes, x: float, y: float, title: str) -> None:
    # A zero-length line with round ends, because a marker would need a page-wide unique id.
    _line(axes, (x, x), (y, y), "dot", title, color=ACCENT, lw=5.5).set_solid_capstyle("round")


def _name(artist: Any, name: str, title: str = "") -> None:
    """Give an artist a CSS class in the SVG, and a tooltip."""
    artist.set_gid(f"{name}|{title}")


def _svg(figure: Figure, label: str) -> Markup:
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "maskmill", "font.size": _TEXT}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    inside = text[text.index("</metadata>") + len("</metadata>") : text.rindex("</svg>")]
    # The page sets fonts and sizes.
    inside = re.sub(r"<style.*?</style>|<!--.*?-->|font-(size|family): [^;\"]*;", "", inside, flags=re.S)
    inside = re.sub(r'base64,[^"]*', lambda found: "".join(found[0].split()), inside)
    inside = re.sub(r' id="(\w+)\|([^"]*)">', r' class="\1"><title>\2</title>', inside)
    inside = re.sub(r' id="[^"|]*"', "", inside).replace("<title></title>", "")
    for color, variable in _VARIABLES.items():
        inside = inside.replace(color, f"var(--{variable})")
    width, height = (72 * size for size in figure.get_size_inches())
    return Markup(
        f'<svg class="chart" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">'
        f"{' '.join(inside.split())}</svg>"
    )
