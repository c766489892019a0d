"""Sections that break a table down by object size, class, phrase, kind of prompt and image size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from jobs.benchmarks.rows import row
from pipeline.evaluation.results import Section
from pipeline.metrics.breakdown import CLASS, OBJECT_SIZE, PHRASE, PROMPT, PROMPT_TEXT, WORDS, Breakdowns
from pipeline.metrics.foreground import CLIPSEG, summarise

Parts = dict[str, dict[str, dict[str, float]]]
"""Figures by breakdown, group and metric; ``COUNT`` holds the number of prompts."""

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
        breakdowns: counts per group.
        threshold: that of the row, None if it has none.
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


def breakdown_sections(name: str, title: str, found: Mapping[str, Parts]) -> Iterator[Section]:
    """Yield a section per breakdown with two or more groups: a chart per row, a bar per group.

    Args:
        name: name of the section that is broken down.
        title: its title.
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
        yield Section(
            name=f"{name}-{breakdown.replace(' ', '-')}",
            title=f"{title}, {_TITLES.get(breakdown, f'by {breakdown}')}",
            note=_counted(counts),
            chart="bars",
            metrics=tuple(metrics),
            rows=tuple(
                row(
                    f"{line}, {group}",
                    {metric: [values[metric]] for metric in metrics},
                    series=line,
                    x=places[group],
                )
                for line, group, values in figures
            ),
        )


def size_section(
    name: str,
    title: str,
    metrics: Sequence[str],
    found: Mapping[str, Mapping[int, tuple[Mapping[str, float], str | None]]],
    usual: int,
) -> Section:
    """A section with a curve per row: the table's figures against the side of the network's input.

    Args:
        name: name of the section that is broken down.
        title: its title.
        metrics: the table's metrics.
        found: by row and side: the figures, or none and the reason.
        usual: the paper's side.
    """
    return Section(
        name=f"{name}-image-size",
        title=f"{title}, by the side of the network's input in pixels",
        note=f"The image is given at another size; masks that count and example images stay as they are. "
        f"The paper's size is {usual}.",
        chart="lines",
        metrics=tuple(metrics),
        rows=tuple(
            row(
                f"{line}, {side} pixels",
                {metric: [values[metric]] for metric in metrics if metric in values},
                series=line,
                x=side,
                missing=missing,
            )
            for line, sides in found.items()
            for side, (values, missing) in sorted(sides.items())
        ),
    )


def _counted(counts: Mapping[str, float]) -> str:
    if not counts:
        return ""
    listed = "; ".join(f"{group}: {count:,.0f}" for group, count in counts.items())
    return f"Prompts: {listed}. Foreground IoU at the threshold of the row."
