"""The page of ``maskmill stats``: what a label table holds, in bars and histograms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.files import write_file
from pipeline.report.page import page_path, render
from pipeline.table.labels import OK


def write_stats_page(
    told: Mapping[str, Any],
    output: Path,
    *,
    title: str,
    colors: Mapping[str, str],
    quality_hint: str,
    notes: Sequence[tuple[str, Sequence[str]]] = (),
) -> Path:
    """Write the page.

    Args:
        told: what ``maskmill stats --json`` prints.
        output: a local file.
        title: of the page.
        colors: CSS colour of each class, by name.
        quality_hint: what quality is.
        notes: headings with sentences, such as those on drift.
    """
    path = page_path(output)
    drift = told["drift"]
    before = {} if drift is None else {one["name"]: one["before"] for one in drift["classes"]}
    shown = [one for one in told["classes"] if one["pixels"] or before.get(one["name"])]
    shown.sort(key=lambda one: -one["pixel_share"])
    most = max([one["pixel_share"] for one in shown] + list(before.values()), default=0.0) or 1.0

    def earlier(one: Mapping[str, Any]) -> float | None:
        # A class that has not moved is not among those that have.
        return None if drift is None else before.get(one["name"], one["pixel_share"])

    failures = [
        f"{number:,} {code}" + (f", such as: {told['errors'][code]}" if code in told["errors"] else "")
        for code, number in told["status"].items()
        if code != OK
    ]
    facts = [
        ("labelled images", f"{told['labelled']:,}"),
        ("failed", f"{told['failed']:,}"),
        ("pixels without a class", f"{told['ignored_pixels'] / max(told['pixels'], 1):.1%}"),
        ("mean quality", "–" if told["quality"]["mean"] is None else f"{told['quality']['mean']:.3f}"),
    ]
    page = render(
        "stats.html",
        title=title,
        it=told,
        facts=facts,
        notes=[*notes, ("Failures", failures)],
        before=before,
        absent=len(told["classes"]) - len(shown),
        classes=[
            {
                "it": one,
                "color": colors[one["name"]],
                "width": 100 * one["pixel_share"] / most,
                "before": (was := earlier(one)),
                "old_width": 100 * (was or 0.0) / most,
            }
            for one in shown
        ],
        quality_hint=quality_hint,
    )
    write_file(path, page.encode())
    return path
