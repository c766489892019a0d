"""Which classes an image may be labelled with: by its class token, and by whether their maps make sense.

Candidates by the class token are the first ingredient of ReCLIP (Wang et al., CVPR 2024). The two tests of
maps are those of class purification (FreeCP), on what any head gives: the affinity of patches is that of
their features, where FreeCP takes attention maps.

Shapes: B batch, C classes, D channels, h w grid, L = h*w.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from scipy import ndimage
from scipy.sparse.csgraph import connected_components
from torch import Tensor

_ACTIVE = 0.4  # share of the highest score from which a cell belongs to a class's place
_SINKHORN_ROUNDS = 3


def likely_classes(scores: Tensor, count: int, above: float) -> Tensor:
    """Which classes an image may have.

    Args:
        scores: (B, C) cosines of the class token.
        count: how many; with a threshold, how many if none reaches it (at least one). 0 alone is all.
        above: threshold; 0 is none.

    Returns:
        bool (B, C).
    """
    count = min(count or (1 if above else scores.shape[1]), scores.shape[1])
    best = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(count, 1).indices, True)
    if above <= 0:
        return best
    high = scores >= above
    return torch.where(high.any(1, keepdim=True), high, best)


def redundant(probabilities: Tensor, features: Tensor, threshold: float) -> Tensor:
    """Classes whose map does not survive when patches that are alike share it.

    The refined map is A² p within the boxes in which the class is active, where A is the patches' similarity,
    made doubly stochastic and symmetric; the soft IoU is Σ p q / (Σ p + Σ q), at most 1/2.

    Args:
        probabilities: (C, h, w) of one image.
        features: (D, h, w) of length 1.
        threshold: a class needs more than this.

    Returns:
        bool (C,). The class with the highest IoU is never redundant.
    """
    refined = _shared(probabilities, features)
    overlap = (probabilities * refined).sum((1, 2)) / (probabilities.sum((1, 2)) + refined.sum((1, 2)) + 1e-8)
    return (overlap <= threshold) & (overlap < overlap.max())


def ambiguous(
    probabilities: Tensor,
    features: Tensor,
    threshold: float,
    classify: Callable[[tuple[int, int, int, int]], Tensor],
) -> Tensor:
    """Classes that have the same map as another one, which suits the place better.

    Args:
        probabilities: (C, h, w) of one image; zero for classes that are out already.
        features: (D, h, w) of length 1.
        threshold: soft IoU Σ min / Σ max of refined maps from which classes are in one group.
        classify: a box of cells (top, bottom, left, right) -> scores (C,) of its class token.

    Returns:
        bool (C,): members of a group that no box of the group prefers.
    """
    refined = _shared(probabilities, features).flatten(1)
    refined[probabilities.flatten(1).amax(1) <= 0] = 0
    present = refined.amax(1) > 0
    out = torch.zeros_like(present)
    ids = present.nonzero().flatten()
    maps = refined[ids]
    both = torch.stack([torch.minimum(one, maps).sum(1) / torch.maximum(one, maps).sum(1) for one in maps])
    count, group = connected_components((both >= threshold).cpu().numpy(), directed=False)
    for number in range(count):
        members = ids[torch.from_numpy(group == number).to(ids.device)]
        boxes = (
            _boxes(refined[members].mean(0).unflatten(0, probabilities.shape[1:])) if len(members) > 1 else []
        )
        if not boxes:
            continue
        best = {int(members[classify(box)[members].argmax()]) for box in boxes}
        for member in members.tolist():
            out[member] = bool(best) and member not in best
    return out


def _shared(probabilities: Tensor, features: Tensor) -> Tensor:
    """Refined maps (C, h, w), each from 0 to 1; see ``redundant``."""
    vectors = features.flatten(1).to(probabilities.dtype)
    affinity = (vectors.T @ vectors).clamp_min(1e-6)
    for _ in range(_SINKHORN_ROUNDS):
        affinity = affinity / affinity.sum(0, keepdim=True)
        affinity = affinity / affinity.sum(1, keepdim=True)
    affinity = (affinity + affinity.T) / 2
    affinity = affinity @ affinity
    refined = (probabilities.flatten(1) @ affinity).unflatten(1, probabilities.shape[1:])
    refined = refined * torch.stack([_in_boxes(each) for each in probabilities])
    low, high = refined.amin((1, 2), keepdim=True), refined.amax((1, 2), keepdim=True)
    return (refined - low) / (high - low).clamp_min(1e-8)


def _in_boxes(scores: Tensor) -> Tensor:
    """1 in the boxes of a map's active components, else 0, (h, w)."""
    inside = torch.zeros_like(scores)
    for top, bottom, left, right in _boxes(scores):
        inside[top:bottom, left:right] = 1
    return inside


def _boxes(scores: Tensor) -> list[tuple[int, int, int, int]]:
    """Boxes (top, bottom, left, right) of the components of a map (h, w) that are active."""
    highest = float(scores.max())
    if highest <= 0:
        return []
    active = (scores >= _ACTIVE * highest).cpu().numpy()
    found, _ = ndimage.label(active)
    return [
        (rows.start, rows.stop, columns.start, columns.stop) for rows, columns in ndimage.find_objects(found)
    ]
