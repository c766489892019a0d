"""``maskmill stats``: label table → what it holds, in figures."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from jobs.console import counted, stderr_console
from jobs.options import FLAT, Flag, Maybe, ViewOptions
from pipeline.files.storage import open_storage
from pipeline.table.labels import OK
from pipeline.table.record import TableRecord, read_table_record

if TYPE_CHECKING:
    from pipeline.table.profile import Profile, Spread
    from pipeline.table.views import TableView

SCHEMA_VERSION = 1
PAIRS = 5
"""Pairs of classes that are named."""
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class ShowStatistics:
    """Say what a label table holds: classes, which stand together, quality, failures, drift.

    Nothing is written. With settings of a view, the figures are those of the labels as the view has them.

    Attributes:
        table: the --output of maskmill label or maskmill import.
        against: an earlier label table: how far have the labels moved since? Classes are matched by name.
        json: print the result as JSON, with histograms, and all pairs of classes that stand together.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    against: Annotated[Maybe[str], arg(metavar="TABLE")] = None
    json: Flag = False
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)

    def run(self, console: Console | None = None) -> int:
        """Print the figures.

        Raises:
            MaskMillError: ``table_missing``, ``table_damaged``; as ``ViewOptions.of_table``.
        """
        console = console or stderr_console()
        record = read_table_record(self.table)
        view = self.seen.of_table(self.table)
        other = None if self.against is None else (self.against, read_table_record(self.against))
        seen_before = None if self.against is None else self.seen.of_table(self.against)
        for line in self.seen.keep(self.table, view):
            console.print(line, soft_wrap=True, highlight=False)
        found = self._profile(self.table, record, view, console)
        before = None if other is None else self._profile(*other, seen_before, console)
        if self.json:
            told = {
                "schema_version": SCHEMA_VERSION,
                "table": open_storage(self.table).uri,
                **found.to_dict(),
                "drift": None if before is None else self._drift(before, found),
            }
            print(json.dumps(told, indent=2, ensure_ascii=False))
        else:
            self._tell(found, before)
        return 0

    def _profile(self, table: str, record: TableRecord, view: TableView | None, console: Console) -> Profile:
        from pipeline.table.profile import profile_table

        with counted(console, f"reading {table}", "images") as progress:
            return profile_table(open_storage(table), record, view, progress=progress)

    def _drift(self, before: Profile, found: Profile) -> dict[str, Any]:
        from pipeline.table.drift import compare_labels

        assert self.against is not None
        drift = compare_labels(before, found, most=len(before.names) + len(found.names))
        return {
            "against": open_storage(self.against).uri,
            **drift.model_dump(mode="json", exclude={"moved"}),
            "quality_divergence": quality_divergence(before, found),
            "classes": [{"name": name, "before": was, "after": now} for name, was, now in drift.moved],
        }

    def _tell(self, found: Profile, before: Profile | None) -> None:
        told = Console(soft_wrap=True, highlight=False, markup=False)
        counts = found.counts.to_dict()
        failed = f", {counts['failed']:,} failed" if counts["failed"] else ""
        told.print(f"{open_storage(self.table).uri}: {counts['labelled']:,} labelled images{failed}")
        for code, number in counts["status"].items():
            if code != OK:
                example = counts["errors"].get(code)
                told.print(f"  {number:,} {code}" + (f", such as: {example}" if example else ""))
        told.print(f"  {found.ignored_share:.1%} of {counts['pixels']:,} pixels have no class")
        told.print(_classes(found, before), soft_wrap=False)
        labelled = counts["labelled"]
        pairs = [
            f"{found.names[one]} and {found.names[two]} ({images / labelled:.0%})"
            for one, two, images in found.pairs()[:PAIRS]
        ]
        if pairs:
            told.print(f"In one image most often: {', '.join(pairs)}")
        score = "the most doubtful pixels" if found.score == "softmin" else "mean of the classes' confidence"
        for name, spread in ((f"quality ({score})", found.quality), ("agreement", found.agreement)):
            if spread.count:
                told.print(_spread(name, spread))
        if before is not None:
            self._tell_drift(before, found, told)

    def _tell_drift(self, before: Profile, found: Profile, told: Console) -> None:
        from pipeline.table.drift import compare_labels

        assert self.against is not None
        told.print(f"Since {open_storage(self.against).uri}, {before.quality.count:,} labelled images:")
        for line in compare_labels(before, found).sentences():
            told.print(f"  {line}")
        bits = quality_divergence(before, found)
        if before.score != found.score:
            told.print("  Quality is not compared: an older version stored another score.")
        elif bits is not None:
            told.print(f"  The quality of the images diverges by {bits:.3f} bits.")


def quality_divergence(before: Profile, found: Profile) -> float | None:
    """Jensen-Shannon divergence of the histograms of quality in bits; None if they cannot be compared."""
    from pipeline.metrics.divergence import divergence

    if before.score != found.score or not (before.quality.count and found.quality.count):
        return None
    return divergence(before.quality.histogram(), found.quality.histogram())


def _classes(found: Profile, before: Profile | None) -> Table:
    """A row for each class that has pixels, the largest first."""
    shown = Table()
    shown.add_column("class")
    for name in ("pixels", *(["before"] if before else []), "images", "confidence"):
        shown.add_column(name, justify="right")
    old = {} if before is None else before.shares
    labelled = max(found.quality.count, 1)
    shares = found.shares or dict.fromkeys(found.names, 0.0)
    pixels, images = found.class_pixels, found.class_images
    absent = 0
    for number in sorted(range(len(found.names)), key=lambda at: (-pixels[at], at)):
        name = found.names[number]
        if not pixels[number] and not old.get(name):
            absent += 1
            continue
        sure = f"{found.confidence[number] / pixels[number]:.2f}" if pixels[number] else ""
        earlier = [f"{old.get(name, 0.0):.1%}"] if before else []
        here = f"{images[number]:,} ({images[number] / labelled:.0%})"
        shown.add_row(name, f"{shares[name]:.1%}", *earlier, here, sure)
    for name in sorted(old.keys() - shares.keys()):
        shown.add_row(name, "no such class", f"{old[name]:.1%}", "", "")
    if absent:
        shown.caption = f"{absent} other {'class has' if absent == 1 else 'classes have'} no pixel"
    return shown


def _spread(name: str, spread: Spread) -> str:
    """Mean, quantiles and a small histogram from 0 to 1."""
    bins = spread.histogram()
    bars = "".join(_BARS[-(-number * (len(_BARS) - 1) // max(bins))] for number in bins)
    low, middle, high = (spread.quantile(share) for share in (0.05, 0.5, 0.95))
    return (
        f"{name}: mean {spread.mean:.3f}, median {middle:.3f}, nine in ten from {low:.3f} to {high:.3f}\n"
        f"  0 |{bars}| 1"
    )
