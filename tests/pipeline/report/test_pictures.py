from __future__ import annotations

import numpy as np
import pytest

from pipeline.report.pictures import (
    Found,
    colorize,
    contact_sheet,
    heat_map,
    overlay,
    overlay_borders,
    overview,
    panel,
    prompt_panel,
)

RED_BLUE = np.array([[200, 0, 0], [0, 0, 200]], np.uint8)
PALETTE = np.array([[10, 20, 30], [200, 100, 0]], np.uint8)


def test_colours_follow_the_palette_and_ignored_pixels_are_grey() -> None:
    painted = colorize(np.array([[0, 1, 255]], np.uint8), PALETTE)
    assert painted.tolist() == [[[10, 20, 30], [200, 100, 0], [226, 228, 231]]]


@pytest.mark.parametrize(
    ("opacity", "expected"), [(0.0, [50, 50, 50]), (1.0, [200, 100, 0]), (0.5, [125, 75, 25])]
)
def test_an_overlay_mixes_colours_with_the_grey_photograph(opacity: float, expected: list[int]) -> None:
    image = np.full((1, 2, 3), (20, 50, 80), np.uint8)
    mixed = overlay(image, np.array([[1, 255]]), PALETTE, opacity=opacity)
    assert mixed[0].tolist() == [expected, [226, 228, 231]]


def test_borders_are_light_and_unlabelled_pixels_are_dim() -> None:
    labels = np.array([[1, 1, 255]], np.uint8)
    image = np.full((1, 3, 3), 100, np.uint8)
    assert overlay_borders(labels, image, PALETTE)[0].tolist() == [
        [162, 100, 38],
        [162, 100, 38],
        [202, 202, 202],
    ]
    assert overlay_borders(labels, None, PALETTE)[0, 0].tolist() == [200, 100, 0]


def test_a_heat_map_keeps_the_numbers_in_its_pixels() -> None:
    level = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = heat_map(level)
    assert (np.asarray(picture) == level).all()
    dark, bright = np.asarray(picture.convert("RGB")).reshape(-1, 3)[[0, 255]].tolist()
    assert dark == [68, 1, 84] and bright == [253, 231, 37]


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


def test_a_panel_shows_photograph_truth_and_prediction() -> None:
    image = np.full((40, 80, 3), 120, np.uint8)
    truth = np.zeros((40, 80), np.uint8)
    labels = np.ones((40, 80), np.uint8)
    labels[:, 40:] = 255
    shown = np.asarray(panel(image, truth, labels, RED_BLUE, side=80))
    assert shown.shape == (40, 3 * 80 + 12, 3)
    assert (shown[20, 40] == 120).all()
    red, blue, ignored = shown[20, 86 + 40], shown[20, 172 + 20], shown[20, 172 + 60]
    assert red[0] > red[2] + 80 and blue[2] > blue[0] + 80
    assert ignored.min() > 200  # light grey: no class


def test_a_panel_of_prompts_has_a_map_for_each() -> None:
    image = np.full((30, 60, 3), 120, np.uint8)
    labels = np.zeros((30, 60), np.uint8)
    maps = {"sure": np.ones((3, 6)), "a prompt far too long to stand above its picture": np.zeros((3, 6))}
    shown = prompt_panel(image, labels, maps, names=("a", "b"), palette=RED_BLUE, side=60, columns=2)
    pixels = np.asarray(shown).astype(int)
    sure, unsure = pixels[50 + 22 + 20, 30], pixels[50 + 22 + 20, 66 + 30]
    assert sure[:2].min() > 150 > sure[2] and unsure[2] > unsure[1]  # yellow and violet of viridis


def test_a_sheet_keeps_the_shapes_of_pictures() -> None:
    wide = np.full((4, 8, 3), (255, 0, 9), np.uint8)
    sheet = np.asarray(contact_sheet([("wide", [wide])], names=["a"], palette=PALETTE[:1], cell=40))
    assert (sheet == wide[0, 0]).all(-1).sum() == 40 * 20


def test_the_caption_of_an_upright_picture_is_whole() -> None:
    image, mask = np.full((300, 60, 3), 120, np.uint8), np.zeros((300, 60), bool)

    def height(caption: str) -> int:
        return overview("a.png", image, [Found("zebra", image[..., 0], mask, caption)]).height

    assert height("75.4 % at p >= 0.3, highest 0.99") > height("75.4 %")
