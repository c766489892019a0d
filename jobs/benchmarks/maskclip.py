"""MaskCLIP's tables: annotation-free, zero-shot, robustness; and how the rows of its kin are labelled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jobs.benchmarks.labelled import measure, note, open_limited
from jobs.benchmarks.resume import slug
from jobs.benchmarks.rows import row
from jobs.benchmarks.tables import Request, check_rows
from jobs.evaluate.protocol import protocol_recipe
from models.errors import WrongUse, did_you_mean
from pipeline.datasets.protocols import PROTOCOLS, get_protocol
from pipeline.datasets.registry import DATASETS
from pipeline.evaluation.published import PublishedTable, load_published
from pipeline.evaluation.results import Section
from pipeline.files.corruptions import CORRUPTIONS, LEVELS
from pipeline.labelling.recipes import RECIPES, LabelRecipe, change_recipe

MODELS: Mapping[str, str] = {
    "ViT-B/16": "ViT-B-16-quickgelu",
    "RN50": "RN50-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
}
FREE_SETTINGS = ("pretrained", "precision", "batch_size", "images.max_pixels")
"""What may be set for all rows. Everything else defines a row or is fixed by the protocol."""

METHODS: Mapping[str, dict[str, Any]] = {
    "unmodified CLIP": {"head": "plain"},
    "CLIP": {"head": "plain"},
    "MaskCLIP": {},
    "MaskCLIP + KS": {"ks_threshold": 1.0},
    "MaskCLIP + PD": {"pd_threshold": 0.5},
    "MaskCLIP + KS + PD": {"ks_threshold": 1.0, "pd_threshold": 0.5},
    "SCLIP": {"head": "sclip"},
    "ClearCLIP": {"head": "qq"},
    "NACLIP": {"head": "nn"},
    "NACLIP + PAMR": {"head": "nn", "refine": "pamr"},
    "SC-CLIP": {"head": "sc"},
    "PEARL": {"head": "pa", "refine": "tlp"},
}
"""Training-free rows: their changes to the recipe ``maskclip``."""


def annotation_free(request: Request) -> Iterator[Section]:
    """Context-59, COCO-Stuff and VOC-20 without annotations, under the seed protocol."""
    return _table(load_published("maskclip_annotation_free"), request)


def zero_shot(request: Request) -> Iterator[Section]:
    """Seen and unseen classes: training-free MaskCLIP next to methods trained on the seen ones."""
    return _table(load_published("maskclip_zero_shot"), request, extra=("MaskCLIP",))


def robustness(request: Request) -> Iterator[Section]:
    """Eight corruptions at five levels."""
    check_request(request, names=[name for name in PROTOCOLS if "seed" in PROTOCOLS[name]], rows=())
    check_rows(request, [f"MaskCLIP ({model})" for model in MODELS])
    return _robustness(request)


def _robustness(request: Request) -> Iterator[Section]:
    table = load_published("maskclip_robustness")
    known = {(figure.dataset, figure.model): figure for figure in table.figures()}
    for name in list(request.datasets) or ["context59"]:
        dataset, missing = open_limited(name, request)
        for model in _wanted(MODELS, request):
            rows = []
            conditions = [("clean", 0, "")] + [
                (corruption, level, f"{corruption}:{level}") for corruption in CORRUPTIONS for level in LEVELS
            ]
            for series, level, corruption in conditions:
                figure = known.get((f"{name}/{corruption}", model)) if corruption else None
                recipe = change_recipe(
                    seed_recipe(name, row_recipe("MaskCLIP", model, request)), {"corruption": corruption}
                )
                values, lacking = measure(
                    dataset,
                    recipe,
                    request,
                    file_name=f"{name}-{slug(model)}-{corruption.replace(':', '-') or 'clean'}",
                    protocol="custom" if corruption else None,
                    missing=missing,
                )
                rows.append(
                    row(
                        f"{series} {level}" if level else series,
                        values,
                        series=series,
                        x=level,
                        published={"miou": figure.share} if figure else None,
                        source=str(figure.source) if figure else None,
                        missing=lacking,
                    )
                )
                if dataset is None:
                    break  # the other rows lack the same
            yield Section(
                name=f"{name}-{slug(model)}",
                title=f"{DATASETS[name].description}: MaskCLIP {model}, corrupted",
                note=note(dataset, request),
                chart="lines",
                metrics=("miou", "pixel_accuracy"),
                rows=tuple(rows),
            )


def _table(table: PublishedTable, request: Request, *, extra: Sequence[str] = ()) -> Iterator[Section]:
    """One section per dataset of a published table, one row per method.

    The request is checked at once; sections are measured lazily.
    """
    settings = [
        setting
        for setting in dict.fromkeys(column.dataset for column in table.columns)
        if setting.partition("/")[0] in DATASETS
    ]
    titles = [line.title for line in table.rows]
    names = [setting.partition("/")[0] for setting in settings]
    check_request(request, names=names, rows=[f"{title}@{name}" for title in titles for name in names])
    check_rows(request, [*titles, *(f"{method} ({model})" for method in extra for model in MODELS)])
    return _table_sections(table, settings, request, extra)


def _table_sections(
    table: PublishedTable, settings: Sequence[str], request: Request, extra: Sequence[str]
) -> Iterator[Section]:
    for setting in settings:
        name, _, task = setting.partition("/")
        if request.datasets and name not in request.datasets:
            continue
        metrics = table.metrics(setting)
        dataset, missing = open_limited(name, request)
        rows = []
        published = [(line.method, line.model, line) for line in table.rows]
        ours = [(method, model, None) for method in extra for model in MODELS]
        for method, model, line in [*published, *ours]:
            title = f"{method} ({model})" if model else method
            figures = table.shares(line, setting) if line is not None else {}
            values: dict[str, list[float]] = {}
            lacking: str | None = None
            if not (figures or runs(method, model) or method.startswith("MaskCLIP+")):
                continue  # neither published nor measurable on this dataset
            if request.rows and not any(part in title for part in request.rows):
                lacking = "not asked for" if runs(method, model) else None
            elif f"{title}@{name}" in request.labels or runs(method, model):
                recipe = row_recipe(method, model, request) if runs(method, model) else None
                values, lacking = measure(
                    dataset,
                    # Zero-shot tables have other classes, so no protocol, but they use the seed's image size.
                    seed_recipe(name, recipe) if recipe is not None and task else recipe,
                    request,
                    file_name=f"{name}{'-' + task if task else ''}-{slug(title)}",
                    protocol=None if task else table.protocol,
                    labels=request.labels.get(f"{title}@{name}"),
                    zero_shot=name if task == "zero-shot" else None,
                    missing=missing,
                    metrics=metrics,
                )
            elif method.startswith("MaskCLIP+"):
                lacking = f"needs a trained student's labels: --labels '{title}@{name}=TABLE'"
            rows.append(
                row(
                    title,
                    values,
                    published=figures,
                    source=str(table.source_of(line)) if line is not None and figures else None,
                    missing=lacking,
                )
            )
        yield Section(
            name=f"{name}-{task}" if task else name,
            title=f"{DATASETS[name].description}{f', {task}' if task else ''}",
            note=" ".join([note(dataset, request), *table.notes]).strip(),
            chart="bars",
            metrics=tuple(metrics),
            rows=tuple(rows),
        )


def check_request(
    request: Request, *, names: Sequence[str], rows: Sequence[str], settings: bool = True
) -> None:
    """Refuse names unknown to the table, and settings that would redefine its rows.

    Args:
        request: what was asked for.
        names: of the datasets.
        rows: that take ``--labels``.
        settings: refuse settings, too.

    Raises:
        MaskMillError: ``wrong_use``.
    """
    for flag, given, known in (
        ("--root", request.roots, names),
        ("--dataset", request.datasets, names),
        ("--labels", request.labels, rows),
        ("--weights", request.weights, ()),
        ("--set", request.settings if settings else (), FREE_SETTINGS),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise WrongUse(
                "wrong_use",
                f"{flag} {unknown[0]}: this benchmark has no such thing.",
                f"{did_you_mean(unknown[0], known)}Possible here: {', '.join(known) or 'nothing'}.",
            )


def seed_recipe(name: str, recipe: LabelRecipe) -> LabelRecipe:
    """The recipe with the seed protocol's settings for a dataset, with or without background."""
    without_background = {"context60": "context59", "voc21": "voc20"}
    return protocol_recipe(recipe, get_protocol(without_background.get(name, name), "seed"))


def runs(method: str, model: str | None) -> bool:
    """Whether the row can be measured without training."""
    return method in METHODS and model in MODELS


def row_recipe(method: str, model: str | None, request: Request) -> LabelRecipe:
    assert model is not None, "see runs"
    changes = {"model": MODELS[model], **METHODS[method], **request.settings}
    return change_recipe(RECIPES["maskclip"], changes)


def _wanted(models: Mapping[str, str], request: Request) -> list[str]:
    return (
        [model for model in models if any(part in f"MaskCLIP ({model})" for part in request.rows)]
        if request.rows
        else ["ViT-B/16", "RN50"]
    )


TABLES: Mapping[str, tuple[str, Callable[[Request], Iterator[Section]]]] = {
    "maskclip": (
        "MaskCLIP, annotation-free (Context-59, COCO-Stuff, VOC-20), seed protocol",
        annotation_free,
    ),
    "maskclip-zero-shot": ("Zero-shot segmentation: seen and unseen classes on three sets", zero_shot),
    "maskclip-robustness": ("MaskCLIP under 8 corruptions at 5 levels", robustness),
}
