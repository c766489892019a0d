"""Overlays of label maps, heat maps, contact sheets, and data URIs.

Heat maps always use the scale from 0 to 1, so that a prompt whose object is absent stays dark.

Shapes: H W pixels, C classes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Pixels = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_INK, _FAINT, _PAPER = (28, 30, 33), (104, 108, 114), (255, 255, 255)
_UNLABELLED = (226, 228, 231)
_CONTOUR = (255, 64, 48)
_GAP, _MARGIN, _LINE = 6, 14, 22
_JPEG = {"quality": 82, "subsampling": 0, "optimize": True}


# --- colours ---


def colorize(labels: NDArray[Any], palette: Pixels) -> Pixels:
    """Colour a label map.

    Args:
        labels: integer (H, W); ids without a colour (``ignore_index``) become light grey.
        palette: uint8 (C, 3) sRGB.

    Returns:
        uint8 (H, W, 3).
    """
    known = labels < len(palette)
    painted = palette[np.where(known, labels, 0)]
    painted[~known] = _UNLABELLED
    return painted.astype(np.uint8)


def overlay(image: Pixels, labels: NDArray[Any], palette: Pixels, *, opacity: float = 0.7) -> Pixels:
    """Class colours over the photograph in grey; pixels without a class are light grey.

    Args:
        image: uint8 (H, W, 3).
        labels: integer (H, W).
        palette: uint8 (C, 3).
        opacity: of the colours, in [0, 1].

    Returns:
        uint8 (H, W, 3).
    """
    colors = colorize(labels, palette)
    mixed = opacity * colors + (1 - opacity) * image.mean(2, keepdims=True)
    return np.where((labels < len(palette))[..., None], mixed.round(), colors).astype(np.uint8)


def overlay_borders(labels: NDArray[Any], image: Pixels | None, palette: Pixels) -> Pixels:
    """Like ``overlay``, with borders between classes; pixels without a class show the dimmed photograph.

    Args:
        labels: integer (H, W).
        image: uint8 (H, W, 3), or None if it cannot be read.
        palette: uint8 (C, 3).
    """
    known = labels < len(palette)
    colors = np.full((*labels.shape, 3), 96, np.float32)
    colors[known] = palette[labels[known]]
    if image is not None:
        grey = image.mean(axis=2, dtype=np.float32, keepdims=True)
        # Hue from the label, brightness from the photograph, so that both are legible.
        colors = np.where(known[..., None], 0.62 * colors + 0.38 * grey, 0.45 * grey)
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    colors[edge] = 0.25 * colors[edge] + 0.75 * 255
    return np.clip(np.rint(colors), 0, 255).astype(np.uint8)


def overlay_mask(image: Pixels, mask: NDArray[np.bool_]) -> Pixels:
    """The object in its own colours with a red contour; the rest is grey and dim.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W).

    Returns:
        uint8 (H, W, 3).
    """
    import cv2

    grey = 0.45 * image.mean(axis=2, dtype=np.float32, keepdims=True) + 30
    out = np.where(mask[..., None], image, grey).astype(np.uint8)
    width = max(1, round(max(mask.shape) / 300))
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    inside = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=1)
    out[mask & ~inside.astype(bool)] = _CONTOUR
    return out


@cache
def viridis() -> Pixels:
    """The colour map of heat maps, uint8 (256, 3), from dark violet to yellow."""
    import matplotlib

    colours = matplotlib.colormaps["viridis"](np.arange(256))[:, :3]
    return np.asarray((colours * 255).round(), np.uint8)


def heat_map(probability: Pixels) -> Image.Image:
    """A heat map that keeps its data: pixel values are round(255 p), with viridis as the palette.

    Args:
        probability: uint8 (H, W), round(255 p).
    """
    picture = Image.frombytes("P", probability.shape[::-1], probability.tobytes())
    picture.putpalette(viridis().tobytes())
    return picture


def overlay_heat(image: Pixels, values: NDArray[Any]) -> Pixels:
    """A heat map over the photograph in grey.

    Args:
        image: uint8 (H, W, 3).
        values: float (h, w) in [0, 1], of any size.
    """
    level = Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8))
    level = level.resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    mixed = 0.25 * image.mean(2, keepdims=True) + 0.75 * viridis()[np.asarray(level)]
    return mixed.round().astype(np.uint8)


# --- sheets ---


def panel(
    image: Pixels, truth: NDArray[Any], labels: NDArray[Any], palette: Pixels, *, side: int = 320
) -> Image.Image:
    """Photograph, overlay of true classes and overlay of predicted classes, in a row.

    Args:
        image: uint8 (H, W, 3).
        truth: integer (H, W); ids without a colour are grey.
        labels: integer (H, W).
        palette: uint8 (C, 3).
        side: longest side of each picture in pixels.
    """
    pictures = [image, overlay(image, truth, palette), overlay(image, labels, palette)]
    return tile([_sized(picture, side) for picture in pictures], columns=3)


def prompt_panel(
    image: Pixels,
    labels: NDArray[Any],
    maps: Mapping[str, NDArray[Any]],
    *,
    names: Sequence[str],
    palette: Pixels,
    side: int = 240,
    columns: int = 4,
) -> Image.Image:
    """Photograph, prediction, and one confidence map per prompt, each with a title.

    Args:
        image: uint8 (H, W, 3).
        labels: integer (H, W).
        maps: float (h, w) in [0, 1] by prompt, of any size.
        names: class names; the legend shows those present in ``labels``.
        palette: uint8 (C, 3).
        side: longest side of each picture in pixels.
        columns: pictures in a row.
    """
    cells = [("image", image), ("prediction", overlay(image, labels, palette))]
    cells += [(prompt, overlay_heat(image, values)) for prompt, values in maps.items()]
    sheet = tile([_titled(title, _sized(picture, side)) for title, picture in cells], columns=columns)
    counts = np.bincount(labels.ravel(), minlength=len(names))[: len(names)]
    found = [index for index in np.argsort(-counts, kind="stable").tolist() if counts[index]]
    return _stacked([sheet, legend([names[i] for i in found], palette[found], sheet.width)])


def contact_sheet(
    rows: Sequence[tuple[str, Sequence[Pixels]]],
    *,
    names: Sequence[str],
    palette: Pixels,
    cell: int = 192,
    caption: str = "",
) -> Image.Image:
    """Arrange pictures in rows with headings, and a legend below.

    Args:
        rows: (heading, pictures uint8 (H, W, 3)); their long side is scaled to ``cell`` pixels (nearest).
        names: class names, in the order of the palette.
        palette: uint8 (C, 3).
        cell: long side of a picture on the sheet in pixels.
        caption: a line at the bottom.
    """
    parts = []
    for heading, pictures in rows:
        scaled = [_sized(picture, cell, Image.Resampling.NEAREST) for picture in pictures]
        parts.append(_titled(heading, tile(scaled, columns=len(scaled) or 1), 17))
    width = max((part.width for part in parts), default=cell)
    parts.append(legend(names, palette, width))
    if caption:
        parts.append(_line(caption, width, 15, _FAINT))
    return _stacked(parts, margin=_MARGIN)


@dataclass(frozen=True, eq=False)
class Found:
    """The result of a prompt, at the size of the sheet's cells or larger.

    Attributes:
        title: the prompt.
        probability: uint8 (H, W), round(255 p).
        mask: bool (H, W).
        caption: a line of statistics.
        example: uint8 (S, S, 3), the visual prompt, if any.
    """

    title: str
    probability: Pixels
    mask: NDArray[np.bool_]
    caption: str
    example: Pixels | None = None


def overview(
    name: str, image: Pixels, found: Sequence[Found], *, side: int = 300, columns: int = 4
) -> Image.Image:
    """The photograph, then a cell per prompt with title, overlay, heat map and caption.

    Args:
        name: name of the photograph.
        image: uint8 (H, W, 3) RGB.
        found: the results, in order, at the image's shape.
        side: longest side of each picture in pixels; smaller photographs are enlarged to it.
        columns: maximum number of cells per row.
    """
    bold, text = ImageFont.load_default(15), ImageFont.load_default(12)
    small = _sized(image, side, Image.Resampling.BILINEAR)
    width, height = small.size
    cell_width = max(width, 170)  # room for text under upright photographs
    titles = [_wrapped(title, cell_width, bold) for title in (name, *(one.title for one in found))]
    captions = [_wrapped(one.caption, cell_width, text) for one in found]
    head, foot = 4 + 18 * max(map(len, titles)), _LINE + 15 * (max(map(len, captions), default=1) - 1)
    cells = []
    for index, lines in enumerate(titles):
        cell = Image.new("RGB", (cell_width, head + 2 * height + 4 + foot), _PAPER)
        draw = ImageDraw.Draw(cell)
        draw.text((0, 0), "\n".join(lines), _INK, font=bold, spacing=3)
        below = head + height + 4
        if index == 0:
            cell.paste(small, (0, head))
            _draw_scale(cell, draw, below + 20, min(width, 220), text)
        else:
            one = found[index - 1]
            # Painted at cell size, so that contours stay visible for large photographs.
            mask = Image.fromarray(one.mask).resize((width, height), Image.Resampling.NEAREST)
            cell.paste(Image.fromarray(overlay_mask(np.asarray(small), np.asarray(mask))), (0, head))
            heat = _sized(one.probability, side, Image.Resampling.BILINEAR)
            cell.paste(Image.fromarray(viridis()[np.asarray(heat)]), (0, below))
            if one.example is not None:
                _inset(cell, one.example, (width, below), min(height, width) // 3)
            draw.text((0, below + height + 3), "\n".join(captions[index - 1]), _FAINT, font=text, spacing=3)
        cells.append(cell)
    rows = -(-len(cells) // columns)
    return _stacked([tile(cells, columns=-(-len(cells) // rows), gap=10)], margin=_MARGIN)


def tile(pictures: Sequence[Image.Image], *, columns: int, gap: int = _GAP) -> Image.Image:
    """Pictures in rows on white, each at the upper left of a cell of the largest picture's size."""
    width = max((picture.width for picture in pictures), default=1)
    height = max((picture.height for picture in pictures), default=1)
    columns = max(1, min(columns, len(pictures)))
    rows = max(1, -(-len(pictures) // columns))
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), _PAPER)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture, (column * (width + gap), row * (height + gap)))
    return sheet


