"""What prompts found in a photograph, as pictures: heat map, overlay, and a sheet of all prompts.

Probabilities are shown on one scale from 0 to 1 everywhere: a prompt whose object is absent stays dark.

Shapes: H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]

_GAP, _LINE, _MARGIN = 10, 22, 14
_INK, _FAINT, _PAPER = (28, 30, 33), (104, 108, 114), (255, 255, 255)
_FOUND = (255, 64, 48)
_DIM = 0.45


@dataclass(frozen=True, eq=False)
class Found:
    """A prompt's answer, at the size of the sheet's cells or larger.

    Attributes:
        title: what was asked.
        probability: uint8 (H, W), round(255 p).
        mask: bool (H, W).
        caption: a line of figures.
        example: uint8 (S, S, 3), what CLIP was shown, for a prompt with a picture.
    """

    title: str
    probability: Pixels
    mask: NDArray[np.bool_]
    caption: str
    example: Pixels | None = None


def heat_map(probability: Pixels) -> Image.Image:
    """A picture that is also data: pixel values are round(255 p), the palette shows them in viridis.

    Args:
        probability: uint8 (H, W), round(255 p).
    """
    picture = Image.fromarray(probability).convert("L")
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette(_viridis().tobytes())
    return picture


def overlay_mask(image: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The object in its own colours with a red contour, everything else grey and dim.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W).

    Returns:
        uint8 (H, W, 3).
    """
    grey = _DIM * image.mean(axis=2, dtype=np.float32, keepdims=True) + 30
    out = np.where(mask[..., None], image, grey).astype(np.uint8)
    width = max(1, round(max(mask.shape) / 300))
    out[mask & ~_eroded(mask, width)] = _FOUND
    return out


def overview(
    name: str, image: Pixels, found: Sequence[Found], *, side: int = 300, columns: int = 4
) -> Image.Image:
    """The photograph, then a cell for each prompt: its words, the overlay, the heat map, its figures.

    Args:
        name: of the photograph.
        image: uint8 (H, W, 3) RGB.
        found: the prompts, in order; pictures of the image's shape.
        side: longest side of each picture in pixels; smaller photographs are enlarged to it.
        columns: cells in a row at most.
    """
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(length * scale)) for length in image.shape[:2])
    bold, text = ImageFont.load_default(15), ImageFont.load_default(12)
    cell_width = max(width, 170)  # room for words beside upright photographs
    titles = [_wrapped(name, cell_width, bold), *(_wrapped(one.title, cell_width, bold) for one in found)]
    head = 4 + 18 * max(len(lines) for lines in titles)
    cell_height = head + 2 * height + 4 + _LINE
    rows = -(-len(titles) // columns)
    columns = -(-len(titles) // rows)  # rows of one length, as far as that goes
    sheet = Image.new(
        "RGB",
        (
            2 * _MARGIN + columns * cell_width + (columns - 1) * _GAP,
            2 * _MARGIN + rows * cell_height + (rows - 1) * _GAP,
        ),
        _PAPER,
    )
    draw = ImageDraw.Draw(sheet)
    small = _scaled(image, (width, height))
    for index, lines in enumerate(titles):
        row, column = divmod(index, columns)
        left, top = _MARGIN + column * (cell_width + _GAP), _MARGIN + row * (cell_height + _GAP)
        for line, words in enumerate(lines):
            draw.text((left, top + 18 * line), words, _INK, font=bold)
        top += head
        below = top + height + 4
        if index == 0:
            sheet.paste(small, (left, top))
            _draw_scale(sheet, draw, (left, below + 20), min(width, 220), text)
            continue
        one = found[index - 1]
        # Painted at the size of the cell, so that contours stay visible however large the photograph is.
        mask = Image.fromarray(one.mask).resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(Image.fromarray(overlay_mask(np.asarray(small), np.asarray(mask))), (left, top))
        heat = np.asarray(_scaled(one.probability, (width, height)))
        sheet.paste(Image.fromarray(_viridis()[heat]), (left, below))
        if one.example is not None:
            _inset(sheet, one.example, (left + width, below), min(height, width) // 3)
        draw.text((left, below + height + 3), _wrapped(one.caption, cell_width, text)[0], _FAINT, font=text)
    return sheet


def _inset(sheet: Image.Image, example: Pixels, corner: tuple[int, int], side: int) -> None:
    """The example in the upper right corner of a picture, in a white frame."""
    side = max(side, 24)
    picture = Image.new("RGB", (side, side), _PAPER)
    picture.paste(_scaled(example, (side - 4, side - 4)), (2, 2))
    sheet.paste(picture, (corner[0] - side, corner[1]))


def _draw_scale(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    width: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """What the colours of the heat maps mean."""
    left, top = corner
    bar = np.repeat(_viridis()[np.linspace(0, 255, width).astype(np.uint8)][None], 10, axis=0)
    draw.text((left, top - 16), "probability", _FAINT, font=font)
    sheet.paste(Image.fromarray(bar), (left, top))
    for value, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        draw.text((left + value * (width - 1), top + 13), f"{value:g}", _FAINT, font=font, anchor=anchor)


def _scaled(picture: Pixels, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR, reducing_gap=3.0)


def _wrapped(
    text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, most: int = 2
) -> list[str]:
    """Lines that fit a width; what is beyond the last one becomes an ellipsis."""
    lines: list[str] = []
    left = text.split()
    while left and len(lines) < most:
        taken = 1
        while taken < len(left) and font.getlength(" ".join(left[: taken + 1])) <= width:
            taken += 1
        lines.append(" ".join(left[:taken]))
        left = left[taken:]
    if left:
        lines[-1] += " …"
    return [_fitted(line, width, font) for line in lines] or [""]


def _fitted(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


def _eroded(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    import cv2

    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    eroded = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    return np.asarray(eroded, np.bool_)


@cache
def _viridis() -> Pixels:
    """uint8 (256, 3)."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.arange(256))[:, :3]
    return np.asarray((colours * 255).round(), np.uint8)
