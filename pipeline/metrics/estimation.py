"""What a sample with truth says of all images, with the help of a score that all of them have.

n images with truth of N in all, drawn by chance. A score s that goes along with what is right, y, makes the
estimate surer than the sample alone, and being wrong about it makes it no more than less sure.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Estimate:
    """A mean and its interval.

    Attributes:
        mean: in [0, 1].
        low: lower end of the interval.
        high: upper end.
    """

    mean: float
    low: float
    high: float


def sample_estimate(right: Values, total: int, *, confidence: float = 0.95) -> Estimate:
    """The mean of all images by that of the sample, without a score.

    Args:
        right: y, in [0, 1] (n,), n at least 2.
        total: N.
        confidence: of the interval, by Student's t with n - 1 degrees of freedom.
    """
    return _interval(float(right.mean()), float(right.var(ddof=1)), len(right), total, 1, 0.0, confidence)


def regression_estimate(
    score: Values, right: Values, mean_score: float, total: int, *, confidence: float = 0.95
) -> Estimate:
    """The mean of all images by regression on a score.

    This is the regression estimator of survey sampling (Cochran, "Sampling Techniques", chapter 7):
    mean(y) + b (mean of s over all images - mean(s)), with b = cov(s, y) / var(s). Its interval has Student's
    t with n - 2 degrees of freedom, and is smaller where the sample is much of all images.

    Args:
        score: s of the sample (n,), n at least 3.
        right: y, in [0, 1] (n,).
        mean_score: mean of s over all N images.
        total: N.
        confidence: of the interval.
    """
    spread = score - score.mean()
    squares = float(spread @ spread)
    if squares == 0:
        return sample_estimate(right, total, confidence=confidence)
    slope = float(spread @ right) / squares
    away = mean_score - float(score.mean())
    residual = right - right.mean() - slope * spread
    variance = float(residual @ residual) / (len(right) - 2)
    mean = float(right.mean()) + slope * away
    return _interval(mean, variance, len(right), total, 2, away**2 / squares, confidence)


def _interval(
    mean: float, variance: float, count: int, total: int, fitted: int, leverage: float, confidence: float
) -> Estimate:
    from scipy.stats import t

    error = np.sqrt(variance * (max(1 / count - 1 / total, 0.0) + leverage))
    reach = float(t.ppf((1 + confidence) / 2, count - fitted) * error)
    low, middle, high = np.clip([mean - reach, mean, mean + reach], 0, 1).tolist()
    return Estimate(middle, low, high)


def safe_score(score: Values, good: npt.NDArray[np.bool_], risk: float) -> float | None:
    """The lowest score from which images may be kept, so that few bad ones are among them.

    Conformal risk control (Angelopoulos et al., 2022, arXiv 2208.02814): for an image that is drawn like the
    sample, the chance that it is kept, and yet bad, is at most ``risk``, whatever the score is worth. It is
    the smallest bound with n/(n+1) · (share of the sample that is kept and bad) + 1/(n+1) <= risk.

    Args:
        score: of the sample (n,).
        good: (n,).
        risk: in (0, 1).

    Returns:
        The bound, 0 if all may be kept; None if the sample is too small: n < 1 / risk - 1.
    """
    allowed = int(np.floor(risk * (len(score) + 1) - 1 + 1e-9))
    if allowed < 0:
        return None
    bad = np.sort(score[~good])[::-1]
    return 0.0 if len(bad) <= allowed else float(np.nextafter(bad[allowed], np.inf))
