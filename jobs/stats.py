"""``maskmill stats``: label table → what it holds, in figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from jobs.console import counted, stderr_console
from jobs.options import FLAT, Flag, Maybe, ViewOptions
from pipeline.files.outputs import check_output_file
from pipeline.files.storage import open_storage
from pipeline.report.page import page_path
from pipeline.table.labels import OK
from pipeline.table.record import TableRecord, read_table_record

if TYPE_CHECKING:
    from pipeline.evaluation.estimate import Measured
    from pipeline.ontology.ontology import Ontology
    from pipeline.table.profile import Profile, Spread
    from pipeline.table.views import TableView

SCHEMA_VERSION = 1
GOOD, RISK = 0.5, 0.1
"""Mean IoU from which an image is good; the chance of a bad one that is taken."""
SCORES = {"classes": "mean of the classes' confidence", "softmin": "the most doubtful pixels"}
"""What quality is, in words."""
PAIRS = 5
"""Pairs of classes that are named."""
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, kw_only=True)
class ShowStatistics:
    """Show what a label table holds: classes, which of them occur together, quality, failures, drift.

    The table is not changed. With the options of a view, the figures describe its labels.

    Attributes:
        table: the --output of maskmill label or maskmill import.
        against: an earlier label table: how far have the labels moved since? Classes are matched by name.
        estimate: how right is the whole table? Give the truth of 50 or more images that were drawn at random:
            a folder of masks (PNG, named as the images; values are class ids, 255 is ignored), a table of
            true labels, or the corrections of a review, of which those of random images count.
        page: also write a page of bars and histograms here, a local file.
        json: print the result as JSON, with histograms, and all pairs of classes that occur together.
    """

    table: Annotated[Positional[str], arg(metavar="TABLE")]
    against: Annotated[Maybe[str], arg(metavar="TABLE")] = None
    estimate: Annotated[Maybe[str], arg(metavar="DIR|TABLE")] = None
    page: Maybe[Path] = None
    json: Flag = False
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)

    def run(self, console: Console | None = None) -> int:
        """Print the figures.

        Raises:
            MaskMillError: ``wrong_use``; ``input_missing``, ``table_damaged``; as ``ViewOptions.of_table``,
                ``pipeline.review.chance.reviewed_by_chance``, ``pipeline.evaluation.truth.find_truth`` and
                ``pipeline.evaluation.estimate.measure_sample``.
        """
        console = console or stderr_console()
        if self.page is not None:
            check_output_file(page_path(self.page))
        record = read_table_record(self.table)
        view = self.seen.of_table(self.table)
        sample = None if self.estimate is None else self._sample(record, view)
        other = None if self.against is None else (self.against, read_table_record(self.against))
        seen_before = None if self.against is None else self.seen.of_table(self.against)
        for line in self.seen.keep(self.table, view):
            console.print(line, soft_wrap=True, highlight=False)
        found = self._profile(self.table, record, view, console)
        before = None if other is None else self._profile(*other, seen_before, console)
        told = {
            "schema_version": SCHEMA_VERSION,
            "table": open_storage(self.table).uri,
            **found.to_dict(),
            "drift": None if before is None else self._drift(before, found),
            "estimate": None if sample is None else estimated(sample[0], found) | {"notes": sample[1]},
        }
        if self.page is not None:
            ontology = record.ontology if view is None else view.ontology
            page = self._write_page(self.page, told, ontology, found, before)
            console.print(f"Open in a browser: {page.resolve().as_uri()}", soft_wrap=True, highlight=False)
        if self.json:
            print(json.dumps(told, indent=2, ensure_ascii=False))
        else:
            self._tell(found, before, told["estimate"])
        return 0

    def _write_page(
        self, place: Path, told: dict[str, Any], ontology: Ontology, found: Profile, before: Profile | None
    ) -> Path:
        from pipeline.report.stats_page import write_stats_page

        notes = []
        if told["estimate"] is not None:
            lines = [line.strip() for line in _estimate_lines(told["estimate"])]
            notes.append(("How right the table is", lines))
        if before is not None:
            notes.append((f"Since {told['drift']['against']}", self._drift_lines(before, found)))
        colors = {
            name: f"#{color.tobytes().hex()}"
            for name, color in zip(ontology.names, ontology.palette(), strict=True)
        }
        return write_stats_page(
            told,
            place,
            title=f"Figures of {told['table'].rstrip('/').rpartition('/')[2]}",
            colors=colors,
            quality_hint=f"{SCORES[found.score][0].upper()}{SCORES[found.score][1:]}.",
            notes=notes,
        )

    def _sample(self, record: TableRecord, view: TableView | None) -> tuple[Measured, list[str]]:
        """The images with truth, and what to tell of them."""
        from pipeline.evaluation.estimate import measure_sample
        from pipeline.evaluation.truth import find_truth
        from pipeline.review.chance import reviewed_by_chance

        assert self.estimate is not None
        table, notes = open_storage(self.table), []
        reviewed = reviewed_by_chance(self.table, self.estimate)
        truth = find_truth(self.estimate, table, record.ontology)
        if reviewed is not None:
            truth = truth.only(reviewed.ids)
            if reviewed.chosen:
                notes.append(
                    f"Left out of those that were reviewed: {reviewed.chosen:,} that were chosen as doubtful."
                )
            if reviewed.rejected:
                notes.append(
                    f"Rejected of those by chance, and so without truth: {reviewed.rejected:,}. The table is "
                    "less right than this."
                )
        return measure_sample(table, truth, view=view), notes

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

    def _tell(self, found: Profile, before: Profile | None, estimate: dict[str, Any] | None) -> None:
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
        for name, spread in (
            (f"quality ({SCORES[found.score]})", found.quality),
            ("agreement", found.agreement),
        ):
            if spread.count:
                told.print(_spread(name, spread))
        if before is not None:
            assert self.against is not None
            told.print(f"Since {open_storage(self.against).uri}, {before.quality.count:,} labelled images:")
            told.print(*(f"  {line}" for line in self._drift_lines(before, found)), sep="\n")
        if estimate is not None:
            told.print(*_estimate_lines(estimate), sep="\n")

    def _drift_lines(self, before: Profile, found: Profile) -> list[str]:
        from pipeline.table.drift import compare_labels

        lines = compare_labels(before, found).sentences()
        bits = quality_divergence(before, found)
        if before.score != found.score:
            lines.append("Quality is not compared: an older version stored another score.")
        elif bits is not None:
            lines.append(f"The quality of the images diverges by {bits:.3f} bits.")
        return lines


def estimated(sample: Measured, found: Profile) -> dict[str, Any]:
    """What a sample with truth says of the whole table, as plain JSON values."""
    from pipeline.metrics.estimation import regression_estimate, safe_score, sample_estimate
    from pipeline.metrics.ranking import auroc, rank_correlation

    total, mean = found.quality.count, found.mean_quality
    assert mean is not None
    whole = regression_estimate(sample.quality, sample.miou, mean, total)
    good = sample.miou >= GOOD
    bound = safe_score(sample.quality, good, RISK)
    return {
        "sample": len(sample.miou),
        "image_miou": asdict(whole),
        "by_the_sample_alone": asdict(sample_estimate(sample.miou, total)),
        "confidence": 0.95,
        "rank_correlation": _defined(rank_correlation(sample.quality, sample.miou)),
        "auroc": _defined(auroc(sample.quality, good)),
        "good": GOOD,
        "risk": RISK,
        "min_quality": bound,
        "kept": None if bound is None else found.quality.share_from(bound),
    }


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value


def _estimate_lines(told: dict[str, Any]) -> Iterator[str]:
    whole, alone = told["image_miou"], told["by_the_sample_alone"]
    yield (
        f"Estimated from {told['sample']:,} images with truth: the mean IoU of an image is "
        f"{whole['mean']:.1%} ({told['confidence']:.0%} interval {whole['low']:.1%} to {whole['high']:.1%}; "
        f"without the quality {alone['low']:.1%} to {alone['high']:.1%})"
    )
    for note in told["notes"]:
        yield f"  {note}"
    rho = told["rank_correlation"]
    if rho is not None:
        yield f"  Quality ranks them by IoU with a correlation of {rho:.2f} (Spearman)."
    if told["min_quality"] is None:
        return
    yield (
        f"  Quality from {told['min_quality']:.3f}, {told['kept']:.0%} of the images: the chance that one "
        f"is among them and yet right to less than {told['good']:g} is at most {told['risk']:.0%}."
    )


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
