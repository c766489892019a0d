"""Scores on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from pipeline.evaluation.results import (
    EvaluationResult,
)
from pipeline.metrics.names import metric_label, percent


def print_scores(result: EvaluationResult, console: Console, *, told: int) -> None:
    """Print the scores and what was left out, except for the first ``told`` entries."""
    toy = " (a toy: it knows the toy world only)" if result.model.toy else ""
    table = Table(title=f"{result.title}, protocol {result.protocol}{toy}", title_justify="left")
    table.add_column("class")
    for name in ("IoU %", "boundary IoU %", "accuracy %"):
        table.add_column(name, justify="right")
    classes = result.classes
    shown = classes if len(classes) <= 30 else sorted(classes, key=lambda c: -(c.iou or 0))
    rows = shown if len(shown) <= 30 else [*shown[:12], None, *shown[-12:]]
    for entry in rows:
        if entry is None:
            table.add_row(f"… {len(shown) - 24} more", "", "", "")
            continue
        values = (entry.iou, entry.boundary_iou, entry.accuracy)
        name = f"{entry.name} ({entry.group})" if entry.group else entry.name
        table.add_row(name, *map(percent, values))
    console.print(table)
    metrics = result.metrics
    line = ", ".join(
        f"{metric_label(key)} {percent(value)} %" for key, value in metrics.items() if value is not None
    )
    console.print(f"{line}", highlight=False, soft_wrap=True)
    if result.view is not None:
        console.print(f"  view: {'; '.join(result.view.says)}", highlight=False, soft_wrap=True, markup=False)
    for line in result.compared.sentences() if result.compared else ():
        console.print(f"  compared: {line}", highlight=False, soft_wrap=True, markup=False)
    images = result.images
    for line in images.left_out[told:]:
        console.print(f"  left out: {line}", highlight=False, soft_wrap=True, markup=False)
    if images.failed or images.missing:
        console.print(
            f"Not all images took part: {images.evaluated:,} compared, {images.failed:,} without "
            f"labels, {images.missing:,} not in the table. The figures are those of the compared ones.",
            style="bold red",
            highlight=False,
            soft_wrap=True,
        )
    for figure in result.published:
        if figure.metric in metrics:
            console.print(
                f"  published: {figure.method} {metric_label(figure.metric)} {percent(figure.value)} % "
                f"[{figure.source}]",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )
