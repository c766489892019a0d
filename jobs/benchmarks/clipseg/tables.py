"""CLIPSeg's tables: referring expressions, generalised zero-shot, one-shot, text and generalised prompts.

A row is measured if its dataset and weights are given (``jobs.benchmarks.clipseg.models``). In the path of
the weights, ``{fold}`` stands for the fold (0 to 3) and ``{unseen}`` for the number of unseen classes: the
paper trained one model for each. Every table is followed by breakdowns by object size, class, phrase and kind
of prompt where these apply, and by image size if sizes other than the paper's are requested.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.benchmarks.clipseg.bench import SIDE, Bench, Figures, Values, can_run, root_names
from jobs.benchmarks.clipseg.breakdowns import Parts, breakdown_sections, size_section
from jobs.benchmarks.rows import row
from jobs.benchmarks.tables import Request, why_not_measured
from jobs.console import Progress
from models.errors import MaskMillError, WrongUse
from pipeline.datasets.oneshot import BENCHMARKS, draw_episodes
from pipeline.datasets.zeroshot import zero_shot_split
from pipeline.evaluation.published import PublishedTable, Row, load_published
from pipeline.evaluation.results import Row as Line
from pipeline.evaluation.results import Section
from pipeline.metrics.breakdown import CLASS, PROMPT
from pipeline.metrics.names import STANDARD

if TYPE_CHECKING:
    from pipeline.datasets.phrasecut import PhraseCutDataset

SEED = 0
"""Seed for episodes and example images. The reference draws them without a seed."""

_TITLES = {
    "phrasecut": "PhraseCut, text prompts",
    "phrasecut/visual": "PhraseCut, image prompts",
    "pascal5i": "Pascal-5i, image prompts",
    "pascal5i/text": "Pascal-5i, text prompts",
    "coco20i": "COCO-20i, image prompts",
    "voc21/unseen10": "PASCAL VOC, 10 unseen classes",
    "voc21/unseen4": "PASCAL VOC, 4 unseen classes",
    "lvis/affordances": "Affordances",
    "lvis/attributes": "Attributes",
    "lvis/meronymy": "Parts (meronymy)",
}


def referring(request: Request) -> Iterator[Section]:
    """Table 3: PhraseCut by text."""
    return _sections("clipseg_referring", request, _phrasecut)


def zero_shot(request: Request) -> Iterator[Section]:
    """Table 4: all 21 classes of PASCAL VOC by name."""
    return _sections("clipseg_zero_shot", request, _zero_shot, _zero_shot_rows)


def one_shot(request: Request) -> Iterator[Section]:
    """Table 5: Pascal-5i by example image."""
    return _sections("clipseg_one_shot_pascal", request, _one_shot)


def one_shot_coco(request: Request) -> Iterator[Section]:
    """Table 6: COCO-20i by example image."""
    return _sections("clipseg_one_shot_coco", request, _one_shot)


def text_pascal(request: Request) -> Iterator[Section]:
    """Table 7: Pascal-5i by text."""
    return _sections("clipseg_text_pascal", request, _one_shot)


def generalised(request: Request) -> Iterator[Section]:
    """Table 8: prompts that name no class."""
    return _sections("clipseg_generalised_prompts", request, _generalised)


def ablation(request: Request) -> Iterator[Section]:
    """Table 9: PhraseCut by text and by example image."""
    return _sections("clipseg_ablation", request, _phrasecut)


# --- how a row is measured ----------------------------------------------------------------------------------


def _phrasecut(bench: Bench, setting: str, line: Row, side: int) -> Figures:
    from pipeline.evaluation.prompts.protocols import VISUAL_PROMPT, phrase_image_queries, phrase_queries

    dataset: PhraseCutDataset = bench.dataset(setting)
    limit = bench.request.limit
    if setting == "phrasecut/visual":
        # The model trained on highlighted examples is also prompted with them.
        style = "blur_highlight" if line.method.endswith("highlight mask") else VISUAL_PROMPT
        queries = phrase_image_queries(dataset, style=style, limit=limit, seed=SEED, side=side)
    else:
        queries = phrase_queries(dataset, limit=limit, side=side)
    return bench.figures(setting, [bench.foreground(setting, line, queries, "images", side=side)])


def _one_shot(bench: Bench, setting: str, line: Row, side: int) -> Figures:
    from pipeline.evaluation.prompts.protocols import coco_queries, pascal_queries

    dataset = bench.dataset(setting)
    name, _, task = setting.partition("/")
    benchmark = BENCHMARKS[name]
    names = [sample.name for sample in dataset.samples]
    folds = []
    for fold in range(len(benchmark.folds)):
        episodes = draw_episodes(
            benchmark, fold, names, bench.areas(setting), seed=SEED, episodes=bench.request.limit or None
        )
        # The vision tower encodes the image once, so text prompts as well cost next to nothing.
        if name == "coco20i":
            queries = coco_queries(dataset, episodes, also_text=True, side=side)
        elif task == "text":
            queries = pascal_queries(dataset, episodes, style=None, side=side)
        else:
            queries = pascal_queries(dataset, episodes, also_text=True, side=side)
        folds.append(bench.foreground(setting, line, queries, "episodes", fold=fold, side=side))
    return bench.figures(setting, folds)


def _zero_shot(bench: Bench, setting: str, line: Row, side: int) -> Figures:
    from pipeline.evaluation.prompts.protocols import (
        RELEASED_SCORER,
        ZERO_SHOT_NAMES,
        zero_shot_confusion,
        zero_shot_metrics,
    )
    from pipeline.metrics.confusion import iou_per_class

    dataset = bench.dataset(setting)
    unseen = setting.partition("/unseen")[2]
    model = bench.model(line, unseen=unseen)
    own = "{unseen}" in bench.request.weights[line.title]

    def run(progress: Progress) -> dict[str, Any]:
        found = zero_shot_confusion(model, dataset, limit=bench.request.limit, side=side, progress=progress)
        return {"confusion": found.tolist()}

    # A model that serves both numbers of unseen classes is run only once.
    name = f"voc21 {f'unseen{unseen} ' if own else ''}{line.title}"
    identity = {"images": dataset.fingerprint(), "weights": model.fingerprint}
    found = bench.measured(name, identity, "images", run, side=side)
    confusion = np.array(found["confusion"], np.int64)
    split = f"pascal-unseen{unseen}"
    unseen_ids = zero_shot_split(split).unseen_ids
    values = zero_shot_metrics(confusion, unseen_ids)
    released = zero_shot_metrics(confusion, zero_shot_split(RELEASED_SCORER[split]).unseen_ids)
    return Figures(
        values | {f"released_{metric}": value for metric, value in released.items()},
        {
            CLASS: {
                f"{word}{' (unseen)' if number in unseen_ids else ''}": {"iou": float(iou)}
                for number, (word, iou) in enumerate(
                    zip(ZERO_SHOT_NAMES, iou_per_class(confusion), strict=True)
                )
            }
        },
    )


def _generalised(bench: Bench, setting: str, line: Row, side: int) -> Figures:
    from pipeline.evaluation.prompts.generalised import generalised_queries

    dataset, prompts = bench.dataset(setting), bench.generalised(setting)
    queries = generalised_queries(dataset, prompts, limit=bench.request.limit, side=side)
    if not queries:
        raise WrongUse(
            "dataset_invalid",
            f"No image of {dataset.name} ({dataset.split}) shows what "
            f"{', '.join(repr(match.prompt.text) for match in prompts)} mean.",
            "Give data with such classes, as LVIS and COCO have them.",
        )
    counted = bench.foreground(setting, line, queries, "images", side=side)
    # The notebook behind the table labels the foreground IoU "mIoU".
    return bench.figures(setting, [counted], renamed={"miou": "iou_fg"})


def _zero_shot_rows(
    title: str, values: Values, published: Mapping[str, float], source: str | None, missing: str | None
) -> list[Line]:
    """A measured row three times, because the order of the paper's columns is uncertain."""
    ours = {metric: value for metric, value in values.items() if not metric.startswith("released_")}
    rows = [_row(title, ours, published, source, missing)]
    if values:
        exchanged = {_EXCHANGED.get(metric, metric): value for metric, value in published.items()}
        rows.append(_row(f"{title}, published columns exchanged", ours, exchanged, source, None))
        released = {_EXCHANGED.get(metric, metric): values[f"released_{metric}"] for metric in ours}
        rows.append(_row(f"{title}, counted as the released scorer does", released, published, source, None))
    return rows


