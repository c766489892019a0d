from __future__ import annotations

import numpy as np

from pipeline.report.panels import panel, prompt_panel

PALETTE = np.array([[200, 0, 0], [0, 0, 200]], np.uint8)


def test_a_panel_shows_photograph_truth_and_prediction() -> None:
    image = np.full((40, 80, 3), 120, np.uint8)
    truth = np.zeros((40, 80), np.uint8)
    labels = np.ones((40, 80), np.uint8)
    labels[:, 40:] = 255
    shown = np.asarray(panel(image, truth, labels, PALETTE, side=80))
    assert shown.shape == (40, 3 * 80 + 12, 3)
    assert (shown[20, 40] == 120).all()
    red, blue, ignored = shown[20, 86 + 40], shown[20, 172 + 20], shown[20, 172 + 60]
    assert red[0] > red[2] + 80 and blue[2] > blue[0] + 80
    assert ignored.min() > 200  # light grey: no class


def test_a_panel_of_prompts_has_a_map_for_each() -> None:
    image = np.full((30, 60, 3), 120, np.uint8)
    labels = np.zeros((30, 60), np.uint8)
    maps = {"sure": np.ones((3, 6)), "a prompt far too long to stand above its picture": np.zeros((3, 6))}
    shown = prompt_panel(image, labels, maps, names=("a", "b"), palette=PALETTE, side=60, columns=2)
    pixels = np.asarray(shown).astype(int)
    sure, unsure = pixels[50 + 22 + 20, 30], pixels[50 + 22 + 20, 66 + 30]
    assert sure[:2].min() > 150 > sure[2] and unsure[2] > unsure[1]  # yellow and violet of viridis
