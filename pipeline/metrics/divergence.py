"""How far two histograms of classes are apart."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


def divergence(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Jensen-Shannon divergence of two histograms in bits: 0 if they are alike, 1 if they share no class.

    Args:
        first: non-negative (K,), of any sum.
        second: the same.

    Returns:
        In [0, 1]; NaN if one of them is empty.
    """
    from scipy.special import rel_entr  # takes half a second, which commands that check their use do not wait

    p, q = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if not (p.sum() > 0 and q.sum() > 0):
        return float("nan")
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    bits = (rel_entr(p, middle).sum() + rel_entr(q, middle).sum()) / (2 * np.log(2))
    return float(np.clip(bits, 0, 1))


def divergence_by_name(first: Mapping[str, float], second: Mapping[str, float]) -> float:
    """``divergence`` of histograms by class name; a class that one of them lacks has nothing there."""
    names = sorted(first.keys() | second.keys())
    return divergence([first.get(name, 0.0) for name in names], [second.get(name, 0.0) for name in names])


def most_moved(first: Mapping[str, float], second: Mapping[str, float]) -> list[str]:
    """Names of all classes, the one whose share differs most first."""
    names = sorted(first.keys() | second.keys())
    return sorted(names, key=lambda name: -abs(first.get(name, 0.0) - second.get(name, 0.0)))
