"""Prompt denoising and key smoothing (MaskCLIP, arXiv 2112.01071, section 3.3).

Shapes: B batch, C classes, h w grid, L = h*w, K key channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from models.settings import KeyAxis

DENIED = -100.0
"""The score of a class that was removed from an image."""


def prompt_denoising(scores: Tensor, threshold: float, *, temperature: float = 100.0) -> Tensor:
    """Remove the classes that are nowhere likely in an image (paper §3.3).

    Args:
        scores: (B, C, h, w) cosines, fp32 or fp64.
        threshold: remove a class if its highest softmax probability in the image is strictly below this; 0
            disables the step.
        temperature: of the softmax.

    Returns:
        (B, C, h, w), ``DENIED`` everywhere for a removed class. The probabilities are not recomputed.
    """
    if threshold <= 0:
        return scores
    best = (temperature * scores).softmax(1).amax((2, 3), keepdim=True)
    return torch.where(best < threshold, DENIED, scores)


def key_smoothing(
    scores: Tensor, keys: Tensor, threshold: float, *, axis: KeyAxis = "token", temperature: float = 100.0
) -> Tensor:
    """Average class probabilities over positions with similar keys (paper §3.3, as the reference codes it).

    Args:
        scores: (B, C, h, w) cosines after prompt denoising, fp32 or fp64.
        keys: (B, L, K), any float dtype.
        threshold: smooth positions whose highest probability is strictly below this, keep the others; 0
            disables the step.
        axis: normalise the keys along ``token`` (reference) or ``channel`` (paper).
        temperature: of the softmax.

    Returns:
        (B, C, h, w), no longer cosines: probabilities where not smoothed, elsewhere their sum over all
        positions, weighted by key similarity, which may be negative and is not normalised.
    """
    if threshold <= 0:
        return scores
    probabilities = (temperature * scores).flatten(2).softmax(1).transpose(1, 2)
    keys = F.normalize(keys.to(scores.dtype), dim=1 if axis == "token" else 2, eps=1e-12)
    # (k k^T) p = k (k^T p) avoids the L x L matrix.
    smoothed = keys @ (keys.transpose(1, 2) @ probabilities)
    unsure = probabilities.amax(2, keepdim=True) < threshold
    result = torch.where(unsure, smoothed, probabilities)
    return result.transpose(1, 2).unflatten(2, scores.shape[-2:])
