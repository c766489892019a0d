"""Rows and claims of a benchmark: figures over several seeds, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pipeline.evaluation.results import Claim, Row, Value
from pipeline.metrics.names import percent


def interval(values: Sequence[float]) -> Value:
    """Mean of several runs with its 95 % confidence interval (Student's t).

    Args:
        values: one figure per run; NaN and infinities are dropped.

    Returns:
        One run has no ``low`` and ``high`` (None), no run no ``mean``.
    """
    runs = tuple(float(value) for value in values if np.isfinite(value))
    mean = float(np.mean(runs)) if runs else None
    if mean is None or len(runs) == 1:
        return Value(mean=mean, runs=runs)
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(runs) - 1) * np.std(runs, ddof=1) / np.sqrt(len(runs)))
    return Value(mean=mean, low=mean - half, high=mean + half, runs=runs)


def row(
    name: str,
    values: Mapping[str, Sequence[float]],
    *,
    series: str | None = None,
    x: float | None = None,
    published: Mapping[str, float] | None = None,
    source: str | None = None,
    missing: str | None = None,
) -> Row:
    """Build a row of a section.

    Args:
        name: what was measured.
        values: one figure per run, by metric.
        series: the chart series that the row belongs to.
        x: its position in the series.
        published: the paper's figures, as fractions (0 to 1).
        source: where they were published.
        missing: what an unmeasured row needs.
    """
    return Row(
        name=name,
        series=series,
        x=x,
        values={metric: interval(runs) for metric, runs in values.items()},
        published=dict(published or {}),
        source=source,
        missing=missing,
    )


def claim(
    text: str,
    source: str,
    better: Sequence[float],
    worse: Sequence[float],
    *,
    unit: str = "mIoU",
    margin: float = 0.0,
) -> Claim:
    """Test the claim that one thing is better than another, from runs on the same seeds.

    Args:
        text: the claim.
        source: where it comes from.
        better: figures of what should be better, one per seed.
        worse: figures of what should be worse, on the same seeds.
        unit: unit of the figures.
        margin: claimed difference.

    Returns:
        The claim. ``shows`` is True if the 95 % interval of the paired
        differences lies above ``margin``, else False; None with fewer than two seeds. ``detail`` says whether
        the opposite shows or no difference is certain.
    """
    gaps = interval(np.subtract(better, worse).tolist())
    low, high = gaps.low, gaps.high
    if low is None or high is None:
        detail = f"{len(gaps.runs)} seed(s) with examples: too few to tell"
        return Claim(claim=text, source=source, shows=None, detail=detail)
    if low > margin:
        verdict = ""
    elif high < min(0.0, margin):
        verdict = "; the opposite holds"
    elif low > 0:
        verdict = f"; better, but not certainly by {percent(margin)} points"
    else:
        verdict = "; no significant difference"
    bounds = f"95 % {percent(low, sign=True)} to {percent(high, sign=True)}, {len(gaps.runs)} seeds"
    detail = f"{percent(gaps.mean, sign=True)} points of {unit} ({bounds}){verdict}"
    return Claim(claim=text, source=source, shows=low > margin, detail=detail)
