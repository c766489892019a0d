"""``maskmill train clipseg``: images, prompts and masks → a CLIPSeg decoder over a frozen CLIP."""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from tyro.conf import arg

from jobs.console import say_left_out, stderr_console
from jobs.options import (
    FLAT,
    Corrected,
    Maybe,
    Settings,
    Truth,
    ViewOptions,
    comma_separated,
    refuse_missing_file,
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
from models.errors import WrongUse
from pipeline.datasets.base import Dataset
from pipeline.datasets.pairs import open_pairs
from pipeline.datasets.registry import open_dataset
from pipeline.files.storage import open_storage
from pipeline.files.versions import versions
from pipeline.ontology.ontology import Ontology
from pipeline.ontology.reading import load_ontology
from pipeline.report.clipseg_page import write_clipseg_page
from pipeline.report.training_page import PAGE, SHEET
from pipeline.table.corrections import Corrections, open_corrections
from pipeline.table.splits import Chosen, choose
from pipeline.table.views import TableView
from pipeline.tracking.tracker import TrackedDataset
from pipeline.trained.clipseg import (
    DECODER_FILE,
    HUGGING_FACE_FILES,
    RECORD_FILE,
    write_clipseg_folder,
)

if TYPE_CHECKING:
    import torch

    from models.clipseg.decoder import ClipSeg
    from pipeline.training.clipseg.recipes import ClipSegRecipe
    from pipeline.training.clipseg.triplets import TripletSamples
    from pipeline.training.loop.checkpoints import Checkpoint

OWN_ENTRIES = ("checkpoints", "metrics.jsonl", RECORD_FILE, DECODER_FILE, *HUGGING_FACE_FILES, SHEET, PAGE)
"""What a run writes into its output, and what ``overwrite`` may delete."""
WHAT_TO_TRAIN_ON = (
    "Give truth, or labels, or both.",
    "Use --labels TABLE, --dataset NAME --root DIR --split PART, or --images DIR --truth DIR "
    "--ontology FILE. With truth, labels are for the --unseen classes.",
)


@dataclass(frozen=True, kw_only=True)
class TrainClipSeg:
    """Train CLIPSeg to find what words and example pictures describe.

    After a crash, run the same command again: it resumes from the last checkpoint.

    Attributes:
        recipe: named recipe or YAML file; maskmill recipes lists them.
        settings: change one setting of the recipe: iterations=500, reduce_dim=16; may be repeated.
        labels: label table (the --output of maskmill label) to train on without annotation. Combined with
            truth, the --unseen classes are learnt from it.
        part: part of the split of --labels (maskmill split) to train on: train, val, test or all; default:
            train, if the table has been split.
        ontology: class names, YAML file or built-in name: for --truth, or to replace those of --labels.
        scenes: number of toyworld scenes; default: 2000.
        unseen: classes left out of the truth (of the labels if there is no truth): "cow, motorbike", a
            zero-shot split (pascal-unseen10), a fold (pascal5i:0, coco20i:3), or affordances.
        start: weights to start from: a file (rd64-uni.pth), a folder, or a hub name; best with --recipe
            finetune.
    """

    recipe: str = "clipseg-phrasecut-plus"
    settings: Settings = ()
    labels: Maybe[str] = None
    part: Annotated[Maybe[str], arg(metavar="{train,val,test,all}")] = None
    ontology: Maybe[str] = None
    data: Annotated[Truth, FLAT] = field(default_factory=Truth)
    scenes: Maybe[int] = None
    unseen: Maybe[str] = None
    start: Maybe[str] = None
    seen: Annotated[ViewOptions, FLAT] = field(default_factory=ViewOptions)
    corrections: Corrected = None
    options: Annotated[TrainOptions, FLAT]

    def run(self, console: Console | None = None) -> int:
        """Train; see ``train_clipseg``."""
        from pipeline.training.clipseg.recipes import CLIPSEG_RECIPES

        recipe = CLIPSEG_RECIPES.load(self.recipe, self.settings)
        if self.unseen is not None:
            recipe = CLIPSEG_RECIPES.change(recipe, {"source": {"unseen": comma_separated(self.unseen)}})
        if self.start is not None:
            recipe = CLIPSEG_RECIPES.change(recipe, {"model": {"start": self.start}})
        for what, given in (
            ("A view is one", self.seen.given),
            ("A part is one", self.part is not None),
            ("Corrections are", self.corrections is not None),
        ):
            if given and self.labels is None:
                raise WrongUse(
                    "wrong_use", f"{what} of a label table, and there is none.", "Add --labels TABLE."
                )
        classes = load_ontology(self.ontology) if self.ontology is not None else None
        dataset = self._dataset(classes)
        if dataset is not None:
            say_left_out(console or stderr_console(), dataset)
        view = None if self.labels is None else self.seen.of_table(self.labels)
        chosen = None if self.labels is None else choose(self.labels, self.part, default="train")
        corrections = None if self.labels is None else open_corrections(self.labels, self.corrections)
        if corrections is not None:
            said = f"With {corrections.described()}, which are believed."
            (console or stderr_console()).print(said, highlight=False, soft_wrap=True, markup=False)
        for line in [] if self.labels is None else self.seen.keep(self.labels, view):
            (console or stderr_console()).print(line, highlight=False, soft_wrap=True)
        return train_clipseg(
            recipe,
            self.options,
            labels=self.labels,
            ontology=classes if dataset is None else None,
            dataset=dataset,
            view=view,
            chosen=chosen,
            corrections=corrections,
            console=console,
        )

    def _dataset(self, classes: Ontology | None) -> Dataset | None:
        """Open the dataset with truth or PhraseCut, if one is given."""
        data = self.data
        if data.dataset is not None and data.images is not None:
            raise WrongUse("wrong_use", *WHAT_TO_TRAIN_ON)
        if data.dataset is None:
            if not data.given:
                return None
            if data.images is None or data.truth is None or classes is None:
                raise WrongUse("wrong_use", "--images needs --truth and --ontology.", "Add them.")
            return open_pairs(images=data.images, masks=data.truth, ontology=classes)
        if data.split is None:
            raise WrongUse(
                "wrong_use",
                f"{data.dataset} has parts that are reserved for testing.",
                "Name the one to train on: --split train (toyworld: --split seed-3).",
            )
        options: dict[str, Any] = {} if classes is None else {"ontology": classes}
        if data.dataset == "toyworld":
            options["count"] = 2000 if self.scenes is None else self.scenes
        dataset: Any = open_dataset(data.dataset, root=data.root, split=data.split, **options)
        return dataset


def train_clipseg(
    recipe: ClipSegRecipe,
    options: TrainOptions,
    *,
    labels: str | None = None,
    ontology: Ontology | None = None,
    dataset: Dataset | None = None,
    view: TableView | None = None,
    chosen: Chosen | None = None,
    corrections: Corrections | None = None,
    console: Console | None = None,
) -> int:
    """Train a decoder and write its folder. Returns the exit status; see ``jobs.train.run.run_training``.

    Args:
        labels: label table to learn from, without annotation.
        ontology: class names of the table; None takes its own, or those of its view.
        dataset: images with truth, or PhraseCut. Given with a table, the recipe's unseen classes are learnt
            from the table and all others from the truth.
        view: of the table.
        chosen: the images of the table to train on; None is all.
        corrections: what people say of the table, which is believed instead of its labels.

    Raises:
        MaskMillError: ``wrong_use`` if neither a table nor a dataset is given; and as ``run_training``.
    """
    refuse_missing_file(recipe.model.start)
    if labels is None and dataset is None:
        raise WrongUse("wrong_use", *WHAT_TO_TRAIN_ON)
    return run_training(
        "clipseg",
        options,
        functools.partial(prepare, recipe, options, labels, ontology, dataset, view, chosen, corrections),
        result_file=RECORD_FILE,
        own_entries=OWN_ENTRIES,
        console=console,
    )


def _identity(recipe: ClipSegRecipe, output: str) -> dict[str, str]:
    """``recipe_identity``; or the hash of the recipe, where an older version recorded that."""
    from pipeline.training.loop.checkpoints import CHECKPOINTS_DIR, SETTINGS_FILE

    recorded = open_storage(output).child(CHECKPOINTS_DIR).read_json(SETTINGS_FILE, None) or {}
    fields = {name: value for name, value in recipe.to_dict().items() if name != "name"}
    former = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    same = recorded.get("recipe") in (former, recipe.hash)
    return {"recipe": recorded["recipe"]} if same else recipe_identity(recipe)


def prepare(
    recipe: ClipSegRecipe,
    options: TrainOptions,
    labels: str | None,
    ontology: Ontology | None,
    dataset: Dataset | None,
    view: TableView | None = None,
    chosen: Chosen | None = None,
    corrections: Corrections | None = None,
) -> Prepared:
    """Read weights and data; see ``train_clipseg`` for the arguments."""
    from pipeline.training.clipseg.data import open_source
    from pipeline.training.clipseg.triplets import TripletSamples

    source = open_source(
        recipe.source,
        labels=labels,
        ontology=ontology,
        dataset=dataset,
        view=view,
        chosen=chosen,
        corrections=corrections,
    )

    import torch

    from pipeline.training.clipseg.task import ClipSegTask, build_model

    make_model = functools.partial(build_model, recipe.model, seed=recipe.loop.seed)
    model = make_model(torch.device("cpu"))  # fail early if it cannot be built
    samples = TripletSamples(source, recipe.triplets)
    data = samples.record()
    record = recipe.to_dict() | {"hash": recipe.hash}
    trained = sum(p.numel() for p in model.decoder.parameters() if p.requires_grad)
    toy = " (a toy)" if model.clip.name == "toyclip" else ""
    start = f"from {recipe.model.start}, " if recipe.model.start else ""
    left_out = "".join(f", {number:,} left out ({why})" for why, number in source.left_out.items() if number)
    commands = commands_for(options.output)
    return Prepared(
        make_task=functools.partial(
            ClipSegTask, make_model, ahead=samples, whiten=recipe.model.whiten, keep=bool(recipe.model.start)
        ),
        samples=samples,
        reads=places_read((labels, None if corrections is None else corrections.place), dataset),
        settings=recipe.loop,
        identity=_identity(recipe, options.output)
        | {"model": model.fingerprint, "data": source.fingerprint}
        | ({} if view is None else {"view": view.view.canonical})
        | ({} if chosen is None else {"part": f"{chosen.part} of the split {chosen.identity}"})
        | ({} if corrections is None else {"corrections": corrections.identity}),
        announcement=(
            f"Training {recipe.model.kind} over {model.clip.name}{toy}, {start}{trained:,} parameters, "
            f"{recipe.loop.iterations:,} steps of {recipe.loop.batch_size}; {source.name}: "
            f"{data['triplets']:,} pairs of {data['images']:,} images and {data['phrases']:,} phrases"
            f"{left_out} → {options.output}"
        ),
        params={
            "recipe": record,
            "data": data,
            **({} if view is None else {"view": view.view.to_dict()}),
            **({} if chosen is None else {"split": chosen.identity, "part": chosen.part}),
            **({} if corrections is None else {"corrections": corrections.described()}),
        },
        dataset=TrackedDataset(
            labels if labels is not None and dataset is None else source.name,
            source.fingerprint,
            source=labels,
            profile={name: data[name] for name in ("images", "phrases", "triplets")},
            context="training",
        ),
        finish=functools.partial(_finish, recipe, options, make_model, samples),
        write_pages=functools.partial(
            write_clipseg_page, samples=samples, seed=recipe.loop.seed, commands=commands
        ),
        commands=commands,
        log_model=functools.partial(_log_model, options),
    )


def commands_for(output: str) -> dict[str, str]:
    """Commands that use the model in a folder, by purpose."""
    folder = shlex.quote(output)
    return {
        "Ask it": f'maskmill segment IMAGE --prompt "..." --weights {folder} --output OUT',
        "See it": f"maskmill serve --model {folder}",
        "Label with it": f"maskmill label --model {folder} --images DIR --ontology FILE --output OUT",
        "Measure it": f"maskmill evaluate --model {folder} --dataset NAME --root DIR",
    }


def _finish(
    recipe: ClipSegRecipe,
    options: TrainOptions,
    make_model: Callable[[torch.device], ClipSeg],
    samples: TripletSamples,
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
) -> Finished:
    """Write the model's folder."""
    import torch

    from models.clipseg.whitening import fold

    model = make_model(torch.device("cpu"))
    model.decoder.load_state_dict(fold(checkpoint.module))
    last = checkpoint.lines[-1] if checkpoint.lines else {}
    metrics = {key: value for key, value in last.items() if isinstance(value, float) and key != "seconds"}
    settings = recipe.model
    storage = open_storage(options.output)
    record, reason = write_clipseg_folder(
        options.output,
        model,
        kind=settings.kind,
        tower_weights=settings.tower_weights if settings.kind == "vitseg" else None,
        recipe=recipe.to_dict() | {"hash": recipe.hash},
        data=samples.record(),
        metrics=metrics,
        training=facts,
        versions=versions(PACKAGES),
        overwrite=options.overwrite,
    )
    lines = [f"  decoder        {storage.uri_of(DECODER_FILE)}, {RECORD_FILE}"]
    if record.hugging_face:
        lines.append(f"  with its CLIP  {storage.uri}, in Hugging Face's layout (transformers reads it)")
    else:
        lines.append(f"  not in Hugging Face's layout: {reason}")
    artifacts = [storage.path(name) for name in (RECORD_FILE, DECODER_FILE)] if storage.is_local else []
    return Finished(lines, metrics, artifacts)


def _log_model(options: TrainOptions, run_id: str, register_as: str) -> str:
    from pipeline.serving.flavours.clipseg import log_clipseg
    from pipeline.tracking.destination import connect, resolve_uri

    client = connect(resolve_uri(options.tracking))
    return str(log_clipseg(client, options.output, run_id=run_id, register_as=register_as))
