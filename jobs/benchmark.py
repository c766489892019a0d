"""``maskmill benchmark NAME``: the rows of a paper's table, ours beside the published ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from jobs.benchmarks import clipseg, maskclip, prompt_strategies
from jobs.console import stderr_console
from models.errors import MaskMillError, WrongUse
from pipeline.evaluation.results import (
    REPORT_FILE,
    ROWS,
    SCHEMA_VERSION,
    claim_folder,
    command,
    hardware,
    new_folder,
    now,
    write_result,
)
from pipeline.labelling.recipes import change_recipe, load_recipe
from pipeline.report.results_page import write_report
from pipeline.tracking.results import log_result
from pipeline.tracking.tracker import open_tracker

TOYWORLD, CONCEPTS = "toyworld", "concepts"

_TABLES = {**maskclip.TABLES, **clipseg.TABLES, **prompt_strategies.TABLES}


@dataclass(frozen=True, kw_only=True)
class BenchmarkJob:
    """Everything that a benchmark is asked for.

    Attributes:
        name: a key of ``benchmarks()``.
        roots: folder by dataset, ``DIR`` or ``DIR#SPLIT``.
        labels: label table by row.
        weights: weights by row.
        settings: recipe fields that hold for all rows.
        rows: only rows whose name holds one of these.
        datasets: only these.
        limit: images of each dataset at most; 0 is all.
        image_sizes: CLIPSeg's tables: sides of the network's input besides the paper's.
        images: folder, glob or list for ``concepts``.
        concepts: name of a prompt list, or the prompts themselves.
        recipe: for ``concepts``.
        seeds: number of scene sets of the toy world.
        scenes: scenes of each of them.
        output: folder for the result; None makes one below ``results/``.
        overwrite: whether an earlier result there may be replaced.
        tracking: MLflow URI, None for the default, ``off`` for none.
    """

    name: str
    roots: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    weights: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: Sequence[str] = ()
    datasets: Sequence[str] = ()
    limit: int = 0
    image_sizes: Sequence[int] = ()
    images: str | None = None
    concepts: str = "sports"
    recipe: str = "maskclip"
    seeds: int = 5
    scenes: int = 60
    output: str | Path | None = None
    overwrite: bool = False
    tracking: str | None = "off"


def benchmarks() -> dict[str, str]:
    """Name and description of every benchmark."""
    return {
        TOYWORLD: "The papers' claims at toy scale, with confidence intervals (no downloads)",
        **{name: description for name, (description, _) in _TABLES.items()},
        CONCEPTS: "Fine-grained and novel concepts: a prompt list over any images, as pictures",
    }


def run(job: BenchmarkJob, console: Console | None = None) -> int:
    """Run a benchmark, write its result folder, track it, print it. Returns the exit status.

    Raises:
        MaskMillError: ``dataset_unknown``, ``output_exists``, and what a single row cannot help.
    """
    console = console or stderr_console()
    if job.name not in benchmarks():
        raise WrongUse(
            "dataset_unknown",
            f"There is no benchmark {job.name!r}.",
            f"Known: {', '.join(benchmarks())}.",
        )
    if job.limit < 0 or job.scenes < 1:
        raise WrongUse(
            "wrong_use",
            f"--limit {job.limit} --scenes {job.scenes}: there is no such number of images.",
            "Use --limit 0 for all, and --scenes 1 or more.",
        )
    if job.image_sizes and job.name not in clipseg.TABLES:
        raise WrongUse(
            "wrong_use",
            f"--image-size: {job.name} has one size, its protocol's.",
            f"It belongs to {', '.join(clipseg.TABLES)}.",
        )
    asked = ("roots", "labels", "weights", "settings", "datasets", "limit")
    if job.name == TOYWORLD and any(getattr(job, name) for name in asked):
        raise WrongUse(
            "wrong_use",
            "The toy world's rows are fixed: only --row, --seeds and --scenes change them.",
            "Leave the other options out.",
        )
    with open_tracker(job.tracking) as tracker:
        folder = new_folder(job.output, job.name, overwrite=job.overwrite)
        tracker.start("benchmark", job.name, params=_settings(job))
        claim_folder(folder, overwrite=job.overwrite)
        record = _record(job, folder, console)
        write_result(folder, record)
        page = write_report([folder], folder / REPORT_FILE)
        log_result(tracker, folder)
        _print(record, console)
    console.print(
        f"Result         {folder}/benchmark.json ({record['seconds']:.0f} s)\n"
        f"Look at it:    {page.resolve().as_uri()}",
        highlight=False,
        soft_wrap=True,
    )
    figures = [line["values"] for section in record["sections"] for line in section["rows"]]
    measured = any(value["mean"] is not None for values in figures for value in values.values())
    return 0 if measured else 1


def _settings(job: BenchmarkJob) -> dict[str, Any]:
    """What was asked for, as parameters of the tracked run."""
    asked = dataclasses.asdict(job)
    for name in ("tracking", "overwrite", "output"):
        del asked[name]
    return {name: value for name, value in asked.items() if value not in (None, (), {}, 0)}


def _record(job: BenchmarkJob, folder: Path, console: Console) -> dict[str, Any]:
    """Run the rows; the content of ``benchmark.json``."""
    began = time.monotonic()
    claims: list[dict[str, Any]] = []
    pictures: list[dict[str, Any]] = []
    if job.name == TOYWORLD:
        sections, claims = _toyworld(job, folder, console)
    elif job.name == CONCEPTS:
        sections, pictures = _concepts(job, folder, console)
    else:
        sections = _paper(job, folder, console)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "benchmark",
        "name": job.name,
        "title": benchmarks()[job.name],
        "created": now(),
        "command": command(),
        "hardware": hardware(),
        "seconds": round(time.monotonic() - began, 1),
        "toy": job.name == TOYWORLD or "toy" in (job.recipe, str(job.settings.get("model"))[:3]),
        "sections": sections,
        "claims": claims,
        "pictures": pictures,
    }


def _toyworld(
    job: BenchmarkJob, folder: Path, console: Console
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from jobs.benchmarks import toy_prompts, toy_students
    from jobs.benchmarks.toyworld import SECTIONS, SEEDS, Bench

    if not 2 <= job.seeds <= len(SEEDS):
        raise WrongUse(
            "wrong_use",
            f"--seeds {job.seeds} gives no confidence interval that means something.",
            f"Use 3 to {len(SEEDS)} (2 at least).",
        )
    names = (
        *(section.__name__ for section in SECTIONS),
        toy_students.SECTION,
        toy_prompts.SECTION,
    )
    wanted = [name for name in names if not job.rows or any(row in name for row in job.rows)]
    if not wanted:
        raise WrongUse(
            "wrong_use",
            f"The toy world has no section {', '.join(job.rows)}.",
            f"Known: {', '.join(names)}.",
        )
    seeds = SEEDS[: job.seeds]
    sections, claims = [], []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("conditions", total=None)
        bench = Bench(seeds, job.scenes, lambda done: bar.update(task, completed=done), workers=_cores())
        try:
            for run_section in SECTIONS:
                if run_section.__name__ not in wanted:
                    continue
                section, found = run_section(bench)
                sections.append(section)
                claims += found
                bar.update(task, description=section["title"])
        finally:
            bench.close()
    for part, train in ((toy_students, toy_students.students), (toy_prompts, toy_prompts.prompts)):
        if part.SECTION not in wanted:
            continue
        # Their own progress is shown, and a benchmark that is run again goes on with what is trained.
        try:
            made, found = train(seeds[: part.MOST_SEEDS], job.scenes, folder / ROWS / part.SECTION, console)
        except MaskMillError as error:
            # Hours of other rows must not be lost to a training that failed.
            made, found = [part.missing(str(error))], []
        sections += made
        claims += found
    return sections, claims


def _paper(job: BenchmarkJob, folder: Path, console: Console) -> list[dict[str, Any]]:
    request = maskclip.Request(
        folder=folder,
        console=console,
        roots=job.roots,
        labels=job.labels,
        weights=job.weights,
        settings=job.settings,
        rows=job.rows,
        datasets=job.datasets,
        limit=job.limit,
        image_sizes=job.image_sizes,
    )
    return list(_TABLES[job.name][1](request))


def _concepts(
    job: BenchmarkJob, folder: Path, console: Console
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    from jobs.benchmarks.concepts import ConceptRequest, run_concepts
    from pipeline.ontology.concepts import CONCEPTS as LISTS
    from pipeline.ontology.concepts import ConceptList

    if job.images is None:
        raise WrongUse(
            "wrong_use", "concepts needs images.", "Give --images DIR: the paper's are not distributed."
        )
    if job.concepts in LISTS:
        concepts = LISTS[job.concepts]
    else:
        prompts = tuple(dict.fromkeys(part.strip() for part in job.concepts.split(",") if part.strip()))
        if len(prompts) < 2:
            raise WrongUse(
                "wrong_use",
                f"--concepts {job.concepts!r} is neither a list of at least two prompts nor a known name.",
                f"Write --concepts 'a red car, a road', or one of {', '.join(LISTS)}.",
            )
        concepts = ConceptList(prompts, ())
    recipe = change_recipe(load_recipe(job.recipe), job.settings)
    section, pictures = run_concepts(ConceptRequest(job.images, concepts, recipe, job.limit, folder, console))
    return [section], pictures


def _cores() -> int:
    return hardware()["cores"] or 1


def _print(record: dict[str, Any], console: Console) -> None:
    toy = " (a toy: it says nothing about photographs)" if record["toy"] else ""
    console.print(f"[bold]{record['title']}[/bold]{toy}", highlight=False)
    for section in record["sections"]:
        table = Table(title=section["title"], title_justify="left", caption=section["note"] or None)
        table.add_column("row")
        published = {metric for line in section["rows"] for metric in line["published"]}
        for metric in section["metrics"]:
            table.add_column(f"{metric}\nours", justify="right")
            if metric in published:
                table.add_column("\npublished", justify="right")
        lacking = any(line["missing"] for line in section["rows"])
        if lacking:
            table.add_column("missing")
        for line in section["rows"]:
            cells = []
            for metric in section["metrics"]:
                cells.append(_cell(line["values"].get(metric)))
                if metric in published:
                    figure = line["published"].get(metric)
                    cells.append("" if figure is None else f"{100 * figure:.1f}")
            table.add_row(line["name"], *cells, *([line["missing"] or ""] if lacking else []))
        console.print(table)
    if record["claims"]:
        table = Table(title="Claims", title_justify="left")
        for column in ("shows", "claim", "measured"):
            table.add_column(column)
        for entry in record["claims"]:
            shows = {True: "yes", False: "[bold]no[/bold]", None: "–"}[entry["shows"]]
            table.add_row(shows, entry["claim"], entry["detail"])
        console.print(table)


def _cell(value: dict[str, Any] | None) -> str:
    if value is None or value["mean"] is None:
        return ""
    mean = f"{100 * value['mean']:.1f}"
    return mean if value["low"] is None else f"{mean} ± {50 * (value['high'] - value['low']):.1f}"
