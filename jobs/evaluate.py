"""``maskmill evaluate``: compare labels with the truth, store the result and show it."""

from __future__ import annotations

import dataclasses
import functools
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.table import Table
from tyro.conf import arg

from jobs.console import counted, name_run, say_left_out, stderr_console, timed
from jobs.label import LabelJob, label_images
from jobs.options import (
    FLAT,
    Address,
    Flag,
    LabellingModel,
    Maybe,
    Tracking,
    Truth,
    Verbose,
    ViewOptions,
    exactly_one,
    refuse_missing_file,
)
from models.errors import FailedWork, WrongUse, did_you_mean
from models.settings import as_written
from pipeline.cluster.progress import Progress
from pipeline.datasets.base import Dataset, Sample
from pipeline.datasets.protocols import PROTOCOLS, Protocol, get_protocol
from pipeline.datasets.registry import DATASETS
from pipeline.datasets.zeroshot import zero_shot_split
from pipeline.evaluation.classes import ClassMatch, Others, match_classes, matched, read_mapping
from pipeline.evaluation.images import set_digest, write_images
from pipeline.evaluation.published import lookup as published_figures
from pipeline.evaluation.results import (
    PICTURES,
    REPORT_FILE,
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
    plan,
    read_labels,
)
from pipeline.files.status import StatusFile
from pipeline.files.storage import open_storage
from pipeline.labelling.prepare import require_weights
from pipeline.labelling.recipes import LabelRecipe, change_recipe, table_recipe
from pipeline.metrics.names import metric_label, percent
from pipeline.ontology.ontology import Ontology, load_ontology
from pipeline.report.pictures import panel
from pipeline.report.results_page import write_report
from pipeline.table.record import TableRecord, read_table_record
from pipeline.table.views import TableView
from pipeline.tracking.names import place_name, recipe_name, run_name
from pipeline.tracking.results import log_result
from pipeline.tracking.tracker import TrackedDataset, open_tracker

CUSTOM = "custom"
FEW = 4
"""Number of images that are read before anything is made."""
ON_RAY_FROM = 2000
"""Number of images above which starting Ray pays off."""


