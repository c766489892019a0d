"""Per-class confidence thresholds for guesses.

Shapes: C classes, N pixels, L = 256 levels of confidence.

A fixed threshold starves the classes with the lowest confidence: they get no labels, so their confidence
falls further. Both adaptive rules only need the counts of guesses per class and confidence. Workers sum their
counts, so all derive the same thresholds.

* ``relative``: the fixed threshold times the class's mean confidence over that of the most confident class,
  the normalisation of FreeMatch (Wang et al., ICLR 2023, arXiv 2205.07246, which applies it to mean class
  probabilities; first in FlexMatch, arXiv 2110.08263).
* ``quantile``: keeps at least a given share of every class's guesses, the most confident ones, as in
  class-balanced self-training (Zou et al., ECCV 2018, arXiv 1810.07911); no threshold exceeds the fixed one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.training.maskclip_plus.recipes import ThresholdRule

LEVELS = 256


def confidence_counts(
    classes: Tensor, confidence: Tensor, num_classes: int, counted: Tensor | None = None
) -> Tensor:
    """Count guesses by class and confidence; additive over batches and workers.

    Args:
        classes: int64 (N,) or of any shape, in [0, C).
        confidence: float, of the same shape, in [0, 1], counted at its nearest of L levels k / (L - 1).
        num_classes: C.
        counted: bool, of the same shape: which guesses count; None counts all.

    Returns:
        int64 (C, L), on the arguments' device.
    """
    levels = (confidence * (LEVELS - 1)).round().long().clamp_(0, LEVELS - 1)
    cells = classes * LEVELS + levels
    size = num_classes * LEVELS
    if counted is not None:
        cells = torch.where(counted, cells, size)
    # With bincount or a selection by mask, the host would wait for a GPU.
    counts = cells.new_zeros(size + 1)
    counts.scatter_add_(0, cells.flatten(), cells.new_ones(1).expand(cells.numel()))
    return counts[:size].view(num_classes, LEVELS)


def class_thresholds(counts: Tensor, base: float, *, rule: ThresholdRule, keep: float = 0.5) -> Tensor:
    """Compute the minimum confidence of a guess, per class.

    Args:
        counts: (C, L), sums or running averages of ``confidence_counts``.
        base: the fixed threshold, in [0, 1]; no class gets a higher one.
        rule: see the module docstring.
        keep: for ``quantile``, minimum share of each class's guesses to keep, in (0, 1].

    Returns:
        float32 (C,). A class that was never guessed gets the fixed threshold; its first guesses are counted
        whether they are kept or not.
    """
    fixed = torch.full((len(counts),), base, dtype=torch.float32, device=counts.device)
    if rule == "fixed":
        return fixed
    counts = counts.double()
    totals = counts.sum(1)
    guessed = totals > 0
    shares = counts / torch.where(guessed, totals, 1)[:, None]
    levels = torch.arange(LEVELS, dtype=torch.float64, device=counts.device)
    if rule == "relative":
        means = shares @ levels
        adapted = base * means / means.max().clamp_min(1e-9)
    else:
        at_least = shares.flip(1).cumsum(1).flip(1)
        # Tolerate rounding at the level that exactly reaches the share.
        highest = ((at_least >= keep - 1e-9) * levels).amax(1)
        # Half a level lower, to keep all confidences that round to the level.
        adapted = ((highest - 0.5) / (LEVELS - 1)).clamp(0, base)
    return torch.where(guessed, adapted.float(), fixed)