def legend(names: Sequence[str], palette: Pixels, width: int) -> Image.Image:
    """Colours and class names, wrapped to the width."""
    text = ImageFont.load_default(15)
    places, left, line = [], 0, 0
    for name in names:
        needed = int(text.getlength(name)) + 46
        if left and left + needed > width:
            left, line = 0, line + 1
        places.append((left, line))
        left += needed
    sheet = Image.new("RGB", (width, _LINE * (line + 1)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for (left, line), name, color in zip(places, names, palette.tolist(), strict=True):
        corners = (left, line * _LINE + 3, left + 16, line * _LINE + 19)
        draw.rounded_rectangle(corners, 3, fill=tuple(color), outline=_FAINT)
        draw.text((left + 23, line * _LINE + 2), name, _INK, font=text)
    return sheet


def _stacked(parts: Sequence[Image.Image], *, margin: int = 0) -> Image.Image:
    """Pictures stacked vertically, within a margin."""
    width = max(part.width for part in parts)
    height = sum(part.height + _GAP for part in parts) - _GAP
    sheet = Image.new("RGB", (width + 2 * margin, height + 2 * margin), _PAPER)
    top = margin
    for part in parts:
        sheet.paste(part, (margin, top))
        top += part.height + _GAP
    return sheet


def _titled(title: str, picture: Image.Image, size: int = 14) -> Image.Image:
    sheet = Image.new("RGB", (picture.width, picture.height + _LINE), _PAPER)
    sheet.paste(_line(title, picture.width, size, _INK), (0, 0))
    sheet.paste(picture, (0, _LINE))
    return sheet


def _line(text: str, width: int, size: int, color: tuple[int, int, int]) -> Image.Image:
    sheet = Image.new("RGB", (width, _LINE), _PAPER)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(sheet).text((0, 1), _fitted(text, width, font), color, font=font)
    return sheet


def _sized(picture: Pixels, side: int, method: Image.Resampling | None = None) -> Image.Image:
    """Scale a picture to longest side ``side``; enlarges by nearest neighbour unless a method is given."""
    scale = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    if method is None:
        method = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    return Image.fromarray(picture).resize(size, method, reducing_gap=3.0)


def _inset(sheet: Image.Image, example: Pixels, corner: tuple[int, int], side: int) -> None:
    """Paste the example into the upper right corner of a picture, in a white frame."""
    side = max(side, 24)
    picture = Image.new("RGB", (side, side), _PAPER)
    picture.paste(Image.fromarray(example).resize((side - 4, side - 4), Image.Resampling.BILINEAR), (2, 2))
    sheet.paste(picture, (corner[0] - side, corner[1]))


def _draw_scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, top: int, width: int, font: Font) -> None:
    """Draw the colour scale of the heat maps."""
    bar = np.repeat(viridis()[np.linspace(0, 255, width).astype(np.uint8)][None], 10, axis=0)
    draw.text((0, top - 16), "probability", _FAINT, font=font)
    sheet.paste(Image.fromarray(bar), (0, top))
    for value, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        draw.text((value * (width - 1), top + 13), f"{value:g}", _FAINT, font=font, anchor=anchor)


def _wrapped(text: str, width: int, font: Font, most: int = 2) -> list[str]:
    """Wrap text to a width; an ellipsis replaces what does not fit."""
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


def _fitted(text: str, width: int, font: Font) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


# --- in a page ---


def jpeg_uri(pixels: Pixels) -> str:
    """An image (H, W, 3) as a data URI."""
    return _uri("jpeg", _encode(pixels, "JPEG"))


def picture_uri(image: Pixels, *, longest: int) -> tuple[str, int, int]:
    """An RGB image as a data URI, JPEG or PNG, whichever is smaller.

    Args:
        image: uint8 (H, W, 3).
        longest: maximum long side in pixels; smaller images are not enlarged.

    Returns:
        The URI, width and height.
    """
    picture = Image.fromarray(image)
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    jpeg, png = _encode(pixels, "JPEG"), _encode(pixels, "PNG")
    uri = _uri("png", png) if len(png) <= len(jpeg) else _uri("jpeg", jpeg)
    return uri, picture.width, picture.height


def _encode(pixels: Pixels, kind: str) -> bytes:
    buffer = io.BytesIO()
    settings: dict[str, Any] = _JPEG if kind == "JPEG" else {"optimize": True}
    Image.fromarray(pixels).save(buffer, kind, **settings)
    return buffer.getvalue()


def _uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