_EXCHANGED = {"miou_seen": "miou_unseen", "miou_unseen": "miou_seen"}


# --- shared by the tables -----------------------------------------------------------------------------------

Measure = Callable[[Bench, str, Row, int], Figures]
Rows = Callable[[str, Values, Mapping[str, float], "str | None", "str | None"], list[Line]]


def _row(
    title: str, values: Values, published: Mapping[str, float], source: str | None, missing: str | None
) -> Line:
    runs = {metric: [value] for metric, value in values.items()}
    return row(title, runs, published=published, source=source, missing=missing)


def _one_row(
    title: str, values: Values, published: Mapping[str, float], source: str | None, missing: str | None
) -> list[Line]:
    return [_row(title, values, published, source, missing)]


def _sections(name: str, request: Request, measure: Measure, rows: Rows = _one_row) -> Iterator[Section]:
    """One section per dataset of a published table, one row (or more, see ``rows``) per method.

    Each section is followed by its breakdowns. Kinds of prompts come last, as some tables have them as
    settings of one dataset. The request is checked at once; sections are measured lazily.
    """
    table = load_published(name)
    return _measured(table, Bench(request, table), measure, rows)


def _measured(table: PublishedTable, bench: Bench, measure: Measure, rows: Rows) -> Iterator[Section]:
    request = bench.request
    kinds: dict[str, dict[str, Parts]] = {}
    for setting in dict.fromkeys(column.dataset for column in table.columns):
        base = setting.partition("/")[0]
        if request.datasets and not {*root_names(setting), setting, base} & set(request.datasets):
            continue
        metrics = table.metrics(setting)
        found: list[Line] = []
        parts: dict[str, Parts] = {}
        sides: dict[str, dict[int, tuple[Values, str | None]]] = {}
        for line in table.rows:
            published = table.shares(line, setting)
            if not published and not can_run(line):
                continue  # the paper reports this method on another dataset only
            title = line.title
            figures, missing = _attempt(bench, setting, line, measure, SIDE)
            source = str(table.source_of(line)) if published else None
            found += rows(title, figures.values, published, source, missing)
            if not figures.values:
                continue
            parts[title] = {key: groups for key, groups in figures.parts.items() if key != PROMPT}
            for kind, group in figures.parts.get(PROMPT, {}).items():
                kinds.setdefault(base, {}).setdefault(title, {}).setdefault(PROMPT, {})[kind] = group
            sides[title] = {SIDE: (figures.values, None)}
            for side in set(request.image_sizes) - {SIDE}:
                at_side, missing = _attempt(bench, setting, line, measure, side)
                sides[title][side] = at_side.values, missing
        extra = (
            ["hiou", "miou"]
            if setting.startswith("voc21/")
            else [f"{metric}_{STANDARD}" for metric in metrics]
        )
        place = setting.replace("/", "-")
        yield Section(
            name=place,
            title=_TITLES[setting],
            note=bench.note(setting),
            chart="bars",
            metrics=(*metrics, *extra),
            rows=tuple(found),
        )
        yield from breakdown_sections(place, _TITLES[setting], parts)
        if request.image_sizes and sides:
            yield size_section(place, _TITLES[setting], metrics, sides, SIDE)
    for base, by_row in kinds.items():
        yield from breakdown_sections(base, _TITLES[base].partition(",")[0], by_row)


