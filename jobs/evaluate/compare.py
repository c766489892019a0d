"""Label if that is needed, compare with the truth, and write the result folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console

from jobs.console import counted, timed
from jobs.evaluate.protocol import (
    CUSTOM,
    ProtocolName,
    class_groups,
    followed_protocol,
    is_the_benchmark,
    is_toy,
    plan_labelling,
)
from jobs.label import label_images
from jobs.labelling.options import LabelOptions
from models.errors import FailedWork
from pipeline.cluster.progress import Progress
from pipeline.datasets.base import Dataset, Sample
from pipeline.datasets.registry import DATASETS
from pipeline.evaluation.classes import ClassMatch, matched
from pipeline.evaluation.images import set_digest, write_images
from pipeline.evaluation.published import lookup as published_figures
from pipeline.evaluation.results import (
    PICTURES,
    SCENES,
    Compared,
    EvaluationResult,
    ImageResult,
    Labelling,
    MeasuredDataset,
    MeasuredModel,
    Published,
    claim_folder,
    conditions_digest,
    evaluation_result,
    extremes,
    new_folder,
    write_result,
)
from pipeline.evaluation.tables import (
    MOST_IDS,
    Evaluation,
    ImageScore,
    class_lookup,
    evaluate_table,
    read_labels,
)
from pipeline.files.status import StatusFile
from pipeline.files.storage import open_storage
from pipeline.labelling.recipes import LabelRecipe, table_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.report.pictures import panel
from pipeline.table.corrections import Corrections
from pipeline.table.record import TableRecord, read_table_record
from pipeline.table.views import TableView
from pipeline.tracking.tracker import OFF

ON_RAY_FROM = 2000
"""Number of images above which starting Ray pays off."""


def evaluate(
    dataset: Dataset,
    console: Console,
    *,
    labels: str | None = None,
    recipe: LabelRecipe | None = None,
    ontology: Ontology | None = None,
    protocol: ProtocolName | None = None,
    zero_shot: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    boundary: bool = True,
    pictures: int = 6,
    address: str | None = None,
    verbose: bool = False,
    view: TableView | None = None,
    match: ClassMatch | None = None,
    corrections: Corrections | None = None,
    status: StatusFile | None = None,
) -> tuple[Path, EvaluationResult]:
    """Label if needed, compare, and write the result folder.

    Args:
        labels: a label table; None labels the images first.
        recipe: how to label; required without ``labels``.
        ontology: classes to label with; None takes the dataset's own, with the protocol's templates.
        protocol: published numbers to compare with; None takes the protocol that the recipe follows.
        zero_shot: name of a split into seen and unseen classes.
        output: folder for the result; None creates one below ``results/``.
        workers: number of Ray tasks that compare; 0 is this process, None chooses.
        pictures: number of worst and of best images to show.
        address: of a Ray cluster to label on.
        verbose: show Ray's own messages.
        view: see ``labels`` through it.
        match: the classes that ``labels``, as the view has them, and the truth have in common; None if all
            classes of the truth are to be measured, by name.
        corrections: what people say of ``labels``, which counts instead of them.
        status: is told what is done.

    Returns:
        The folder, and what its ``evaluation.json`` says.

    Raises:
        MaskMillError: for anything the user can fix.
    """
    folder = new_folder(output, result_name(dataset, recipe), overwrite=overwrite)
    groups = class_groups(dataset, zero_shot)
    taken: list[Progress] = []
    if labels is None:
        assert recipe is not None, "either labels or a recipe"
        recipe, words = plan_labelling(dataset, recipe, ontology, protocol)
        claim_folder(folder, overwrite=overwrite)
        table = str(folder / "labels")
        options = LabelOptions(
            output=table,
            overwrite=overwrite,
            max_failure_rate=1.0,  # checked below: a benchmark needs all of its images
            address=address,
            verbose=verbose,
            tracking=OFF,
        )
        if status is not None:
            status.update(stage=f"labelling into {table}")
        source = _image_list(dataset, folder)
        label_images(source, recipe, words, options, console=console, done=taken.append)
    else:
        table = labels
    made = read_table_record(table)
    seen = made.ontology if view is None else view.ontology
    changed = view is not None or match is not None
    followed = None if changed else followed_protocol(dataset, protocol, table_recipe(made), made.ontology)
    if match is not None:
        dataset = matched(dataset, match)
        groups = class_groups(dataset, zero_shot)
        lookup = match.labels
    else:
        lookup = class_lookup(seen.names, dataset.class_names, ignore_index=seen.ignore_index)
    if workers is None:
        workers = (os.cpu_count() or 1) if len(dataset.samples) > ON_RAY_FROM else 0
    threshold = followed.background_threshold if followed else 0.0
    with counted(console, "comparing", "images", status) as report:
        evaluation = evaluate_table(
            table,
            dataset,
            class_names=seen.names,
            ignore_index=seen.ignore_index,
            background_below=threshold,
            boundary=boundary,
            view=view,
            corrections=corrections,
            lookup=lookup,
            workers=workers,
            progress=report,
            notice=lambda text: console.print(text, highlight=False, soft_wrap=True),
        )
    whole = not (evaluation.missing or evaluation.failed)
    if labels is None and not whole:
        lost = evaluation.failed.total() + len(evaluation.missing)
        raise FailedWork(
            "labelling_failed",
            f"Of {len(dataset.samples):,} images {lost:,} could not be compared: "
            f"{'; '.join(map(str, evaluation.left_out()))}.",
            f"See the rows with a status in {table}; a benchmark is measured on all of its images.",
        )
    claim_folder(folder, overwrite=overwrite and labels is not None)
    name = followed.name if followed else CUSTOM
    with timed(console, "drawing the worst and best images", status):
        worst, best = _pictures(
            dataset, table, lookup, evaluation, folder, threshold, view, corrections, count=pictures
        )
    setting = f"{dataset.name}/zero-shot" if zero_shot else dataset.name
    compared = None if match is None else Compared.of(match)
    result = evaluation_result(
        evaluation,
        title=_title(dataset, made, view, corrections),
        protocol=name,
        dataset=MeasuredDataset(
            name=dataset.name,
            split=dataset.split,
            images=len(dataset.samples),
            fingerprint=dataset.fingerprint(),
            content=set_digest(image.digest for image in evaluation.images),
            has_truth=dataset.has_truth,
        ),
        model=MeasuredModel(recipe=made.recipe, weights=made.weights, toy=is_toy(made.weights)),
        names=dataset.class_names,
        colors=dataset.classes.palette(),
        groups=groups,
        published=[Published(**figure.entry()) for figure in published_figures(setting, None, name)]
        if whole and not changed and is_the_benchmark(dataset, made.weights)
        else [],
        worst=worst,
        best=best,
        left_out=[
            *map(str, (*dataset.left_out, *evaluation.left_out())),
            *_mostly_ignored(dataset, evaluation),
        ],
        view=None if view is None else view.view,
        compared=compared,
        conditions=conditions_digest(
            name,
            dataset.class_names,
            ignore_index=dataset.ignore_index,
            background_below=threshold,
            corruption=table_recipe(made).images.corruption,
            view=None if view is None else view.view,
            compared=compared,
        ),
        labelling=next((Labelling(images=one.done, seconds=one.label_s) for one in taken if one.done), None),
    )
    write_images(open_storage(folder), evaluation.images)
    write_result(folder, result)  # last: whoever finds it finds the rest
    return folder, result


def _image_list(dataset: Dataset, folder: Path) -> str:
    """Write a list of the images for labelling, and return its path."""
    source = folder / "to_label.parquet"  # names may hold line breaks, which a text file could not list
    uris = [_file(dataset, sample, folder) for sample in dataset.samples]
    pq.write_table(pa.table({"uri": pa.array(uris, pa.string())}), source)
    return str(source)


def _file(dataset: Dataset, sample: Sample, folder: Path) -> str:
    if sample.image:
        return sample.image
    # The fingerprint keeps scenes of different seeds apart: their names are the same.
    path = folder / SCENES / dataset.fingerprint()[:12] / f"{sample.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        Image.fromarray(dataset.image(sample)).save(path)
    return str(path.resolve())


def _mostly_ignored(dataset: Dataset, evaluation: Evaluation) -> list[str]:
    """A sentence if most of the truth of the user's own data is ignored; benchmarks are made that way."""
    info = DATASETS.get(dataset.name)
    if evaluation.ignored_share <= 0.5 or (info is not None and info.official):
        return []
    ids = sorted(evaluation.truth_ids)
    named = ", ".join(map(str, ids[:MOST_IDS])) + (", …" if len(ids) > MOST_IDS else "")
    return [
        f"{100 * evaluation.ignored_share:.1f} % of the truth's pixels, which are ignored "
        f"(ids found: {named}; {dataset.ignore_index} means ignored)"
    ]


