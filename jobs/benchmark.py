"""``maskmill benchmark NAME``: reproduce a paper's table next to its published figures."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tyro.conf import Positional, UseAppendAction, arg

from jobs.benchmarks import maskclip, unified
from jobs.benchmarks.clipseg import tables as clipseg
from jobs.benchmarks.clipseg import visual_prompts
from jobs.benchmarks.tables import Request
from jobs.console import duration, stderr_console, timed
from jobs.options import Flag, Maybe, Repeated, Settings, Tracking, comma_separated, named_values
from models.errors import MaskMillError, WrongUse, did_you_mean
from pipeline.corpus.manifest import ADDRESS, build_manifest
from pipeline.evaluation.results import (
    REPORT_FILE,
    ROWS,
    BenchmarkResult,
    Claim,
    Picture,
    Section,
    Value,
    claim_folder,
    hardware,
    new_folder,
    write_result,
)
from pipeline.files.records import now
from pipeline.files.redaction import command_line
from pipeline.labelling.recipes import load_recipe, parse_settings
from pipeline.metrics.names import metric_label, percent
from pipeline.report.results_page import write_report
from pipeline.tracking.names import place_name, run_name
from pipeline.tracking.results import log_result
from pipeline.tracking.tracker import open_tracker

if TYPE_CHECKING:
    from pipeline.labelling.recipes import LabelRecipe
    from pipeline.ontology.concepts import ConceptList

TOYWORLD, CONCEPTS = "toyworld", "concepts"
TOY_SECTIONS = (
    "heads", "refinement", "refiners", "classes", "sizes", "corruptions", "words", "vocabulary", "students",
    "prompts",
)  # fmt: skip
"""Sections that ``--row`` selects: functions in ``toyworld.labelling`` and ``choosing``, and the two
trainings."""
TOY_SEEDS = (11, 12, 13, 14, 15)
"""Scene sets not used by the training (0), the model card (1) or the demo (2026)."""

_TABLES = {**maskclip.TABLES, **unified.TABLES, **clipseg.TABLES, **visual_prompts.TABLES}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Measure the rows of a table and print them next to the published figures. "list" lists the tables.

    Attributes:
        name: toyworld, maskclip, unified, …; list shows all.
        roots: a dataset's folder, plus #SPLIT for another split: --root voc20=DIR#train; may be repeated.
        labels: a label table for a row that cannot be labelled here: --labels "MaskCLIP+ (RN50)@voc20=TABLE".
        weights: weights of a row's model: --weights "CLIPSeg (PC+)=rd64-uni.pth".
        settings: a recipe field for all rows, such as pretrained=random:0 for a dry run; may be repeated.
        rows: only rows whose name contains this (toyworld: sections, such as students); may be repeated.
        datasets: only this dataset; may be repeated.
        images: concepts: folder, glob or list file of images.
        concepts: concepts: a list of the paper (batman, mario, sports, car-color, …) or "prompt, prompt, …".
        recipe: concepts, unified: the recipe to measure; --set changes it. Without it, unified measures the
            published methods.
        protocol: unified: the protocol of MaskCLIP's successors, its own (seed), or both in sections apart.
        quick: unified: 200 random images of voc20, unless --dataset or --limit say otherwise.
        limit: at most this many images per dataset (one-shot: episodes; prompt-strategies: objects).
        image_sizes: clipseg-…: also measure at this side of the network's input; may be repeated.
        seeds: toyworld: number of scene sets, for the confidence intervals.
        scenes: toyworld: scenes per set.
        output: folder for the result; run again with the same folder to resume. Default: below results/.
        overwrite: replace the result in --output.
    """

    name: Annotated[Positional[str], arg(metavar="NAME")]
    roots: Annotated[Repeated, arg(name="root", metavar="DATASET=DIR")] = ()
    labels: Annotated[Repeated, arg(metavar="ROW=TABLE")] = ()
    weights: Annotated[Repeated, arg(metavar="ROW=PATH")] = ()
    settings: Settings = ()
    rows: Annotated[Repeated, arg(name="row")] = ()
    datasets: Annotated[Repeated, arg(name="dataset")] = ()
    images: Maybe[str] = None
    concepts: str = "sports"
    recipe: Maybe[str] = None
    protocol: Maybe[Literal["unified", "seed", "both"]] = None
    quick: Flag = False
    limit: int = 0
    image_sizes: Annotated[
        UseAppendAction[tuple[int, ...]], arg(name="image-size", help_behavior_hint="")
    ] = ()
    seeds: int = 5
    scenes: int = 60
    output: Maybe[str] = None
    overwrite: Flag = False
    tracking: Tracking = None

    def run(self, console: Console | None = None) -> int:
        """Run the benchmark, then write, track and print its result; or list the benchmarks.

        Raises:
            MaskMillError: ``name_unknown``, ``output_exists``, and errors that concern more than one row.
        """
        if self.name == "list":
            for name, description in benchmarks().items():
                print(f"{name:22} {description}")
            return 0
        name = self.name.replace("_", "-")
        if name not in benchmarks():
            raise WrongUse(
                "name_unknown",
                f"There is no benchmark {name!r}.",
                f"{did_you_mean(name, [*benchmarks(), 'list'])}Known: {', '.join(benchmarks())}.",
            )
        console = console or stderr_console()
        folder = new_folder(self.output, name, overwrite=self.overwrite)
        plan = {TOYWORLD: _plan_toyworld, CONCEPTS: _plan_concepts}.get(name, _plan_table)
        measure = plan(self, name, folder, console)
        with open_tracker(self.tracking, waiting=functools.partial(timed, console)) as tracker:
            tracker.start("benchmark", self._run_name(name), params=_params(self))
            claim_folder(folder, overwrite=self.overwrite)
            began = time.monotonic()
            measured = measure()
            result = BenchmarkResult(
                name=name,
                title=benchmarks()[name],
                created=now(),
                command=command_line(),
                hardware=hardware(),
                seconds=round(time.monotonic() - began, 1),
                toy=name == TOYWORLD or self._uses_toy_model(),
                sections=tuple(measured.sections),
                claims=tuple(measured.claims),
                pictures=tuple(measured.pictures),
            )
            write_result(folder, result)
            with timed(console, "writing the page"):
                page = write_report([folder], folder / REPORT_FILE)
            log_result(tracker, folder)
            _print(result, console)
        console.print(
            f"Result         {folder}/benchmark.json (measured in {duration(result.seconds or 0.0)})\n"
            f"Look at it:    {page.resolve().as_uri()}",
            highlight=False,
            soft_wrap=True,
        )
        figures = [line.values for section in result.sections for line in section.rows]
        if any(value.mean is not None for row in figures for value in row.values()):
            return 0
        console.print("Nothing was measured: the table says what each row lacks.", style="bold red")
        return 1

    def _run_name(self, name: str) -> str:
        """Of the tracked run: the table, the changed settings, and the datasets that it has."""
        if name == CONCEPTS:
            return run_name("benchmark", f"{name} {self.recipe or 'maskclip'}", place_name(self.images or ""))
        data = self.datasets or tuple(named_values("--root", self.roots, last=False))
        words = (name, *([self.recipe] if self.recipe else []), *self.rows, *self.settings)
        return run_name("benchmark", " ".join(words), ", ".join(data))

    def _uses_toy_model(self) -> bool:
        return self.recipe == "toy" or str(parse_settings(self.settings).get("model")).startswith("toy")


@dataclass(frozen=True)
class Measured:
    """Results of a benchmark."""

    sections: list[Section]
    claims: list[Claim] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


Measure = Callable[[], Measured]
"""Runs a benchmark whose command line has already been validated."""


def benchmarks() -> dict[str, str]:
    """Name and description of every benchmark."""
    return {
        TOYWORLD: "The papers' claims at toy scale, with confidence intervals (no downloads)",
        **{name: description for name, (description, _) in _TABLES.items()},
        CONCEPTS: "Fine-grained and novel concepts: a prompt list over any images, as pictures",
    }


def _params(options: Benchmark) -> dict[str, Any]:
    """The options in use, as parameters of the tracked run."""
    params = dataclasses.asdict(options)
    for name in ("tracking", "overwrite", "output"):
        del params[name]
    return {name: value for name, value in params.items() if value not in (None, (), 0)}


def _plan_toyworld(options: Benchmark, _name: str, folder: Path, console: Console) -> Measure:
    _refuse_recipe(options)
    if any(
        (options.roots, options.labels, options.weights, options.settings, options.datasets, options.limit)
    ):
        raise WrongUse(
            "wrong_use",
            "The toy world's rows are fixed: only --row, --seeds and --scenes change them.",
            "Leave the other options out.",
        )
    _refuse_sizes(options)
    if options.scenes < 1:
        raise WrongUse("wrong_use", f"--scenes {options.scenes} is too few.", "Use --scenes 1 or more.")
    if not 2 <= options.seeds <= len(TOY_SEEDS):
        raise WrongUse(
            "wrong_use",
            f"--seeds {options.seeds} gives no meaningful confidence interval.",
            f"Use 3 to {len(TOY_SEEDS)} (at least 2).",
        )
    unknown = [row for row in options.rows if not any(row in name for name in TOY_SECTIONS)]
    if unknown:
        raise WrongUse(
            "wrong_use",
            f"--row {unknown[0]}: the toy world has no such section.",
            f"{did_you_mean(unknown[0], TOY_SECTIONS)}Sections: {', '.join(TOY_SECTIONS)}.",
        )
    names = [name for name in TOY_SECTIONS if not options.rows or any(row in name for row in options.rows)]
    return functools.partial(_toyworld, names, TOY_SEEDS[: options.seeds], options.scenes, folder, console)


def _toyworld(
    names: Sequence[str], seeds: Sequence[int], scenes: int, folder: Path, console: Console
) -> Measured:
    from jobs.benchmarks.toyworld import choosing, labelling, prompts, students

    measured = Measured([])
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("conditions", total=None)
        cores = hardware().cores or 1
        bench = labelling.Bench(seeds, scenes, lambda done: bar.update(task, completed=done), workers=cores)
        try:
            for name in names:
                if name in (students.SECTION, prompts.SECTION):
                    continue
                measure = choosing.SECTIONS.get(name) or getattr(labelling, name)
                section, claims = measure(bench)
                measured.sections.append(section)
                measured.claims.extend(claims)
                bar.update(task, description=section.title)
        finally:
            bench.close()
    for part, train in ((students, students.students), (prompts, prompts.prompts)):
        if part.SECTION not in names:
            continue
        # Both show their own progress, and a second run reuses finished trainings.
        try:
            sections, claims = train(seeds[: part.MOST_SEEDS], scenes, folder / ROWS / part.SECTION, console)
        except MaskMillError as error:
            # A failed training must not discard hours of other rows.
            sections, claims = [part.missing(str(error))], []
        measured.sections.extend(sections)
        measured.claims.extend(claims)
    return measured


def _plan_table(options: Benchmark, name: str, folder: Path, console: Console) -> Measure:
    _refuse_negative_limit(options)
    if name not in clipseg.TABLES:
        _refuse_sizes(options)
    if name not in unified.TABLES:
        _refuse_recipe(options)
    request = Request(
        folder=folder,
        console=console,
        roots=named_values("--root", options.roots, last=False),
        labels=named_values("--labels", options.labels),
        weights=named_values("--weights", options.weights),
        settings=parse_settings(options.settings),
        rows=options.rows,
        datasets=options.datasets,
        limit=options.limit,
        image_sizes=options.image_sizes,
        recipe=load_recipe(options.recipe, options.settings) if options.recipe else None,
        protocols=("unified", "seed") if options.protocol == "both" else (options.protocol or "unified",),
        quick=options.quick,
    )
    sections = _TABLES[name][1](request)
    return lambda: Measured(list(sections))


