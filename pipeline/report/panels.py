"""Panels: a photograph beside what is true, what is predicted, and how sure each prompt is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.report.sheet import colorize, overlay

_GAP = 6


def panel(
    image: np.ndarray, truth: np.ndarray, labels: np.ndarray, palette: np.ndarray, *, side: int = 320
) -> Image.Image:
    """Photograph, true classes over it, predicted classes over it.

    Args:
        image: uint8 (H, W, 3).
        truth: integer (H, W); ids without a colour are grey.
        labels: integer (H, W).
        palette: uint8 (C, 3).
        side: longest side of each picture in pixels.

    Returns:
        RGB, the three pictures in a row on white.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    pictures = [image, _over(image, truth, palette), _over(image, labels, palette)]
    smooth = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST
    row = Image.new("RGB", (3 * size[0] + 2 * _GAP, size[1]), "white")
    for column, picture in enumerate(pictures):
        row.paste(Image.fromarray(picture).resize(size, smooth), (column * (size[0] + _GAP), 0))
    return row


def _over(image: np.ndarray, labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    known = (labels < len(palette))[..., None]
    mixed = overlay(grey, labels, palette, opacity=0.7)
    return np.where(known, mixed, colorize(labels, palette)).astype(np.uint8)


def prompt_panel(
    image: np.ndarray,
    labels: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    names: Sequence[str],
    palette: np.ndarray,
    side: int = 240,
    columns: int = 4,
) -> Image.Image:
    """Photograph, prediction, and one confidence map for each prompt, each with its words above.

    Args:
        image: uint8 (H, W, 3).
        labels: integer (H, W).
        maps: float (h, w) in [0, 1] by prompt, at any size.
        names: class names, for the legend; those that occur in ``labels`` are shown.
        palette: uint8 (C, 3).
        side: longest side of each picture in pixels.
        columns: pictures in a row.
    """
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    found = [(int(i), int(count)) for i, count in enumerate(np.bincount(labels.ravel())) if count]
    legend = [index for index, _ in sorted(found, key=lambda pair: -pair[1]) if index < len(names)]
    cells = [("image", image), ("prediction", _over(image, labels, palette))]
    cells += [(prompt, _heat(image, values)) for prompt, values in maps.items()]
    rows = -(-len(cells) // columns)
    text = ImageFont.load_default(14)
    line = 22
    sheet = Image.new(
        "RGB",
        (columns * (size[0] + _GAP) - _GAP, rows * (size[1] + line + _GAP) + line),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for position, (title, picture) in enumerate(cells):
        left, top = (
            (position % columns) * (size[0] + _GAP),
            (position // columns) * (size[1] + line + _GAP),
        )
        draw.text((left, top + 2), _fitted(title, size[0], text), (28, 30, 33), font=text)
        resized = Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS)
        sheet.paste(resized, (left, top + line))
    left = 0
    for index in legend:
        needed = int(text.getlength(names[index])) + 34
        if left + needed > sheet.width:
            break
        draw.rectangle(
            (left, sheet.height - 18, left + 13, sheet.height - 5), fill=tuple(palette[index].tolist())
        )
        draw.text((left + 18, sheet.height - 20), names[index], (28, 30, 33), font=text)
        left += needed
    return sheet


def _fitted(text: str, width: int, font: Any) -> str:
    while text and font.getlength(text) > width:
        text = text[:-2].rstrip("…") + "…"
    return text


def _heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A confidence map in the colours of viridis, with the grey photograph shining through."""
    import matplotlib

    height, width = image.shape[:2]
    scaled = Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BILINEAR
    )
    colours = matplotlib.colormaps["viridis"](np.asarray(scaled))[..., :3] * 255
    grey = np.repeat(image.mean(2, keepdims=True), 3, axis=2)
    return (0.25 * grey + 0.75 * colours).round().astype(np.uint8)
