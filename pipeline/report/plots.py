"""Charts as inline SVG that follows the page's colours, and pictures as data URIs.

Charts carry class names instead of colours, so that one drawing serves light, dark and print. Each is drawn
for the width of a phone; a wider screen shows more of them side by side.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray
from PIL import Image

#: Colour of a full cell in the picture of a large confusion matrix: seen on white and on the dark page.
_HEAT = (62, 118, 232)

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Point:
    """One measurement of a curve; ``low`` and ``high`` are the ends of its interval, if it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


def nice_top(largest: float) -> float:
    """The end of an axis that starts at 0: the next of 1, 1.5, 2, 3, 4, 5, 6, 8 times a power of ten."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(
        power * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if power * step >= largest * (1 - 1e-9)
    )


def reliability(bins: Sequence[Sequence[int]]) -> Markup:
    """Reliability diagram: per bin of confidence the share of correct pixels, and below it their number.

    Args:
        bins: per bin the count of pixels, of correct ones, and the sum of their confidences in 0..255.
    """
    left, top, side, strip = 46, 8, 272, 46
    base = top + side
    floor = base + 24 + strip
    width = side / len(bins)
    most = max((count for count, _, _ in bins), default=0) or 1
    total = sum(count for count, _, _ in bins) or 1
    parts = [_text(left - 6, base - side * tick + 4, f"{tick:g}", "end") for tick in (0, 0.5, 1)]
    parts += [
        _line(left, base - side * tick, left + side, base - side * tick, "grid") for tick in (0, 0.5, 1)
    ]
    for index, (count, correct, confidence) in enumerate(bins):
        if not count:
            continue
        share, mean = correct / count, confidence / count / 255
        x = left + index * width
        title = (
            f"confidence {index / len(bins):.2f} to {(index + 1) / len(bins):.2f}: {share:.3f} correct at a "
            f"mean confidence of {mean:.3f}, {100 * count / total:.1f} % of the pixels"
        )
        parts.append(
            f"<g><title>{title}</title>"
            + _rect(x + 0.75, base - side * share, width - 1.5, side * share, "fill")
            + _rect(x + 0.75, floor - strip * count / most, width - 1.5, strip * count / most, "count")
            + f'<circle class="dot" cx="{_n(left + side * mean)}" cy="{_n(base - side * share)}" r="3"/></g>'
        )
    parts.append(_line(left, base, left + side, base - side, "ideal"))
    parts.append(_line(left, floor, left + side, floor, "grid"))
    parts += [_text(left + side * tick, floor + 15, f"{tick:g}", "middle") for tick in (0, 0.5, 1)]
    parts.append(_text(left + side / 2, floor + 31, "confidence", "middle"))
    parts.append(_text(11, top + side / 2, "share correct", "middle", turn=True))
    parts.append(_text(left, base + 18, "pixels per bin", "start"))
    label = f"Reliability diagram of {len(bins)} bins: share of correct pixels against confidence"
    return _svg(left + side + 10, floor + 38, label, parts)


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
    """One curve with its intervals, the other curves behind it in grey: small multiples on common axes.

    Args:
        points: of this curve, by x.
        label: what it shows, for those who cannot see it.
        others: curves that are drawn faintly.
        references: values drawn as dashed lines across.
        published: figures of a paper, drawn as marks.
        xs: all positions of the section, in order: the ticks.
        top: upper end of the y axis.
        bottom: lower end of the y axis.
    """
    left, right, above, height, width = 44, 10, 8, 110, 186
    base = above + height
    first, span = xs[0], (xs[-1] - xs[0]) or 1.0

    def at_x(value: float) -> float:
        return left + width * ((value - first) / span if len(xs) > 1 else 0.5)

    def at_y(value: float) -> float:
        return base - height * (value - bottom) / (top - bottom)

    parts = []
    for tick in (bottom, (bottom + top) / 2, top):
        parts.append(_line(left, at_y(tick), left + width, at_y(tick), "grid"))
        parts.append(_text(left - 6, at_y(tick) + 4, f"{tick:.3g}", "end"))
    # Labels of close positions would run into each other.
    every = max(1, math.ceil(len(xs) * max(len(f"{x:g}") for x in xs) * 7 / width))
    parts += [_text(at_x(x), base + 16, f"{x:g}", "middle") for x in xs[::every]]
    parts += [_path(other, at_x, at_y, "faint") for other in others if len(other) > 1]
    parts += [_line(left, at_y(value), left + width, at_y(value), "reference") for value in references]
    known = [
        (point.x, point.low, point.high)
        for point in points
        if point.low is not None and point.high is not None
    ]
    if len(known) > 1:
        edge = [(x, high) for x, _, high in known] + [(x, low) for x, low, _ in reversed(known)]
        corners = " ".join(f"{_n(at_x(x))},{_n(at_y(y))}" for x, y in edge)
        parts.append(f'<polygon class="band" points="{corners}"/>')
    if len(points) > 1:
        parts.append(_path(points, at_x, at_y, "main"))
    for point in points:
        interval = (
            "" if point.low is None or point.high is None else f" (95 % {point.low:.3f} to {point.high:.3f})"
        )
        if point.low is not None and point.high is not None:
            parts.append(_line(at_x(point.x), at_y(point.low), at_x(point.x), at_y(point.high), "whisker"))
        parts.append(
            f'<circle class="dot" cx="{_n(at_x(point.x))}" cy="{_n(at_y(point.y))}" r="2.6">'
            f"<title>{point.x:g}: {point.y:.3f}{interval}</title></circle>"
        )
    for point in published:
        mark = _rect(at_x(point.x) - 3.5, at_y(point.y) - 3.5, 7, 7, "theirs")
        parts.append(f"<g><title>published at {point.x:g}: {point.y:.3f}</title>{mark}</g>")
    return _svg(left + width + right, base + 22, label, parts)


def trace(points: Sequence[Point], *, label: str, marks: Sequence[float] = ()) -> Markup:
    """A line through many measurements, such as a loss by step.

    Args:
        points: by x, at least two.
        label: what it shows, for those who cannot see it.
        marks: positions on the x axis that are drawn as dashed lines.
    """
    left, right, above, height, width = 44, 12, 8, 120, 280
    base = above + height
    first, span = points[0].x, (points[-1].x - points[0].x) or 1.0
    values = [point.y for point in points]
    bottom = min(0.0, min(values))
    top = max(nice_top(max(values)), bottom + 1e-9)

    def at_x(value: float) -> float:
        return left + width * (value - first) / span

    def at_y(value: float) -> float:
        return base - height * (value - bottom) / (top - bottom)

    parts = []
    for tick in (bottom, (bottom + top) / 2, top):
        parts.append(_line(left, at_y(tick), left + width, at_y(tick), "grid"))
        parts.append(_text(left - 6, at_y(tick) + 4, f"{tick:.3g}", "end"))
    for x, anchor in ((first, "start"), (points[-1].x, "end")):
        parts.append(_text(at_x(x), base + 16, f"{x:g}", anchor))
    for mark in marks:
        if first < mark < points[-1].x:
            parts.append(_line(at_x(mark), above, at_x(mark), base, "reference"))
    # More points than pixels would only make the page large.
    every = max(1, len(points) // (2 * width))
    parts.append(_path(points[::every], at_x, at_y, "main"))
    return _svg(left + width + right, base + 22, label, parts)


def matrix_picture(shares: NDArray[np.float64], label: str) -> Markup:
    """A confusion matrix of many classes: one pixel for each pair, ids along both sides.

    Args:
        shares: (C, C + 1) in [0, 1], row true class, column predicted class, the last one "no class".
        label: what it shows, for those who cannot see it.
    """
    rows, columns = shares.shape
    pixels = np.zeros((rows, columns, 4), np.uint8)
    pixels[..., :3] = _HEAT
    pixels[..., 3] = np.rint(255 * heat(shares))
    left, top, side = 30, 20, 310
    cell = side / columns
    tall = cell * rows
    parts = [
        f'<image href="{png_uri(pixels)}" x="{left}" y="{top}" width="{side}" height="{_n(tall)}" '
        'preserveAspectRatio="none" style="image-rendering:pixelated"/>',
        f'<rect class="frame" x="{left}" y="{top}" width="{side}" height="{_n(tall)}"/>',
    ]
    for index in range(0, rows, int(nice_top(rows / 9))):
        parts.append(_text(left - 5, top + (index + 0.5) * cell + 4, str(index), "end"))
        parts.append(_text(left + (index + 0.5) * cell, top - 6, str(index), "middle"))
    return _svg(left + side + 6, math.ceil(top + tall + 4), label, parts)


def heat(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Strength of colour in [0, 1]: the square root, so that a few per cent of confusion can be seen."""
    return np.sqrt(np.clip(shares, 0, 1))