def _attempt(
    bench: Bench, setting: str, line: Row, measure: Measure, side: int
) -> tuple[Figures, str | None]:
    """The figures of a row, or the reason for having none."""
    rows = bench.request.rows
    if not can_run(line):
        return Figures(), None
    if rows and not any(part in line.title for part in rows):
        return Figures(), "not asked for"
    lacking = bench.lacking(setting, line)
    if lacking:
        return Figures(), lacking
    try:
        return measure(bench, setting, line, side), None
    except MaskMillError as error:
        return Figures(), why_not_measured(error)


TABLES: Mapping[str, tuple[str, Callable[[Request], Iterator[Section]]]] = {
    "clipseg-referring": ("CLIPSeg: referring expressions on PhraseCut", referring),
    "clipseg-zero-shot": ("CLIPSeg: generalised zero-shot segmentation on PASCAL VOC", zero_shot),
    "clipseg-one-shot": ("CLIPSeg: one-shot segmentation on Pascal-5i, image prompts", one_shot),
    "clipseg-one-shot-coco": ("CLIPSeg: one-shot segmentation on COCO-20i, image prompts", one_shot_coco),
    "clipseg-text-pascal": ("CLIPSeg: Pascal-5i with text prompts", text_pascal),
    "clipseg-generalised": ("CLIPSeg: affordances, attributes and parts on LVIS or COCO", generalised),
    "clipseg-ablation": ("CLIPSeg: ablation on PhraseCut, text and image prompts", ablation),
}
