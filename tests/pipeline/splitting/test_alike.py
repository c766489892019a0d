from __future__ import annotations

import numpy as np
import pytest

from pipeline.splitting import alike
from pipeline.splitting.alike import cosine_pairs
from pipeline.splitting.duplicates import connected


@pytest.mark.parametrize(("tile", "most"), [(2048, 4_000_000), (7, 4_000_000), (7, 20)])
def test_the_groups_are_those_of_all_pairs(tile: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alike, "TILE", tile)
    monkeypatch.setattr(alike, "PAIRS", most)
    random = np.random.default_rng(0)
    vectors = np.repeat(random.normal(size=(9, 16)), 6, axis=0) + random.normal(size=(54, 16)) * 0.2
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)[
        random.permutation(54)
    ]
    cosines = vectors @ vectors.T
    similarity = 0.95
    assert np.abs(cosines - similarity).min() > 1e-6
    expected = connected(np.argwhere(cosines >= similarity), 54)
    found = cosine_pairs(vectors, similarity)
    assert connected(found, 54).tolist() == expected.tolist()
    assert 9 < len(set(expected.tolist())) < 54
    if most > 54:
        assert (cosines[found[:, 0], found[:, 1]] >= similarity).all()


def test_without_images_there_are_no_pairs() -> None:
    assert cosine_pairs(np.empty((0, 16), np.float32), 0.9).shape == (0, 2)