def _title(
    dataset: Dataset, made: TableRecord, view: TableView | None, corrections: Corrections | None
) -> str:
    count = len(dataset.samples)
    info = DATASETS.get(dataset.name)
    whole = info.official.get(dataset.split) if info else None
    part = f", {count:,} of {whole:,} images" if whole and whole != count else ""
    weights = made.weights
    random = ", random weights" if str(weights.get("pretrained", "")).startswith("random") else ""
    seen = "" if view is None else f", {'; '.join(view.view.described())}"
    if corrections is not None:
        seen += f", {len(corrections.files):,} "
        seen += "corrected by people" if corrections.unknown is None else "with known labels"
    return f"{made.recipe['name']}{seen} on {dataset.name} ({dataset.split}{part}{random})"


def result_name(dataset: Dataset, recipe: LabelRecipe | None) -> str:
    return "-".join([dataset.name, recipe.name if recipe else "labels"])


def _pictures(
    dataset: Dataset,
    table: str,
    translate: npt.NDArray[np.uint16],
    evaluation: Evaluation,
    folder: Path,
    threshold: float,
    view: TableView | None,
    corrections: Corrections | None,
    *,
    count: int,
) -> tuple[list[ImageResult], list[ImageResult]]:
    lowest, highest = extremes(evaluation.images, count)
    names = {sample.name: sample for sample in dataset.samples}
    predicted = read_labels(
        table,
        [*lowest, *highest],
        names,
        background_below=threshold,
        view=view,
        corrections=corrections,
    )
    palette = dataset.classes.palette()

    def draw(images: Sequence[ImageScore], kind: str) -> list[ImageResult]:
        entries = []
        for rank, image in enumerate(images, 1):
            sample = names[image.name]
            picture = f"{PICTURES}/{kind}-{rank}.png"
            (folder / PICTURES).mkdir(parents=True, exist_ok=True)
            labels = translate[predicted[image.name]]
            panel(dataset.image(sample), dataset.truth(sample), labels, palette).save(
                folder / picture, optimize=True
            )
            entries.append(ImageResult(name=image.name, miou=image.miou, picture=picture))
        return entries

    return draw(lowest, "worst"), draw(highest, "best")
