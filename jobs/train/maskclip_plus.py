"""``maskmill train maskclip-plus``: a label table → a student, better and faster than its teacher."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from tyro.conf import arg

from jobs.believed import KnownTable, KnownView
from jobs.console import say_left_out, stderr_console
from jobs.options import (
    FLAT,
    Corrected,
    Flag,
    Maybe,
    Settings,
    Truth,
    ViewOptions,
    comma_separated,
    refuse_missing_file,
)
from jobs.train.networks import (
    build_student,
    build_teacher,
    student_state,
    teacher_recipe,
    text_ids,
    text_source,
    without_background,
)
from jobs.train.run import (
    PACKAGES,
    Finished,
    Prepared,
    TrainOptions,
    places_read,
    recipe_identity,
    run_training,
)
from models.errors import WrongUse, did_you_mean
from pipeline.datasets.base import Dataset
from pipeline.datasets.zeroshot import SPLITS
from pipeline.files.versions import versions
from pipeline.labelling.prepare import embed_names
from pipeline.labelling.recipes import recipe_from_dict
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.ontology.united import unite
from pipeline.report.student_page import student_commands, write_student_page
from pipeline.report.training_page import PAGE, SHEET
from pipeline.table.corrections import Corrections, open_corrections
from pipeline.table.record import content_digest, read_table_record
from pipeline.table.splits import Chosen, choose
from pipeline.table.views import TableView
from pipeline.tracking.tracker import TrackedDataset
from pipeline.trained.student import RECORD_FILE, WEIGHTS_FILE, read_student_record, write_student_folder

if TYPE_CHECKING:
    from models.student.deeplab import DeepLab
    from pipeline.training.loop.checkpoints import Checkpoint
    from pipeline.training.maskclip_plus.recipes import MaskClipPlusRecipe
    from pipeline.training.samples.mixed import MixedSamples
    from pipeline.training.samples.table import TableSamples

COLLAPSED = "self_training_collapsed"
OWN_ENTRIES = ("checkpoints", "metrics.jsonl", RECORD_FILE, WEIGHTS_FILE, SHEET, PAGE)
"""What a run writes into its output, and what ``overwrite`` may delete."""


@dataclass(frozen=True, kw_only=True)
class TrainMaskClipPlus:
    """Train a student on a label table: MaskCLIP+.

    After a crash, run the same command again: it resumes from the last checkpoint.

    Attributes:
        labels: the teacher's label table, the --output of maskmill label.
        recipe: named recipe or YAML file; maskmill recipes lists them.
        settings: change one setting of the recipe: iterations=500, loop.batch_size=8; may be repeated.
        ontology: classes to train, YAML file or built-in name; default: those of --labels
            as the view has them.
        unseen: classes whose truth is withheld: "cow, motorbike", or a zero-shot split (voc20); needs truth
            of the seen classes for the images of --labels.
        second: a label table of the same images by another teacher, seen through the same view: pixels on
            which the two differ are not learned.
        part: part of the split of --labels (maskmill split) to train on: train, val, test or all; default:
            train, if the table has been split.
        known_complete: in the images of --known its classes are nowhere else: guesses of them are ignored.
    """

    labels: str
    recipe: str = "maskclip-plus-voc20"
    settings: Settings = ()
    ontology: Maybe[str] = None
    unseen: Maybe[str] = None
    data: Annotated[Truth, FLAT] = field(default_factory=Truth)
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)
    part: Annotated[Maybe[str], arg(metavar="{train,val,test,all}")] = None
    second: Annotated[Maybe[str], arg(metavar="TABLE")] = None
    known: KnownTable = None
    known_view: KnownView = None
    known_complete: Flag = False
    corrections: Corrected = None
    options: Annotated[TrainOptions, FLAT]

    def run(self, console: Console | None = None) -> int:
        """Train; see ``train_student``."""
        from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

        recipe = MASKCLIP_PLUS_RECIPES.load(self.recipe, self.settings)
        if self.unseen is not None:
            changes = {"form": "zero-shot", "unseen": comma_separated(self.unseen)}
            recipe = MASKCLIP_PLUS_RECIPES.change(recipe, changes)
        classes = load_ontology(self.ontology) if self.ontology is not None else None
        truth = None
        if self.data.given:
            # A benchmark brings its classes; the user's own masks have those of the student.
            own_masks = self.data.dataset is None
            truth = self.data.open(
                classes if own_masks else None,
                table=self.labels if own_masks else None,
                command="train maskclip-plus",
            )
            say_left_out(console or stderr_console(), truth)
        view = self.seen.of_table(self.labels)
        if self.second is not None:
            read_table_record(self.second)
            if recipe.form == "supervised" or recipe.selftrain.teacher == "online":
                raise WrongUse(
                    "wrong_use",
                    f"Recipe {recipe.name} does not learn from a table's labels, which --second confirms.",
                    "Leave --second out, or take an annotation-free or zero-shot recipe and teacher=table.",
                )
        known = self._known()
        chosen = choose(self.labels, self.part, default="train")
        corrections = self._corrections(known, truth, recipe, console or stderr_console())
        for line in self.seen.keep(self.labels, view):
            (console or stderr_console()).print(line, highlight=False, soft_wrap=True)
        return train_student(
            self.labels,
            recipe,
            self.options,
            ontology=classes,
            truth=truth,
            view=view,
            second=self.second,
            known=known,
            chosen=chosen,
            corrections=corrections,
            console=console,
        )

    def _corrections(
        self, known: Known | None, truth: Dataset | None, recipe: MaskClipPlusRecipe, console: Console
    ) -> Corrections | None:
        """What people say of the table, if this training can believe it; says so."""
        found = open_corrections(self.labels, self.corrections)
        if found is None:
            return None
        why = next(
            (
                why
                for why, wrong in (
                    ("--known is believed instead", known is not None),
                    ("there is other truth", truth is not None),
                )
                if wrong
            ),
            "",
        )
        if why and self.corrections is not None:
            raise WrongUse("wrong_use", f"--corrections cannot be used: {why}.", "Leave one of them out.")
        said = (
            f"Without {found.described()}: {why}."
            if why
            else f"With {found.described()}, which are believed."
        )
        console.print(said, highlight=False, soft_wrap=True, markup=False)
        return None if why else found

    def _known(self) -> Known | None:
        """The table that is believed."""
        if self.known is None:
            if self.known_view is not None or self.known_complete:
                raise WrongUse(
                    "wrong_use", "--known-view and --known-complete are for --known.", "Add --known TABLE."
                )
            return None
        if self.data.given:
            raise WrongUse(
                "wrong_use",
                "--known is truth in a label table, and there is other truth beside it.",
                "Give --known, or --dataset, or --images and --truth.",
            )
        view = ViewOptions(view=self.known_view).of_table(self.known)
        return Known(self.known, view, self.known_complete)


@dataclass(frozen=True)
class Known:
    """A label table that is believed; see ``pipeline.training.samples.mixed``.

    Attributes:
        labels: the table.
        view: of it.
        complete: its classes are nowhere else in its images.
    """

    labels: str
    view: TableView | None = None
    complete: bool = False

    @property
    def ontology(self) -> Ontology:
        """Its classes, as the view has them."""
        return read_table_record(self.labels).ontology if self.view is None else self.view.ontology

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        view = {} if self.view is None else {"view": self.view.view.to_dict()}
        return {"labels": self.labels, "complete": self.complete, **view}

    @property
    def identity(self) -> str:
        """What must stay the same when a training resumes."""
        view = "" if self.view is None else self.view.view.canonical
        return f"{content_digest(self.labels)}, {view or 'whole'}{', complete' if self.complete else ''}"


def train_student(
    labels: str,
    recipe: MaskClipPlusRecipe,
    options: TrainOptions,
    *,
    ontology: Ontology | None = None,
    truth: Dataset | None = None,
    view: TableView | None = None,
    second: str | None = None,
    known: Known | None = None,
    chosen: Chosen | None = None,
    corrections: Corrections | None = None,
    console: Console | None = None,
) -> int:
    """Train a student and write its folder. Returns the exit status; see ``jobs.train.run.run_training``.

    Args:
        labels: the teacher's label table.
        ontology: the student's classes; None takes those of the table, or of its view.
        truth: true masks of the table's images, for the zero-shot and supervised forms; None if
            annotation-free.
        view: of the table.
        second: a table of the same images by another teacher: pixels on which the two differ are not learned.
        known: another table, whose labels are believed; only for the annotation-free form.
        chosen: the images of the table to train on; None is all.
        corrections: what people say of the table, which is believed; not together with ``known``.
    """
    refuse_missing_file(recipe.backbone_weights)
    return run_training(
        "maskclip-plus",
        options,
        functools.partial(
            _prepare, labels, recipe, options, ontology, truth, view, second, known, chosen, corrections
        ),
        result_file=RECORD_FILE,
        own_entries=OWN_ENTRIES,
        console=console,
    )


def _prepare(
    labels: str,
    recipe: MaskClipPlusRecipe,
    options: TrainOptions,
    ontology: Ontology | None,
    truth: Dataset | None,
    view: TableView | None,
    second: str | None,
    known: Known | None,
    chosen: Chosen | None,
    corrections: Corrections | None,
) -> Prepared:
    table = read_table_record(labels)
    if ontology is None:
        ontology = table.ontology if view is None else view.ontology
        ontology = ontology if known is None else unite(ontology, known.ontology)
    unseen = unseen_ids(recipe.unseen, ontology)
    needs_truth = recipe.form != "annotation-free" or recipe.void_from_truth
    if needs_truth and truth is None:
        raise WrongUse(
            "wrong_use",
            f"Recipe {recipe.name} ({recipe.form}) trains with truth, and none is given.",
            "Give --dataset NAME --root DIR (maskmill datasets lists them), or --images and --truth.",
        )
    if truth is not None and not needs_truth:
        raise WrongUse(
            "wrong_use",
            f"Recipe {recipe.name} is annotation-free: it does not use the truth of {truth.name}.",
            "Leave it out, or name the classes whose truth to withhold: --unseen 'cow, motorbike'.",
        )
    if known is not None and (recipe.form != "annotation-free" or recipe.repeat_threshold):
        what = "repeat_threshold" if recipe.form == "annotation-free" else f"form {recipe.form}"
        raise WrongUse(
            "wrong_use",
            f"Recipe {recipe.name} ({what}) cannot train on --known.",
            "Take an annotation-free recipe without repeat_threshold: known labels are truth in it.",
        )
    from pipeline.training.maskclip_plus.task import MaskClipPlus
    from pipeline.training.samples.corrected import open_corrected_samples
    from pipeline.training.samples.mixed import MixedSamples, mix
    from pipeline.training.samples.table import TableSamples, open_table_samples

    source, text_weights = text_source(recipe, table, labels)
    text = embed_names(source, ontology, "fp32")
    if recipe.student.learned_background:
        text = without_background(text, ontology)
    config = recipe.student.replace(embed_dim=text.embeddings.shape[1])
    make_student = functools.partial(
        build_student,
        config,
        text.embeddings.numpy(),
        text.class_ids.numpy(),
        text.num_classes,
        recipe.backbone_weights,
    )
    make_student()  # fail early if it cannot be built

    def other(table: str) -> TableSamples:
        through = None if view is None else view.view.of(read_table_record(table).ontology, where=table)
        return open_table_samples(table, ontology=ontology, augment=recipe.augment, view=through)

    samples = open_corrected_samples(
        labels,
        corrections,
        ontology=ontology,
        augment=recipe.augment,
        truth=truth,
        unseen_ids=unseen,
        repeat_threshold=recipe.repeat_threshold,
        min_quality=recipe.min_quality,
        void_from_truth=recipe.void_from_truth,
        view=view,
        second=None if second is None else other(second),
        chosen=chosen,
    )
    if known is not None:
        assert isinstance(samples, TableSamples), "corrections are not used together with it"
        believed = open_table_samples(
            known.labels,
            ontology=ontology,
            augment=recipe.augment,
            view=known.view,
            # Test images are not to be learnt from because their truth is known.
            chosen=None if chosen is None else replace(chosen, strict=False),
        )
        samples = mix(samples, believed, complete=known.complete)
    guessable = {"annotation-free": None, "zero-shot": tuple(unseen), "supervised": ()}[recipe.form]
    settings = recipe.selftrain.replace(guessable=guessable)
    make_teacher = None
    if settings.teacher == "online":
        make_teacher = functools.partial(
            build_teacher, teacher_recipe(table, labels), text.embeddings.numpy(),
            text.class_ids.numpy(), text.num_classes, text_ids(settings, ontology, recipe.student),
        )  # fmt: skip
    weighted = settings.guided_class_power or settings.self_class_power
    make_task = functools.partial(
        MaskClipPlus,
        ontology.names,
        settings,
        make_student,
        make_teacher=make_teacher,
        class_frequencies=samples.class_frequencies().tolist() if weighted else None,
        some_truth=isinstance(samples, MixedSamples),
    )
    make_task()
    record = {
        "teacher": {
            "recipe": table.recipe,
            "weights": table.weights,
            "labels": labels,
            "counts": table.counts if view is None else _rows_counted(table.counts),
            **({} if view is None else {"view": view.view.to_dict(), "view_says": view.view.described()}),
            **({} if second is None else {"second": second}),
            **({} if known is None else {"known": known.to_dict()}),
            **({} if chosen is None else {"split": chosen.identity, "part": chosen.part}),
            **({} if corrections is None else {"corrections": corrections.described()}),
        },
        "text": text_weights | {"precision": "fp32"},
        "recipe": recipe.to_dict() | {"hash": recipe.hash},
    }
    table_hash = content_digest(labels)
    with_truth = "" if truth is None else f", truth of {truth.name} for the others"
    if isinstance(samples, MixedSamples):
        with_truth = f"; {samples.num_known:,} images have known labels"
    count = ontology.num_classes
    guessed = f"all {count}" if guessable is None else f"{len(guessable)} of {count}"
    toy = " (a toy)" if config.backbone == "light" else ""
    parts = dict.fromkeys((config.decoder, config.backbone))
    left_out = "".join(f", {number:,} left out ({why})" for why, number in samples.left_out.items() if number)
    return Prepared(
        make_task=make_task,
        samples=samples,
        reads=places_read(
            (
                labels,
                second,
                None if known is None else known.labels,
                None if corrections is None else corrections.place,
            ),
            truth,
        ),
        settings=recipe.loop,
        identity=recipe_identity(recipe)
        | {
            "classes": ontology.hash,
            "labels (what is in the table)": table_hash,
            "truth": None if truth is None else truth.fingerprint(),
        }
        | ({} if view is None else {"view": view.view.canonical})
        | ({} if second is None else {"second": content_digest(second)})
        | ({} if known is None else {"known": known.identity})
        | ({} if chosen is None else {"part": f"{chosen.part} of the split {chosen.identity}"})
        | ({} if corrections is None else {"corrections": corrections.identity}),
        announcement=(
            f"Training a student ({', '.join(parts)}){toy}, {recipe.loop.iterations:,} steps "
            f"of {recipe.loop.batch_size} crops from {samples.num_images:,} labelled images{left_out}; "
            f"{guessed} classes are guessed{with_truth} → {options.output}"
        ),
        params={
            "recipe": record["recipe"],
            "teacher": {"weights": table.weights},
            "labels": labels,
            **({} if view is None else {"view": view.view.to_dict()}),
            **({} if second is None else {"second": second}),
            **({} if known is None else {"known": known.to_dict()}),
            **({} if chosen is None else {"split": chosen.identity, "part": chosen.part}),
        },
        dataset=TrackedDataset(
            labels,
            table_hash,
            source=labels,
            profile={"images": samples.num_images, "classes": ontology.num_classes},
            context="training",
        ),
        finish=functools.partial(_finish, recipe, options, ontology, make_student, samples, record, unseen),
        write_pages=functools.partial(_write_pages, labels, truth, view),
        commands=student_commands(options.output),
        log_model=functools.partial(_log_model, options),
        fallback=COLLAPSED,
    )


def _rows_counted(counts: Mapping[str, Any]) -> dict[str, Any]:
    """What a table's counts say of its rows, which is so through every view, unlike that of their pixels."""
    return {name: counts[name] for name in ("images", "labelled", "failed", "status") if name in counts}


