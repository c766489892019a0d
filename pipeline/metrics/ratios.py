"""Division for metrics: undefined values are NaN, and means skip NaN."""

from __future__ import annotations

import numpy as np


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide arrays of the same shape into float64; NaN where the denominator (never negative) is 0."""
    numerator, denominator = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator > 0)


def mean_of_defined(values: np.ndarray) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    values = np.asarray(values, np.float64)
    defined = values[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")
