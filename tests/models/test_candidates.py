from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.candidates import ambiguous, likely_classes, redundant

SCORES = torch.tensor([[0.1, 0.3, 0.2, 0.25], [0.05, 0.02, 0.21, 0.01]])


@pytest.mark.parametrize(
    ("count", "above", "wanted"),
    [
        (0, 0.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (2, 0.0, [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (9, 0.0, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (0, 0.2, [[0, 1, 1, 1], [0, 0, 1, 0]]),
        (2, 0.24, [[0, 1, 0, 1], [1, 0, 1, 0]]),
        (0, 0.5, [[0, 1, 0, 0], [0, 0, 1, 0]]),
    ],
)
def test_candidates(count: int, above: float, wanted: list[list[int]]) -> None:
    assert likely_classes(SCORES, count, above).int().tolist() == wanted


def two_halves() -> torch.Tensor:
    """Unit features (D, 6, 8): the left half is of one kind, the right half of another."""
    features = torch.zeros(4, 6, 8, dtype=torch.float64)
    features[0, :, :4], features[1, :, 4:] = 1, 1
    return features


def plain_refined(
    probabilities: np.ndarray, features: np.ndarray, boxes: list[tuple[slice, slice]]
) -> np.ndarray:
    """One class's refined map, by loops over patches, for a class active in the given boxes."""
    vectors = features.reshape(len(features), -1).T
    cells = len(vectors)
    affinity = np.array([[max(vectors[i] @ vectors[j], 1e-6) for j in range(cells)] for i in range(cells)])
    for _ in range(3):
        affinity /= affinity.sum(0, keepdims=True)
        affinity /= affinity.sum(1, keepdims=True)
    affinity = (affinity + affinity.T) / 2
    shared = (affinity @ affinity @ probabilities.ravel()).reshape(probabilities.shape)
    inside = np.zeros_like(probabilities)
    for box in boxes:
        inside[box] = 1
    shared *= inside
    return (shared - shared.min()) / (shared.max() - shared.min())


def test_redundant_by_hand() -> None:
    """A class over the left half survives sharing; one that is strong in a single cell does not."""
    features = two_halves()
    maps = torch.full((2, 6, 8), 0.02, dtype=torch.float64)
    maps[0, :, :4] = 0.9
    maps[1, 2, 6] = 0.8
    boxes = [[(slice(0, 6), slice(0, 4))], [(slice(2, 3), slice(6, 7))]]
    overlaps = []
    for own, of_class in zip(maps.numpy(), boxes, strict=True):
        shared = plain_refined(own, features.numpy(), of_class)
        overlaps.append((own * shared).sum() / (own.sum() + shared.sum()))
    assert overlaps[1] < 0.3 < overlaps[0], "the maps must differ for the test to mean anything"
    assert redundant(maps, features, 0.3).tolist() == [False, True]
    assert redundant(maps, features, float(overlaps[1]) - 1e-6).tolist() == [False, False]
    assert redundant(maps, features, float(overlaps[1]) + 1e-6).tolist() == [False, True]
    assert redundant(maps, features, 1.0).tolist() == [False, True], "one class always stays"


def test_ambiguous_classes_are_told_apart_at_their_place() -> None:
    features = two_halves()
    maps = torch.full((3, 6, 8), 0.01, dtype=torch.float64)
    maps[0, :, :4], maps[1, :, :4], maps[2, :, 4:] = 0.5, 0.45, 0.9
    asked: list[tuple[int, int, int, int]] = []

    def classify(box: tuple[int, int, int, int]) -> torch.Tensor:
        asked.append(box)
        return torch.tensor([0.1, 0.2, 0.9])

    assert ambiguous(maps, features, 0.7, classify).tolist() == [True, False, False]
    assert asked == [(0, 6, 0, 4)], "once, at the place that the two share"
    maps[0] = 0  # out already
    assert not ambiguous(maps, features, 0.7, classify).any() and len(asked) == 1


def test_maps_of_noise_stay_finite() -> None:
    generator = torch.Generator().manual_seed(1)
    features = F.normalize(torch.randn(8, 5, 5, generator=generator), dim=0)
    maps = torch.randn(6, 5, 5, generator=generator).softmax(0)
    out = redundant(maps, features, 0.15) | ambiguous(maps, features, 0.7, lambda _box: torch.arange(6.0))
    assert out.dtype == torch.bool and not out.all()