def png_uri(pixels: NDArray[np.uint8]) -> str:
    """An image (H, W, 3 or 4) as a data URI, without loss."""
    return _uri("png", _encode(pixels, "PNG"))


def picture_uri(image: NDArray[np.uint8], *, longest: int) -> tuple[str, int, int]:
    """An RGB image as a data URI, JPEG or PNG, whichever is smaller.

    Args:
        image: uint8 (H, W, 3).
        longest: long side at most, pixels; smaller ones are not enlarged.

    Returns:
        The URI, width and height.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    jpeg, png = _encode(pixels, "JPEG"), _encode(pixels, "PNG")
    uri = _uri("png", png) if len(png) <= len(jpeg) else _uri("jpeg", jpeg)
    return uri, picture.width, picture.height


def _encode(pixels: NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    settings = {"quality": 82, "subsampling": 0} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(buffer, kind, optimize=True, **settings)
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


# --- SVG ---


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}"/>'


def _rect(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect class="{style}" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}"/>'


def _text(x: float, y: float, text: str, anchor: str, *, turn: bool = False) -> str:
    turned = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if turn else ""
    return f'<text x="{_n(x)}" y="{_n(y)}" text-anchor="{anchor}"{turned}>{escape(text)}</text>'


def _path(points: Sequence[Point], at_x: Scale, at_y: Scale, style: str) -> str:
    steps = " ".join(f"{_n(at_x(point.x))},{_n(at_y(point.y))}" for point in points)
    return f'<polyline class="{style}" points="{steps}"/>'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> Markup:
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_n(width)} {_n(height)}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
