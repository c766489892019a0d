"""How well a score without truth ranks images by what the truth says of them.

N images. A score is high where the labels seem good; ``right`` is what they are, such as the mean IoU of an
image. Undefined values are NaN: of one image, of equal scores, of classes that all images are in.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.stats import rankdata

Values = npt.NDArray[np.floating]


def rank_correlation(score: Values, right: Values) -> float:
    """Spearman's rho: the correlation of ranks, ties sharing their mean rank, in [-1, 1].

    Args:
        score: (N,).
        right: (N,).
    """
    ranks = np.stack([rankdata(score), rankdata(right)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    scale = np.sqrt((ranks**2).sum(axis=1).prod())
    return float(ranks[0] @ ranks[1] / scale) if scale > 0 else float("nan")


def auroc(score: Values, good: npt.NDArray[np.bool_]) -> float:
    """Area under the ROC curve: the chance that a good image scores higher than a bad one, ties halved.

    Args:
        score: (N,).
        good: (N,).
    """
    count = int(good.sum())
    pairs = count * (len(good) - count)
    if not pairs:
        return float("nan")
    return float((rankdata(score)[good].sum() - count * (count + 1) / 2) / pairs)


def aurc(score: Values, right: Values) -> float:
    """Area under the risk-coverage curve: the mean of 1 - right over what is kept, over all shares kept.

    Images are kept from the highest score down; where scores tie, each of the tied counts as their mean does,
    so that the order of the images does not matter. (Geifman and El-Yaniv, 2017, with 1 - IoU as the risk.)

    Args:
        score: (N,).
        right: in [0, 1], (N,).

    Returns:
        (1/N) sum over n of the mean risk of the n best, in [0, 1]; less is better.
    """
    if not len(score):
        return float("nan")
    _, group = np.unique(-score, return_inverse=True)
    risk = np.bincount(group, 1 - right) / np.bincount(group)
    kept = np.cumsum(risk[np.sort(group)])
    return float((kept / np.arange(1, len(kept) + 1)).mean())


def rank_mean(*scores: Values) -> Values:
    """The mean over scores of each image's share of ranks, in (0, 1], (N,)."""
    return np.mean([rankdata(score) / len(score) for score in scores], axis=0)
