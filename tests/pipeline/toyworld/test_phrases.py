from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.toyworld.phrases import COLOUR_WORDS, COMPOSITIONS, PATTERN_WORDS, auc, phrase_cells
from pipeline.toyworld.scenes import CLASSES, generate


def test_no_caption_holds_a_composition_but_each_of_its_words_occurs() -> None:
    captions = " | ".join(generate(0, 1500, 32).captions)
    for phrase in COMPOSITIONS:
        adjectives = phrase.removeprefix("a ").removesuffix(" thing")
        assert adjectives not in captions
        for word in adjectives.split():
            assert word in captions, word


def test_cells_are_those_of_the_class_and_the_hue() -> None:
    made = generate(3, 60, 128)
    cells = phrase_cells(made.images, made.labels, 8)
    assert set(cells) == {*PATTERN_WORDS, *COLOUR_WORDS, *COMPOSITIONS}
    for phrase, found in cells.items():
        assert found.shape == (60, 16, 16) and found.any(), phrase
    centres = made.labels[:, 4::8, 4::8]
    for phrase, name in PATTERN_WORDS.items():
        assert (cells[phrase] == (centres == CLASSES.index(name))).all()
    for phrase, (name, _) in COMPOSITIONS.items():
        assert (centres[cells[phrase]] == CLASSES.index(name)).all()
    # Brute force for one colour: mean of each cell, its hue by the standard library.
    import colorsys

    blue = cells["something blue"][0]
    for row in range(16):
        for column in range(16):
            patch = made.images[0, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].reshape(-1, 3)
            hue, saturation, _ = colorsys.rgb_to_hsv(*(patch.mean(0) / 255))
            if abs(hue * 360 - 190) > 3 and abs(hue * 360 - 240) > 3 and abs(saturation - 0.4) > 0.02:
                assert blue[row, column] == (190 <= hue * 360 <= 240 and saturation > 0.4)


def test_auc_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(500) < 0.3
    scores = rng.random(500) + 0.2 * truth
    assert auc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    tied = np.round(scores, 1)
    assert auc(tied, truth) == pytest.approx(roc_auc_score(truth, tied))
    assert np.isnan(auc(scores, np.zeros(500, bool)))
