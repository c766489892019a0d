"""``maskmill evaluate``: compare labels with the truth, store the result and show it."""

from __future__ import annotations

import dataclasses
import functools
import uuid
from dataclasses import dataclass, field
from typing import Annotated, Any, cast, get_args

import numpy as np
from rich.console import Console
from tyro.conf import arg

from jobs.believed import KnownTable, KnownView, open_believed
from jobs.console import name_run, say_left_out, stderr_console, timed
from jobs.evaluate.compare import evaluate, result_name
from jobs.evaluate.protocol import CUSTOM, ProtocolName, class_groups, followed_protocol, plan_labelling
from jobs.evaluate.scores import print_scores
from jobs.options import (
    FLAT,
    Address,
    Corrected,
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
from models.errors import WrongUse, did_you_mean
from pipeline.datasets.base import Dataset
from pipeline.datasets.registry import DATASETS
from pipeline.evaluation.classes import ClassMatch, Others, match_classes, read_mapping
from pipeline.evaluation.results import (
    REPORT_FILE,
    claim_folder,
    new_folder,
)
from pipeline.evaluation.tables import (
    class_lookup,
    plan,
)
from pipeline.files.status import StatusFile
from pipeline.files.storage import open_storage
from pipeline.labelling.prepare import require_weights
from pipeline.labelling.recipes import LabelRecipe, table_recipe
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.report.results_page import write_report
from pipeline.table.record import read_table_record
from pipeline.table.splits import choose
from pipeline.table.views import TableView
from pipeline.tracking.names import place_name, recipe_name, run_name
from pipeline.tracking.results import log_result
from pipeline.tracking.tracker import TrackedDataset, open_tracker

FEW = 4
"""Number of images that are read before anything is made."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure labels against truth: those of a label table, or those a recipe produces for a benchmark.

    Attributes:
        labels: a label table, the --output of maskmill label; without it, --recipe or --model labels the
            images first.
        part: measure only the images of this part of the split of --labels (maskmill split): train, val or
            test.
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
    part: Annotated[Maybe[str], arg(metavar="{train,val,test}")] = None
    ontology: Maybe[str] = None
    protocol: Annotated[Maybe[str], arg(metavar="{seed,unified,custom}")] = None
    zero_shot: Maybe[str] = None
    common: Flag = False
    mapping: Annotated[Maybe[str], arg(metavar="FILE")] = None
    others: Annotated[Maybe[str], arg(metavar="{background,ignored}")] = None
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)
    corrections: Corrected = None
    known: KnownTable = None
    known_view: KnownView = None
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
        if self.labels is not None and self.part is not None:
            dataset = self._of_part(dataset, self.labels)
        if self.limit:
            dataset = dataclasses.replace(dataset, samples=dataset.samples[: self.limit])
        if classes is None and own is not None and set(dataset.class_names) <= set(own.names):
            classes = own  # the words that the student was trained with
        slug = result_name(dataset, recipe)
        # Find mistakes in the command before a tracking run is opened.
        output = new_folder(self.output, slug, overwrite=self.overwrite)
        view = None if self.labels is None else self.seen.of_table(self.labels)
        match = None if self.labels is None else self._match(dataset, self.labels, view)
        self._check_against(dataset, recipe, classes, view, match)
        corrections = None
        if self.labels is not None:
            say = functools.partial(console.print, highlight=False, soft_wrap=True, markup=False)
            corrections = open_believed(self.labels, self.corrections, self.known, self.known_view, say)
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
                else {
                    "labels": self.labels,
                    **_view_params(view),
                    **({"part": self.part} if self.part else {}),
                    **({} if corrections is None else {"corrections": corrections.identity}),
                },
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
                corrections=corrections,
            )
            made = read_table_record(self.labels or str(folder / "labels"))
            tracker.log_params({"ontology": {"hash": made.ontology.hash}})
            with timed(console, "writing the page", status):
                page = write_report([folder], folder / REPORT_FILE)
            log_result(tracker, folder)
            status.update(mlflow_run=tracker.run_id)
            status.finish("ok", f"Result: {folder}/evaluation.json")
            print_scores(result, console, told=len(dataset.left_out))
        console.print(
            f"Result         {folder}/evaluation.json\nLook at it:    {page.resolve().as_uri()}",
            highlight=False,
            soft_wrap=True,
        )
        return 0

    def _of_part(self, dataset: Dataset, labels: str) -> Dataset:
        """The samples whose images are in a part of the table's split."""
        chosen = choose(labels, self.part)
        if chosen is None:
            return dataset
        found = plan(labels, dataset.samples).samples
        ids = np.fromiter(found, np.int64, len(found))
        names = {found[row_id].name for row_id in ids[chosen.keep(ids)].tolist()}
        if not names:
            raise WrongUse(
                "too_few_images",
                f"The truth has none of the {len(chosen.ids):,} images of the part {chosen.part}.",
                "Give the truth of these images, or name another --part.",
            )
        samples = tuple(sample for sample in dataset.samples if sample.name in names)
        return dataclasses.replace(dataset, samples=samples)

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
        class_groups(dataset, self.zero_shot)
        if recipe is None:
            made = read_table_record(str(self.labels))
            followed_protocol(dataset, self._asked, table_recipe(made), made.ontology)
            if match is None:
                classes = made.ontology if view is None else view.ontology
                class_lookup(classes.names, dataset.class_names, ignore_index=classes.ignore_index)
            for sample in list(plan(str(self.labels), dataset.samples).samples.values())[:1]:
                dataset.truth(sample)
        else:
            refuse_missing_file(recipe.pretrained)
            plan_labelling(dataset, recipe, words, self._asked)
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
                self.labels is None
                and (
                    self.seen.given
                    or self.common
                    or self.mapping
                    or self.part
                    or self.corrections
                    or self.known
                    or self.known_view
                ),
                "--common, --mapping, --part, --corrections, --known and views of a table are for --labels.",
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


def _view_params(view: TableView | None) -> dict[str, Any]:
    return {} if view is None else {"view": view.view.to_dict()}