ProtocolName = Literal["seed", "unified", "custom"]


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure labels against truth: those of a label table, or those a recipe produces for a benchmark.

    Attributes:
        labels: a label table, the --output of maskmill label; without it, --recipe or --model labels the
            images first.
        ontology: what the values in --truth mean (default: the ontology of --labels); with --recipe, the
            words to label with instead of the benchmark's.
        protocol: the published numbers to compare with: seed (MaskCLIP's repository), unified (its
            successors; not comparable with seed) or custom; default: the one that the recipe follows.
        zero_shot: a split into seen and unseen classes: voc20, voc21, context60, cocostuff171, …
        common: measure the classes that labels and truth have in common, by name or synonym, instead of
            refusing truth that has others.
        mapping: YAML file that says which class of the labels is which of the truth: "puppy: dog",
            "pet: [cat, dog]", "sky: null"; the other classes are matched by name or synonym.
        others: what becomes of classes without a counterpart, with --common: background or ignored; default:
            background if both sides have one.
        limit: use only the first N images, to try things out.
        output: folder for the result, on this machine; default: a new one below results/.
        overwrite: replace a result that is already in --output.
        workers: number of Ray tasks that compare; 0: this process alone; default: depends on the number of
            images.
        boundary: skip boundary IoU.
    """

    labels: Maybe[str] = None
    by: Annotated[LabellingModel, FLAT] = field(default_factory=LabellingModel)
    data: Annotated[Truth, FLAT] = field(default_factory=Truth)
    ontology: Maybe[str] = None
    protocol: Annotated[Maybe[str], arg(metavar="{seed,unified,custom}")] = None
    zero_shot: Maybe[str] = None
    common: Flag = False
    mapping: Annotated[Maybe[str], arg(metavar="FILE")] = None
    others: Annotated[Maybe[str], arg(metavar="{background,ignored}")] = None
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)
    limit: int = 0
    output: Maybe[str] = None
    overwrite: Flag = False
    workers: Maybe[int] = None
    boundary: Flag = True
    tracking: Tracking = None
    address: Address = None
    verbose: Verbose = False

    def run(self, console: Console | None = None) -> int:
        """Evaluate, write the result folder, track the run and print the scores."""
        console = console or stderr_console()
        self._check()
        recipe, own = (None, None) if self.labels is not None else self.by.load()
        classes = load_ontology(self.ontology) if self.ontology is not None else None
        dataset = self.data.open(classes, table=self.labels, command="evaluate")
        if self.limit:
            dataset = dataclasses.replace(dataset, samples=dataset.samples[: self.limit])
        if classes is None and own is not None and set(dataset.class_names) <= set(own.names):
            classes = own  # the words that the student was trained with
        slug = _slug(dataset, recipe)
        # Find mistakes in the command before a tracking run is opened.
        output = new_folder(self.output, slug, overwrite=self.overwrite)
        view = None if self.labels is None else self.seen.of_table(self.labels)
        match = None if self.labels is None else self._match(dataset, self.labels, view)
        self._check_against(dataset, recipe, classes, view, match)
        say_left_out(console, dataset)
        for line in [] if self.labels is None else self.seen.keep(self.labels, view):
            console.print(line, highlight=False, soft_wrap=True)
        run_id = uuid.uuid4().hex
        with (
            open_tracker(self.tracking, waiting=functools.partial(timed, console)) as tracker,
            StatusFile(open_storage(output), "evaluate", run_id) as status,
        ):
            claim_folder(output, overwrite=False)
            name_run(console, run_id)
            status.begin()
            tracker.start(
                "evaluate",
                run_name("evaluate", self._model(recipe), self.data.title(dataset)),
                params={"recipe": recipe.to_dict()}
                if recipe
                else {"labels": self.labels, **_view_params(view)},
                dataset=TrackedDataset(
                    dataset.name,
                    dataset.fingerprint(),
                    source=next((sample.image for sample in dataset.samples if sample.image), None),
                    profile={"split": dataset.split, "images": len(dataset.samples)},
                ),
            )
            folder, result = evaluate(
                dataset,
                console,
                labels=self.labels,
                recipe=recipe,
                ontology=classes if self.labels is None else None,
                protocol=self._asked,
                zero_shot=self.zero_shot,
                output=output,
                status=status,
                overwrite=self.overwrite,
                workers=self.workers,
                boundary=self.boundary,
                address=self.address,
                verbose=self.verbose,
                view=view,
                match=match,
            )
            made = read_table_record(self.labels or str(folder / "labels"))
            tracker.log_params({"ontology": {"hash": made.ontology.hash}})
            with timed(console, "writing the page", status):
                page = write_report([folder], folder / REPORT_FILE)
            log_result(tracker, folder)
            status.update(mlflow_run=tracker.run_id)
            status.finish("ok", f"Result: {folder}/evaluation.json")
            _print(result, console, told=len(dataset.left_out))
        console.print(
            f"Result         {folder}/evaluation.json\nLook at it:    {page.resolve().as_uri()}",
            highlight=False,
            soft_wrap=True,
        )
        return 0

    def _model(self, recipe: LabelRecipe | None) -> str:
        """What is evaluated, for the name of the run."""
        if recipe is not None:
            return recipe_name(recipe.to_dict())
        assert self.labels is not None, "either labels or a recipe"
        return f"{place_name(self.labels)}, {recipe_name(read_table_record(self.labels).recipe)}"

    def _match(self, dataset: Dataset, labels: str, view: TableView | None) -> ClassMatch | None:
        """The classes that labels and truth have in common, if that is asked for."""
        if not self.common and self.mapping is None:
            return None
        return match_classes(
            read_table_record(labels).ontology if view is None else view.ontology,
            dataset.classes,
            given=None if self.mapping is None else read_mapping(self.mapping),
            partial=self.common,
            others=self._others,
        )

    def _check_against(
        self,
        dataset: Dataset,
        recipe: LabelRecipe | None,
        words: Ontology | None,
        view: TableView | None,
        match: ClassMatch | None,
    ) -> None:
        """Refuse options that do not fit the data, and missing weights."""
        _groups(dataset, self.zero_shot)
        if recipe is None:
            made = read_table_record(str(self.labels))
            _protocol(dataset, self._asked, table_recipe(made), made.ontology)
            if match is None:
                classes = made.ontology if view is None else view.ontology
                class_lookup(classes.names, dataset.class_names, ignore_index=classes.ignore_index)
            for sample in list(plan(str(self.labels), dataset.samples).samples.values())[:1]:
                dataset.truth(sample)
        else:
            refuse_missing_file(recipe.pretrained)
            _plan(dataset, recipe, words, self._asked)
            require_weights(recipe)
            # Masks of another kind or size are told now, not after an hour of labelling.
            for sample in dataset.samples[:: max(1, len(dataset.samples) // FEW)][:FEW]:
                dataset.image_and_truth(sample)

    @property
    def _asked(self) -> ProtocolName | None:
        """``protocol``; it is text on the command line, because the parser would list None as a choice.

        Raises:
            WrongUse: ``wrong_use``.
        """
        for name in get_args(ProtocolName):
            if self.protocol == name:
                return cast(ProtocolName, name)
        if self.protocol is not None:
            known = get_args(ProtocolName)
            raise WrongUse(
                "wrong_use",
                f"There is no protocol {self.protocol}.",
                f"{did_you_mean(self.protocol, known)}Give {', '.join(known[:-1])} or {known[-1]}.",
            )
        return None

    @property
    def _others(self) -> Others | None:
        """``others``, which is text for the same reason.

        Raises:
            WrongUse: ``wrong_use``.
        """
        for name in get_args(Others):
            if self.others == name:
                return cast(Others, name)
        if self.others is not None:
            known = get_args(Others)
            raise WrongUse(
                "wrong_use",
                f"--others {self.others} is not known.",
                f"{did_you_mean(self.others, known)}Give {' or '.join(known)}.",
            )
        return None

    def _check(self) -> None:
        """Refuse options that contradict each other."""
        _ = self._asked, self._others
        exactly_one(
            "--labels",
            self.labels,
            "--recipe or --model",
            self.by.recipe or self.by.model,
            command="evaluate",
        )
        benchmark = DATASETS.get(self.data.dataset or "")
        for wrong, message in (
            (self.by.settings and self.labels, "--set changes a recipe; it says nothing about --labels."),
            (
                self.ontology and self.labels and benchmark is not None and not benchmark.needs_ontology,
                "--labels have an ontology already: --ontology is for --truth, or for --recipe.",
            ),
            (
                self.labels is None and (self.seen.given or self.common or self.mapping),
                "--common, --mapping and views of a table are for --labels.",
            ),
            (
                self._asked not in (None, CUSTOM) and (self.seen.given or self.common or self.mapping),
                f"Protocol {self._asked} measures labels as they are made, and all classes of the truth.",
            ),
            (
                self.zero_shot and (self.seen.given or self.common or self.mapping),
                "--zero-shot splits the classes of a benchmark: it needs them as they are.",
            ),
            (self.others and not self.common, "--others is for classes that --common leaves out."),
            (self.limit < 0, f"--limit {self.limit} is not a number of images."),
            (
                self.workers is not None and self.workers < 0,
                f"--workers {self.workers} is not a number of tasks.",
            ),
        ):
            if wrong:
                raise WrongUse("wrong_use", message, "See maskmill evaluate --help.")


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
        status: is told what is done.

    Returns:
        The folder, and what its ``evaluation.json`` says.

    Raises:
        MaskMillError: for anything the user can fix.
    """
    folder = new_folder(output, _slug(dataset, recipe), overwrite=overwrite)
    groups = _groups(dataset, zero_shot)
    taken: list[Progress] = []
    if labels is None:
        assert recipe is not None, "either labels or a recipe"
        recipe, words = _plan(dataset, recipe, ontology, protocol)
        claim_folder(folder, overwrite=overwrite)
        table = str(folder / "labels")
        job = LabelJob(
            source=_image_list(dataset, folder),
            ontology=words,
            recipe=recipe,
            output=table,
            overwrite=overwrite,
            max_failure_rate=1.0,  # checked below: a benchmark needs all of its images
            address=address,
            verbose=verbose,
        )
        if status is not None:
            status.update(stage=f"labelling into {table}")
        label_images(job, console, done=taken.append)
    else:
        table = labels
    made = read_table_record(table)
    seen = made.ontology if view is None else view.ontology
    changed = view is not None or match is not None
    followed = None if changed else _protocol(dataset, protocol, table_recipe(made), made.ontology)
    if match is not None:
        dataset = matched(dataset, match)
        groups = _groups(dataset, zero_shot)
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
        worst, best = _pictures(dataset, table, lookup, evaluation, folder, threshold, view, count=pictures)
    setting = f"{dataset.name}/zero-shot" if zero_shot else dataset.name
    compared = None if match is None else Compared.of(match)
    result = evaluation_result(
        evaluation,
        title=_title(dataset, made, view),
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
        if whole and not changed and _is_the_benchmark(dataset, made.weights)
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


def _view_params(view: TableView | None) -> dict[str, Any]:
    return {} if view is None else {"view": view.view.to_dict()}


def is_toy(weights: Mapping[str, Any]) -> bool:
    """Whether the labels come from the toy CLIP or a student of it."""
    return "toyclip" in (weights["model"], weights.get("text", {}).get("model"))


def _is_the_benchmark(dataset: Dataset, weights: Mapping[str, Any]) -> bool:
    """Whether results are comparable with published ones: the whole usual split, with real weights."""
    info = DATASETS.get(dataset.name)
    return (
        info is not None
        and dataset.split == info.default_split
        and info.official.get(dataset.split) == len(dataset.samples)
        and not is_toy(weights)
        and not str(weights["pretrained"]).startswith("random")
    )


def protocol_recipe(recipe: LabelRecipe, protocol: Protocol) -> LabelRecipe:
    """The recipe with the settings that the protocol prescribes."""
    return change_recipe(recipe, protocol.recipe_overrides())


def _plan(
    dataset: Dataset, recipe: LabelRecipe, ontology: Ontology | None, protocol: ProtocolName | None
) -> tuple[LabelRecipe, Ontology]:
    """Recipe and ontology for labelling; refuses a combination that would violate the protocol."""
    ontology = ontology or dataset.classes
    if protocol in ("seed", "unified"):
        wanted = get_protocol(dataset.name, protocol)
        recipe = protocol_recipe(recipe, wanted)
        ontology = Ontology.from_dict(ontology.to_dict() | {"templates": wanted.templates})
    elif recipe.model == "toyclip" and ontology.templates == "openai85":
        ontology = Ontology.from_dict(ontology.to_dict() | {"templates": "toyworld"})
    _protocol(dataset, protocol, recipe, ontology)
    return recipe, ontology


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


def _protocol(
    dataset: Dataset,
    asked: ProtocolName | None,
    recipe: LabelRecipe,
    ontology: Ontology,
) -> Protocol | None:
    """The protocol that the labels follow; refuses a requested one that they do not."""
    if asked == CUSTOM:
        return None
    if asked is not None:
        wanted = get_protocol(dataset.name, asked)
        differing = _differences(dataset, recipe, ontology, wanted)
        if differing:
            raise WrongUse(
                "output_differs",
                f"This is not protocol {wanted.name}: {'; '.join(differing)}.",
                f"Label with --protocol {wanted.name} and without what it rules out; or --protocol custom.",
            )
        return wanted
    known = PROTOCOLS.get(dataset.name, {}).values()
    followed = (each for each in known if not _differences(dataset, recipe, ontology, each))
    return next(followed, None)


def _differences(dataset: Dataset, recipe: LabelRecipe, ontology: Ontology, protocol: Protocol) -> list[str]:
    made = recipe.effective()
    wanted = protocol.recipe_overrides() | {"min_confidence": 0.0, "images.corruption": ""}
    differing = [
        f"{key} is {as_written(made[key])}, not {as_written(value)}"
        for key, value in wanted.items()
        if _plain(made[key]) != _plain(value)
    ]
    classes = Ontology.from_dict(dataset.classes.to_dict() | {"templates": protocol.templates})
    if ontology.templates != protocol.templates:
        differing.append(f"templates are {as_written(ontology.templates)}, not {protocol.templates}")
    elif ontology.hash != classes.hash:
        differing.append(f"the classes are not those of {dataset.name} as they are")
    return differing


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _groups(dataset: Dataset, zero_shot: str | None) -> list[str | None]:
    count = len(dataset.class_names)
    if zero_shot is None:
        return [None] * count
    split = zero_shot_split(zero_shot)
    if split.ontology != dataset.ontology:
        raise WrongUse(
            "wrong_use",
            f"The zero-shot split {split.name} is one of {split.ontology}; {dataset.name} has other classes.",
            f"Evaluate on --dataset {split.ontology}.",
        )
    unseen = set(split.unseen_ids)
    return ["unseen" if index in unseen else "seen" for index in range(count)]


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


def _title(dataset: Dataset, made: TableRecord, view: TableView | None) -> str:
    count = len(dataset.samples)
    info = DATASETS.get(dataset.name)
    whole = info.official.get(dataset.split) if info else None
    part = f", {count:,} of {whole:,} images" if whole and whole != count else ""
    weights = made.weights
    random = ", random weights" if str(weights.get("pretrained", "")).startswith("random") else ""
    seen = "" if view is None else f", {'; '.join(view.view.described())}"
    return f"{made.recipe['name']}{seen} on {dataset.name} ({dataset.split}{part}{random})"


def _slug(dataset: Dataset, recipe: LabelRecipe | None) -> str:
    return "-".join([dataset.name, recipe.name if recipe else "labels"])


def _pictures(
    dataset: Dataset,
    table: str,
    translate: npt.NDArray[np.uint16],
    evaluation: Evaluation,
    folder: Path,
    threshold: float,
    view: TableView | None,
    *,
    count: int,
) -> tuple[list[ImageResult], list[ImageResult]]:
    lowest, highest = extremes(evaluation.images, count)
    names = {sample.name: sample for sample in dataset.samples}
    predicted = read_labels(table, [*lowest, *highest], names, background_below=threshold, view=view)
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


def _print(result: EvaluationResult, console: Console, *, told: int) -> None:
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