def unseen_ids(unseen: Sequence[str], ontology: Ontology) -> tuple[int, ...]:
    """Ids of the classes whose truth is withheld.

    Args:
        unseen: class names, or the name of one zero-shot split.

    Raises:
        MaskMillError: ``ontology_invalid``.
    """
    if len(unseen) == 1 and unseen[0] in SPLITS and unseen[0] not in ontology.names:
        unseen = SPLITS[unseen[0]].unseen
    absent = [name for name in unseen if name not in ontology.names]
    if absent:
        raise WrongUse(
            "ontology_invalid",
            f"Of the unseen classes, {', '.join(absent)} are not among those to train with.",
            f"{did_you_mean(absent[0], [*ontology.names, *SPLITS])}Known: {', '.join(ontology.names[:30])}; "
            f"or a zero-shot split: {', '.join(SPLITS)}.",
        )
    return tuple(sorted({ontology.names.index(name) for name in unseen}))


def _finish(
    recipe: MaskClipPlusRecipe,
    options: TrainOptions,
    ontology: Ontology,
    make_student: functools.partial[DeepLab],
    samples: TableSamples | MixedSamples,
    record: Mapping[str, Any],
    unseen: Sequence[int],
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
) -> Finished:
    """Write the student's folder."""
    # The checkpoint replaces all weights, so do not fetch any for the backbone.
    student = functools.partial(make_student.func, *make_student.args[:-1], "none")()
    student.load_state_dict(student_state(checkpoint, keep_average=recipe.keep_average))
    last = checkpoint.lines[-1] if checkpoint.lines else {}
    metrics = {key: value for key, value in last.items() if isinstance(value, float) and key != "seconds"}
    teacher = recipe_from_dict(record["teacher"]["recipe"])
    written = write_student_folder(
        options.output,
        student.eval(),
        ontology=ontology,
        recipe=record["recipe"],
        labelling=teacher.images.replace(corruption=""),
        teacher=record["teacher"],
        text=record["text"],
        metrics=metrics,
        training=dict(facts) | {"unseen": [ontology.names[index] for index in unseen]},
        versions=versions(PACKAGES),
        overwrite=True,
    )
    return Finished([f"  student        {written.uri}/{WEIGHTS_FILE}, {RECORD_FILE}"], metrics)


def _write_pages(
    labels: str,
    truth: Dataset | None,
    view: TableView | None,
    folder: Path,
    lines: Sequence[Mapping[str, Any]],
) -> list[str]:
    return write_student_page(read_student_record(folder), lines, labels=labels, truth=truth, view=view)


def _log_model(options: TrainOptions, run_id: str, register_as: str) -> str:
    from pipeline.serving.flavours.student import log_student
    from pipeline.tracking.destination import connect, resolve_uri

    client = connect(resolve_uri(options.tracking))
    return str(log_student(client, options.output, run_id=run_id, register_as=register_as))
