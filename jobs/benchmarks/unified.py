"""Any recipe on the eight sets of MaskCLIP's successors, beside the figures that they publish.

A section holds one dataset under one protocol, and only figures of that protocol. A sample of the images gets
an interval from a bootstrap over them: published figures are of all images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jobs.benchmarks.labelled import interval_of_images, measure, note, open_limited
from jobs.benchmarks.maskclip import check_request, row_recipe, runs
from jobs.benchmarks.resume import slug
from jobs.benchmarks.rows import row
from jobs.benchmarks.tables import Request, check_rows
from jobs.evaluate.protocol import protocol_recipe
from models.errors import WrongUse
from pipeline.datasets.base import Dataset
from pipeline.datasets.protocols import PROTOCOLS, ProtocolName, get_protocol
from pipeline.datasets.registry import DATASETS
from pipeline.evaluation.published import PublishedTable, load_published
from pipeline.evaluation.published import Row as PublishedRow
from pipeline.evaluation.results import Row, Section
from pipeline.labelling.recipes import LabelRecipe

QUICK_DATASET, QUICK_IMAGES = "voc20", 200
MEAN = "mean of eight"
_PUBLISHED: Mapping[ProtocolName, tuple[str, ...]] = {
    "unified": ("unified_eight_sets", "unified_repositories"),
    "seed": ("maskclip_annotation_free",),
}


def unified(request: Request) -> Iterator[Section]:
    """Sections by protocol and dataset, then the mean of the eight sets.

    The request is checked at once; sections are measured lazily.

    Raises:
        WrongUse: ``wrong_use`` for names that the table lacks, and for settings that its protocol fixes.
    """
    if request.quick:
        request = dataclasses.replace(
            request,
            datasets=request.datasets or (QUICK_DATASET,),
            limit=request.limit or QUICK_IMAGES,
        )
    check_request(request, names=list(PROTOCOLS), rows=(), settings=request.recipe is None)
    if request.recipe is None:
        check_rows(request, [line.title for line in _lines(request.protocols)])
    elif request.rows:
        raise WrongUse("wrong_use", "--row chooses published rows, --recipe is a row of ours.", "Give one.")
    else:
        for dataset, protocol in _settings(request):
            _refuse_fixed(request.recipe, request.settings, dataset, protocol)
    return _sections(request)


def _settings(request: Request) -> list[tuple[str, ProtocolName]]:
    """Datasets with their protocols, as asked for."""
    return [
        (dataset, protocol)
        for protocol in request.protocols
        for dataset, known in PROTOCOLS.items()
        if protocol in known and (not request.datasets or dataset in request.datasets)
    ]


def _tables(protocol: ProtocolName) -> list[PublishedTable]:
    return [load_published(name) for name in _PUBLISHED[protocol]]


def _lines(protocols: Sequence[ProtocolName]) -> list[PublishedRow]:
    return [line for protocol in protocols for table in _tables(protocol) for line in table.rows]


def _refuse_fixed(
    recipe: LabelRecipe, settings: Mapping[str, Any], dataset: str, protocol: ProtocolName
) -> None:
    """Refuse a setting that the protocol would change back."""
    wanted = get_protocol(dataset, protocol)
    own, fixed = recipe.effective(), protocol_recipe(recipe, wanted).effective()
    for key in wanted.recipe_overrides():
        given = {key, key.rpartition(".")[2]} & settings.keys()
        if given and own[key] != fixed[key]:
            raise WrongUse(
                "wrong_use",
                f"--set {given.pop()}: the protocol {protocol} fixes {key} on {dataset}, as {fixed[key]}.",
                "Leave it out; or measure with maskmill evaluate --protocol custom.",
            )


def _sections(request: Request) -> Iterator[Section]:
    means: dict[str, list[float | None]] = {}
    for dataset, protocol in _settings(request):
        section = _section(dataset, protocol, request)
        if protocol == "unified":
            for line in section.rows:
                value = line.values.get("miou")
                means.setdefault(line.name, []).append(value.mean if value else None)
        yield section
    if "unified" in request.protocols and not request.datasets:
        yield _mean_section(means)


def _section(dataset: str, protocol: ProtocolName, request: Request) -> Section:
    opened, missing = open_limited(dataset, request, draw=True)
    rows = []
    if request.recipe is not None:
        title = " ".join(("ours:", request.recipe.name, *(f"{k}={v}" for k, v in request.settings.items())))
        rows.append(_measured(title, request.recipe, opened, missing, dataset, protocol, request))
    notes = [note(opened, request)]
    for table in _tables(protocol):
        for line in table.rows:
            published = {
                metric: share for metric, share in table.shares(line, dataset).items() if metric == "miou"
            }
            if not published and not runs(line.method, line.model):
                continue
            source = str(table.source_of(line)) if published else None
            asked = not request.rows or any(part in line.title for part in request.rows)
            if request.recipe is None and asked and runs(line.method, line.model):
                recipe = row_recipe(line.method, line.model, request)
                made = _measured(line.title, recipe, opened, missing, dataset, protocol, request)
            else:
                lacking = "not asked for" if runs(line.method, line.model) else None
                made = row(line.title, {}, missing=lacking)
            rows.append(made.model_copy(update={"published": published, "source": source}))
        notes += [text for text in table.notes if text not in notes]
    if protocol == "seed" and not any(line.published for line in rows):
        notes.append("No figure is published for this dataset under this protocol.")
    if opened is not None and request.limit:
        notes.append("± is the 95 % interval of a bootstrap over images; what is published is of all images.")
    return Section(
        name=f"{dataset}-{protocol}",
        title=f"{DATASETS[dataset].description}, protocol {protocol}",
        note=" ".join(notes).strip(),
        chart="bars",
        metrics=("miou",),
        rows=tuple(rows),
    )


def _measured(
    title: str,
    recipe: LabelRecipe,
    dataset: Dataset | None,
    missing: str | None,
    name: str,
    protocol: ProtocolName,
    request: Request,
) -> Row:
    file_name = f"{name}-{protocol}-{slug(title)}"
    values, lacking = measure(
        dataset, recipe, request, file_name=file_name, protocol=protocol, missing=missing, metrics=("miou",)
    )
    made = row(title, values, missing=lacking)
    if values and request.limit:
        low, high = interval_of_images(request, file_name)
        value = made.values["miou"].model_copy(update={"low": low, "high": high})
        made = made.model_copy(update={"values": {"miou": value}})
    return made


def _mean_section(means: Mapping[str, Sequence[float | None]]) -> Section:
    """Means over the eight sets; ours only where all eight were measured."""
    rows = []
    published = {
        line.title: (table.shares(line, MEAN), str(table.source_of(line)))
        for table in _tables("unified")
        for line in table.rows
        if table.shares(line, MEAN)
    }
    for title in dict.fromkeys((*means, *published)):
        values = means.get(title, ())
        known = [value for value in values if value is not None]
        figures, source = published.get(title, ({}, None))
        ours = title in means and (title not in published or any(known))
        if len(known) == len(PROTOCOLS):
            made = row(title, {"miou": [sum(known) / len(known)]}, published=figures, source=source)
        elif figures or known:
            lacking = f"{len(known)} of {len(PROTOCOLS)} sets measured" if ours else None
            made = row(title, {}, published=figures, source=source, missing=lacking)
        else:
            continue
        rows.append(made)
    return Section(
        name="mean",
        title="Mean of the eight sets, protocol unified",
        chart="bars",
        metrics=("miou",),
        rows=tuple(rows),
    )


TABLES = {
    "unified": ("Any recipe on the eight sets of MaskCLIP's successors, both protocols", unified),
}
