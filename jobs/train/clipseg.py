"""``maskmill train clipseg``: images, prompts and masks → a CLIPSeg decoder over a frozen CLIP."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console

from jobs.train.run import PACKAGES, Finished, Prepared, TrainOptions, run_training
from models.errors import WrongUse
from pipeline.datasets.base import Dataset
from pipeline.files.storage import open_storage
from pipeline.files.versions import versions
from pipeline.ontology.ontology import Ontology
from pipeline.report.training_page import PAGE, SHEET, write_clipseg_page
from pipeline.tracking.tracker import TrackedDataset
from pipeline.trained.clipseg import (
    DECODER_FILE,
    HUGGING_FACE_FILES,
    RECORD_FILE,
    write_clipseg_folder,
)
from pipeline.training.clipseg.data import open_source
from pipeline.training.clipseg.recipes import ClipSegRecipe
from pipeline.training.clipseg.task import ClipSegTask
from pipeline.training.clipseg.triplets import TripletSamples

if TYPE_CHECKING:
    import torch

    from models.clipseg.decoder import ClipSeg
    from pipeline.training.loop.checkpoints import Checkpoint

OWN_ENTRIES = ("checkpoints", "metrics.jsonl", RECORD_FILE, DECODER_FILE, *HUGGING_FACE_FILES, SHEET, PAGE)
"""What a run makes in its output, and what ``overwrite`` may delete."""


@dataclass(frozen=True, kw_only=True)
class TrainClipSegJob:
    """Everything that a training of CLIPSeg is asked for.

    Attributes:
        recipe: how to train.
        options: where to, and on what.
        labels: a label table to learn from, without annotation.
        ontology: what its classes are called; None takes the table's own.
        dataset: images with truth or PhraseCut, instead of a table; or beside one that guesses the unseen
            classes of the recipe.
    """

    recipe: ClipSegRecipe
    options: TrainOptions
    labels: str | None = None
    ontology: Ontology | None = None
    dataset: Dataset | None = None


def run(job: TrainClipSegJob, console: Console | None = None) -> int:
    """Train a decoder and write its folder. Returns the exit status; see ``jobs.train.run.run_training``.

    Raises:
        MaskMillError: ``wrong_use`` if neither a table nor a data set is given; and as ``run_training``.
    """
    if job.labels is None and job.dataset is None:
        raise WrongUse(
            "wrong_use",
            "Give what to train on: a label table, or images with truth.",
            "Use --labels TABLE, --dataset NAME --root DIR, or --images DIR --truth DIR --ontology FILE.",
        )
    return run_training(
        "clipseg",
        job.options,
        functools.partial(_prepare, job),
        result_file=RECORD_FILE,
        own_entries=OWN_ENTRIES,
        console=console,
    )


def _prepare(job: TrainClipSegJob) -> Prepared:
    import torch

    recipe = job.recipe
    make_model = functools.partial(recipe.model.build, seed=recipe.loop.seed)
    model = make_model(torch.device("cpu"))  # what is wrong with it shows here
    source = open_source(recipe.source, labels=job.labels, ontology=job.ontology, dataset=job.dataset)
    samples = TripletSamples(source, recipe.triplets)
    data = samples.record()
    record = recipe.to_dict() | {"hash": recipe.hash}
    trained = sum(p.numel() for p in model.decoder.parameters() if p.requires_grad)
    toy = " (a toy)" if model.clip.name == "toyclip" else ""
    start = f"from {recipe.model.start}, " if recipe.model.start else ""
    commands = commands_for(job.options.output)
    return Prepared(
        make_task=functools.partial(
            ClipSegTask, make_model, ahead=samples, whiten=recipe.model.whiten, keep=bool(recipe.model.start)
        ),
        samples=samples,
        settings=recipe.loop,
        identity={"recipe": recipe.hash, "model": model.fingerprint, "data": source.fingerprint},
        announcement=(
            f"Training {recipe.model.kind} over {model.clip.name}{toy}, {start}{trained:,} parameters, "
            f"{recipe.loop.iterations:,} steps of {recipe.loop.batch_size}; {source.name}: "
            f"{data['triplets']:,} pairs of {data['images']:,} images and {data['phrases']:,} phrases "
            f"→ {job.options.output}"
        ),
        params={"recipe": record, "data": data},
        dataset=TrackedDataset(
            source.name,
            source.fingerprint,
            source=job.labels,
            profile={name: data[name] for name in ("images", "phrases", "triplets")},
            context="training",
        ),
        finish=functools.partial(_finish, job, make_model, samples),
        write_pages=functools.partial(
            write_clipseg_page, samples=samples, seed=recipe.loop.seed, commands=commands
        ),
        commands=commands,
        # It is large, with its CLIP: who wants a copy in MLflow names it.
        log_model=functools.partial(_log_model, job.options) if job.options.register_as else None,
    )


def commands_for(output: str) -> dict[str, str]:
    """What to do with the model in a folder, by purpose."""
    folder = shlex.quote(output)
    return {
        "Ask it": f'maskmill segment IMAGE --prompt "..." --weights {folder} --output OUT',
        "See it": f"maskmill serve --model {folder}",
        "Label with it": f"maskmill label --model {folder} --images DIR --ontology FILE --output OUT",
        "Measure it": f"maskmill evaluate --model {folder} --dataset NAME --root DIR",
    }


def _finish(
    job: TrainClipSegJob,
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
    settings = job.recipe.model
    storage = open_storage(job.options.output)
    record, reason = write_clipseg_folder(
        job.options.output,
        model,
        kind=settings.kind,
        tower_weights=settings.tower_weights if settings.kind == "vitseg" else None,
        recipe=job.recipe.to_dict() | {"hash": job.recipe.hash},
        data=samples.record(),
        metrics=metrics,
        training=facts,
        versions=versions(PACKAGES),
        overwrite=job.options.overwrite,
    )
    lines = [f"  decoder        {storage.uri_of(DECODER_FILE)}, {RECORD_FILE}"]
    if record.hugging_face:
        lines.append(f"  with its CLIP  {storage.uri}, in Hugging Face's layout (transformers reads it)")
    else:
        lines.append(f"  not in Hugging Face's layout: {reason}")
    artifacts = [storage.path(name) for name in (RECORD_FILE, DECODER_FILE)] if storage.is_local else []
    return Finished(lines, metrics, artifacts)


def _log_model(options: TrainOptions, run_id: str, register_as: str | None) -> str:
    from pipeline.serving.flavours.clipseg import log_clipseg
    from pipeline.tracking.destination import connect, resolve_uri

    client = connect(resolve_uri(options.tracking))
    return str(log_clipseg(client, options.output, run_id=run_id, register_as=register_as))
