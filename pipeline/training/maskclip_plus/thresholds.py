"""How sure a guess must be to be trained on, class by class.

Shapes: C classes, N pixels, L = 256 levels of confidence.

A fixed threshold starves the classes that a network is least sure of: they get no labels, so it grows less
sure of them still. Both remedies here need one statistic only, how often each class was guessed with which
confidence. It consists of counts, so workers add theirs up and all come to the same thresholds.

* ``relative``: the threshold of a class is the fixed one times its mean confidence over that of the surest
  class, the normalisation of FreeMatch (Wang et al., ICLR 2023, arXiv 2205.07246, there on the mean
  probability of a class; an idea of FlexMatch, arXiv 2110.08263).
* ``quantile``: at least a given share of the guesses of every class is kept, the surest ones, as in
  class-balanced self-training (Zou et al., ECCV 2018, arXiv 1810.07911); classes that are surer than the
  fixed threshold are held to that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.training.maskclip_plus.recipes import ThresholdRule

LEVELS = 256


def confidence_counts(classes: Tensor, confidence: Tensor, num_classes: int) -> Tensor:
    """Count guesses by class and confidence; additive over batches and workers.

    Args:
        classes: int64 (N,) in [0, C).
        confidence: float (N,) in [0, 1], counted at its nearest of L levels k / (L - 1).
        num_classes: C.

    Returns:
        int64 (C, L), on the device of the arguments.
    """
    levels = (confidence * (LEVELS - 1)).round().long().clamp_(0, LEVELS - 1)
    counts = torch.bincount(classes * LEVELS + levels, minlength=num_classes * LEVELS)
    return counts.view(num_classes, LEVELS)


def class_thresholds(counts: Tensor, base: float, *, rule: ThresholdRule, keep: float = 0.5) -> Tensor:
    """The confidence that a guess of each class must reach.

    Args:
        counts: (C, L), sums or running averages of ``confidence_counts``.
        base: the fixed threshold, in [0, 1]; no class gets a higher one.
        rule: see the module.
        keep: of ``quantile``: the share of each class's guesses that is kept at least, in (0, 1].

    Returns:
        float32 (C,). A class that was never guessed has the fixed threshold: nothing is known of it, and its
        first guesses, kept or not, are counted.
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
        # Rounding must not cost the level at which the share is exactly reached.
        highest = ((at_least >= keep - 1e-9) * levels).amax(1)
        # Half a level lower, so that all confidences that were counted at the level are kept.
        adapted = ((highest - 0.5) / (LEVELS - 1)).clamp(0, base)
    return torch.where(guessed, adapted.float(), fixed)
