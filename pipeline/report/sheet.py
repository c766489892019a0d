"""A contact sheet: pictures and label maps side by side with a legend, as one image file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GAP, _MARGIN, _LINE = 10, 24, 26
_INK, _PAPER, _IGNORED = (28, 30, 33), (255, 255, 255), (226, 228, 231)


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Paint a label map.

    Args:
        labels: integer (H, W); ids without a colour (``ignore_index``) become light grey.
        palette: uint8 (C, 3) sRGB.

    Returns:
        uint8 (H, W, 3).
    """
    known = labels < len(palette)
    painted = palette[np.where(known, labels, 0)]
    painted[~known] = _IGNORED
    return painted.astype(np.uint8)


def overlay(
    image: np.ndarray, labels: np.ndarray, palette: np.ndarray, *, opacity: float = 0.55
) -> np.ndarray:
    """Lay a label map over its image.

    Args:
        image: uint8 (H, W, 3) sRGB.
        labels: integer (H, W).
        palette: uint8 (C, 3).
        opacity: of the labels, in [0, 1].

    Returns:
        uint8 (H, W, 3).
    """
    mixed = (1 - opacity) * image + opacity * colorize(labels, palette)
    return mixed.round().astype(np.uint8)


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    names: Sequence[str],
    palette: np.ndarray,
    cell: int = 192,
    caption: str = "",
) -> Image.Image:
    """Arrange pictures in rows with a heading each, and a legend below.

    Args:
        rows: (heading, pictures uint8 (H, W, 3)); pictures are scaled to ``cell`` pixels without smoothing.
        names: class names, in the order of the palette.
        palette: uint8 (C, 3).
        cell: side of a picture on the sheet in pixels.
        caption: a line at the foot.
    """
    columns = max(len(pictures) for _, pictures in rows)
    width = 2 * _MARGIN + columns * cell + (columns - 1) * _GAP
    heading, text = ImageFont.load_default(17), ImageFont.load_default(15)
    legend = _legend_positions(names, width, text)
    legend_lines = legend[-1][1] + 1 if legend else 0
    height = 2 * _MARGIN + len(rows) * (cell + _LINE + _GAP) + _LINE * (legend_lines + bool(caption))
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for title, pictures in rows:
        draw.text((_MARGIN, top), title, _INK, font=heading)
        top += _LINE
        for column, picture in enumerate(pictures):
            scaled = Image.fromarray(picture).resize((cell, cell), Image.Resampling.NEAREST)
            sheet.paste(scaled, (_MARGIN + column * (cell + _GAP), top))
        top += cell + _GAP
    for (left, line), name, color in zip(legend, names, palette.tolist(), strict=False):
        y = top + line * _LINE + 4
        draw.rounded_rectangle((left, y, left + 16, y + 16), 3, fill=tuple(color))
        draw.text((left + 23, y - 1), name, _INK, font=text)
    if caption:
        draw.text((_MARGIN, top + legend_lines * _LINE + 4), caption, (110, 114, 120), font=text)
    return sheet


def _legend_positions(
    names: Sequence[str], width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[tuple[int, int]]:
    """(left in pixels, line) of every entry, wrapped to the width."""
    positions, left, line = [], _MARGIN, 0
    for name in names:
        needed = int(font.getlength(name)) + 46
        if left + needed > width - _MARGIN and left > _MARGIN:
            left, line = _MARGIN, line + 1
        positions.append((left, line))
        left += needed
    return positions
