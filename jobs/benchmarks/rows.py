"""Rows of a benchmark: figures over several seeds, and what can be said about their difference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean of several runs with its 95 % confidence interval (Student's t).

    Args:
        values: one figure a run; NaN counts as none.

    Returns:
        ``mean``, ``low``, ``high``, ``runs``; the ends are None with one run, the mean with none.
    """
    runs = [float(value) for value in values if np.isfinite(value)]
    if not runs:
        return {"mean": None, "low": None, "high": None, "runs": []}
    mean = float(np.mean(runs))
    if len(runs) == 1:
        return {"mean": mean, "low": None, "high": None, "runs": runs}
    from scipy import stats

    half = float(stats.t.ppf(0.975, len(runs) - 1) * np.std(runs, ddof=1) / np.sqrt(len(runs)))
    return {"mean": mean, "low": mean - half, "high": mean + half, "runs": runs}


def row(
    name: str,
    values: Mapping[str, Sequence[float]],
    *,
    series: str | None = None,
    x: float | None = None,
    published: Mapping[str, float] | None = None,
    source: str | None = None,
    missing: str | None = None,
) -> dict[str, Any]:
    """One row of a section, as ``benchmark.json`` holds it.

    Args:
        name: what was measured.
        values: metric → one figure a run.
        series: line of a chart that the row belongs to.
        x: where on that line.
        published: figures of the paper for this row, as shares.
        source: where they are printed.
        missing: what is needed to measure the row, if it was not measured.
    """
    return {
        "name": name,
        "series": series,
        "x": x,
        "values": {metric: interval(runs) for metric, runs in values.items()},
        "published": dict(published or {}),
        "source": source,
        "missing": missing,
    }


def claim(
    text: str,
    source: str,
    better: Sequence[float],
    worse: Sequence[float],
    *,
    unit: str = "mIoU",
    margin: float = 0.0,
) -> dict[str, Any]:
    """Whether a claim "this is better than that" shows, from runs on the same seeds.

    Args:
        text: the claim.
        source: who makes it.
        better: figures of what should be better, one a seed.
        worse: figures of what should be worse, on the same seeds.
        unit: of the figures.
        margin: by how much it should be better.

    Returns:
        A claim of ``benchmark.json``: ``shows`` is true if the 95 % interval of the paired differences lies
        above ``margin``, false otherwise, None with less than two seeds; the detail tells a difference of the
        other sign from none.
    """
    gaps = interval(np.subtract(better, worse).tolist())
    low, high = gaps["low"], gaps["high"]
    if low is None or high is None:
        return {
            "claim": text,
            "source": source,
            "shows": None,
            "detail": f"{len(gaps['runs'])} seed(s) with examples: too few to tell",
        }
    if low > margin:
        verdict = ""
    elif high < min(0.0, margin):
        verdict = "; the opposite shows"
    elif low > 0:
        verdict = f"; better, but not surely by {margin:g}"
    else:
        verdict = "; no difference that is sure"
    return {
        "claim": text,
        "source": source,
        "shows": low > margin,
        "detail": f"{gaps['mean']:+.3f} {unit} (95 % {low:+.3f} to {high:+.3f}, {len(gaps['runs'])} seeds)"
        f"{verdict}",
    }