def _plan_concepts(options: Benchmark, _name: str, folder: Path, console: Console) -> Measure:
    from pipeline.ontology.concepts import CONCEPTS as LISTS
    from pipeline.ontology.concepts import ConceptList

    _refuse_sizes(options)
    _refuse_recipe(options)
    _refuse_negative_limit(options)
    if options.images is None:
        raise WrongUse(
            "wrong_use", "concepts needs images.", "Give --images DIR: the paper's are not distributed."
        )
    concepts = LISTS.get(options.concepts)
    if concepts is None:
        prompts = comma_separated(options.concepts)
        if len(prompts) < 2:
            raise WrongUse(
                "wrong_use",
                f"--concepts {options.concepts!r} is neither a known list nor two or more prompts.",
                f"Write --concepts 'a red car, a road', or one of {', '.join(LISTS)}.",
            )
        concepts = ConceptList(prompts, ())
    recipe = load_recipe(options.recipe or "maskclip", options.settings)
    say = functools.partial(console.print, highlight=False, soft_wrap=True)
    rows = build_manifest(options.images, notice=say).to_pylist()[: options.limit or None]
    addresses = {row["uri"]: row.get(ADDRESS) or row["uri"] for row in rows}
    return functools.partial(_concepts, addresses, concepts, recipe, folder, console)


def _concepts(
    addresses: Mapping[str, str],
    concepts: ConceptList,
    recipe: LabelRecipe,
    folder: Path,
    console: Console,
) -> Measured:
    from jobs.benchmarks.concepts import draw_concepts

    section, pictures = draw_concepts(addresses, concepts, recipe, folder, console)
    return Measured([section], pictures=pictures)


def _refuse_sizes(options: Benchmark) -> None:
    if options.image_sizes:
        raise WrongUse(
            "wrong_use",
            f"--image-size: the protocol of {options.name} fixes the size.",
            f"Use it with {', '.join(clipseg.TABLES)}.",
        )


def _refuse_recipe(options: Benchmark) -> None:
    given = {"--recipe": options.recipe, "--protocol": options.protocol, "--quick": options.quick}
    for flag, value in given.items():
        if value and not (flag == "--recipe" and options.name == CONCEPTS):
            raise WrongUse(
                "wrong_use",
                f"{flag}: the rows of {options.name} are fixed.",
                f"Use it with {', '.join(unified.TABLES)}.",
            )


def _refuse_negative_limit(options: Benchmark) -> None:
    if options.limit < 0:
        raise WrongUse(
            "wrong_use", f"--limit {options.limit} is not a number of images.", "Use --limit 0 for all."
        )


def _print(result: BenchmarkResult, console: Console) -> None:
    toy = " (a toy: it says nothing about photographs)" if result.toy else ""
    console.print(f"[bold]{result.title}[/bold]{toy}", highlight=False)
    for section in result.sections:
        table = Table(title=section.title, title_justify="left", caption=section.note or None)
        table.add_column("row")
        published = {metric for line in section.rows for metric in line.published}
        for metric in section.metrics:
            table.add_column(f"{metric_label(metric)} %\nours", justify="right")
            if metric in published:
                table.add_column("\npublished", justify="right")
        lacking = any(line.missing for line in section.rows)
        if lacking:
            table.add_column("missing")
        for line in section.rows:
            cells = []
            for metric in section.metrics:
                cells.append(_cell(line.values.get(metric)))
                if metric in published:
                    figure = line.published.get(metric)
                    cells.append("" if figure is None else percent(figure))
            table.add_row(line.name, *cells, *([line.missing or ""] if lacking else []))
        console.print(table)
    if result.claims:
        table = Table(title="Claims", title_justify="left")
        for column in ("shows", "claim", "measured"):
            table.add_column(column)
        for entry in result.claims:
            shows = {True: "yes", False: "[bold]no[/bold]", None: "–"}[entry.shows]
            table.add_row(shows, entry.claim, entry.detail)
        console.print(table)


def _cell(value: Value | None) -> str:
    if value is None or value.mean is None:
        return ""
    mean = percent(value.mean)
    if value.low is None or value.high is None:
        return mean
    return f"{mean} ± {percent((value.high - value.low) / 2)}"
