from __future__ import annotations

import numpy as np
import pytest

from pipeline.report.sheet import colorize, contact_sheet, overlay

PALETTE = np.array([[10, 20, 30], [200, 100, 0]], np.uint8)


def test_colours_follow_the_palette_and_ignored_pixels_are_grey() -> None:
    painted = colorize(np.array([[0, 1, 255]], np.uint8), PALETTE)
    assert painted.tolist() == [[[10, 20, 30], [200, 100, 0], [226, 228, 231]]]


@pytest.mark.parametrize(
    ("opacity", "expected"), [(0.0, [50, 50, 50]), (1.0, [200, 100, 0]), (0.5, [125, 75, 25])]
)
def test_overlay_mixes(opacity: float, expected: list[int]) -> None:
    image = np.full((1, 1, 3), 50, np.uint8)
    assert overlay(image, np.ones((1, 1), np.uint8), PALETTE, opacity=opacity)[0, 0].tolist() == expected


def test_sheet_holds_every_picture_and_colour() -> None:
    reds = [np.full((4, 4, 3), (255, level, 0), np.uint8) for level in (0, 50, 100)]
    blues = [np.full((4, 4, 3), (0, level, 255), np.uint8) for level in (0, 50)]
    sheet = np.asarray(
        contact_sheet(
            [("reds", reds), ("blues", blues)], names=["a", "b"], palette=PALETTE, cell=40, caption="foot"
        )
    )
    for picture in (*reds, *blues):
        assert (sheet == picture[0, 0]).all(-1).sum() == 40 * 40
    for color in PALETTE:
        assert (sheet == color).all(-1).sum() > 200


def test_a_long_legend_wraps_onto_the_sheet() -> None:
    names = [f"class number {index}" for index in range(40)]
    palette = np.stack([np.arange(40), np.full(40, 99), np.full(40, 7)], 1).astype(np.uint8)
    sheet = np.asarray(
        contact_sheet([("x", [np.zeros((4, 4, 3), np.uint8)] * 2)], names=names, palette=palette)
    )
    for color in palette:
        assert (sheet == color).all(-1).any()
