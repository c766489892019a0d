"""Sections that show a table's figures apart: by object size, class, phrase, kind of prompt, image size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.benchmarks.rows import row
from pipeline.metrics.breakdown import CLASS, OBJECT_SIZE, PHRASE, PROMPT, PROMPT_TEXT, WORDS, Breakdowns
from pipeline.metrics.foreground import CLIPSEG, summarise

Parts = dict[str, dict[str, dict[str, float]]]
"""Figures by metric, by group, by breakdown; ``COUNT`` among them is the number of prompts."""

COUNT = "prompts"
_TITLES = {
    OBJECT_SIZE: "by the share of the image that the object covers",
    CLASS: "by class",
    WORDS: "by the number of words",
    PHRASE: "by what the phrase says",
    PROMPT: "by the kind of prompt",
    PROMPT_TEXT: "by prompt",
}


def parts_of(breakdowns: Breakdowns, threshold: float | None) -> Parts:
    """Foreground IoU and average precision of every group, under CLIPSeg's convention.

    Args:
        breakdowns: counts of the groups.
        threshold: of the row they are part of; None where it has none.
    """
    return {
        breakdown: {
            name: {
                **{
                    metric: value
                    for metric, value in summarise(group.statistics, CLIPSEG, threshold=threshold).items()
                    if metric in ("iou_fg", "ap")
                },
                COUNT: group.prompts,
            }
            for name, group in groups.items()
        }
        for breakdown, groups in breakdowns.items()
    }


def breakdown_sections(name: str, title: str, found: Mapping[str, Parts]) -> Iterator[dict[str, Any]]:
    """A section for each breakdown with at least two groups: a chart for each row, a bar for each group.

    Args:
        name: of the section that they are parts of.
        title: of that section.
        found: parts by row of the table.
    """
    for breakdown in dict.fromkeys(key for parts in found.values() for key in parts):
        groups = list(dict.fromkeys(group for parts in found.values() for group in parts.get(breakdown, {})))
        if len(groups) < 2:
            continue
        places = {group: place for place, group in enumerate(groups)}
        figures = [
            (line, group, parts[breakdown][group])
            for line, parts in found.items()
            for group in places
            if group in parts.get(breakdown, {})
        ]
        counts = {group: values[COUNT] for _, group, values in figures if COUNT in values}
        metrics = [metric for metric in figures[0][2] if metric != COUNT]
        yield {
            "name": f"{name}-{breakdown.replace(' ', '-')}",
            "title": f"{title}, {_TITLES.get(breakdown, f'by {breakdown}')}",
            "note": _counted(counts),
            "chart": "bars",
            "metrics": metrics,
            "rows": [
                row(
                    f"{line}, {group}",
                    {metric: [values[metric]] for metric in metrics},
                    series=line,
                    x=places[group],
                )
                for line, group, values in figures
            ],
        }


def size_section(
    name: str,
    title: str,
    metrics: Sequence[str],
    found: Mapping[str, Mapping[int, tuple[Mapping[str, float], str | None]]],
    usual: int,
) -> dict[str, Any]:
    """A section with a curve for each row: the table's figures by the side of the network's input.

    Args:
        name: of the section that it is part of.
        title: of that section.
        metrics: of the table.
        found: by row, by side: figures, or none and what they lack.
        usual: the paper's side.
    """
    return {
        "name": f"{name}-image-size",
        "title": f"{title}, by the side of the network's input in pixels",
        "note": f"The image is given at another size; masks that count and example images stay as they are. "
        f"The paper's size is {usual}.",
        "chart": "lines",
        "metrics": list(metrics),
        "rows": [
            row(
                f"{line}, {side} pixels",
                {metric: [values[metric]] for metric in metrics if metric in values},
                series=line,
                x=side,
                missing=missing,
            )
            for line, sides in found.items()
            for side, (values, missing) in sorted(sides.items())
        ],
    }


def _counted(counts: Mapping[str, float]) -> str:
    if not counts:
        return ""
    listed = "; ".join(f"{group}: {count:,.0f}" for group, count in counts.items())
    return f"Prompts: {listed}. Foreground IoU at the threshold of the row."
