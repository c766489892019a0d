"""``maskmill train clipseg``: images, prompts and masks → a CLIPSeg decoder over a frozen CLIP."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from jobs.clipseg_data import open_source
from jobs.clipseg_recipes import ClipSegRecipe
from jobs.train import PACKAGES, Finished, Prepared, TrainOptions, run_training
from jobs.versions import versions
from models.errors import MaskMillError
from pipeline.clipseg_folder import (
    DECODER_FILE,
    HUGGING_FACE_FILES,
    RECORD_FILE,
    write_clipseg_folder,
)
from pipeline.datasets.base import Dataset
from pipeline.ontology import Ontology
from pipeline.storage import open_storage
from pipeline.tracking.tracker import TrackedDataset
from pipeline.training.clipseg import ClipSegTask
from pipeline.training.triplets import OBJECT, TripletSamples, decode_phrase

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from models.clipseg import ClipSeg
    from pipeline.training.checkpoints import Checkpoint
    from pipeline.training.protocols import Samples

SHEET = "preview.png"
SHOWN = 9
OWN_ENTRIES = ("checkpoints", "metrics.jsonl", RECORD_FILE, DECODER_FILE, *HUGGING_FACE_FILES, SHEET)
"""What a run makes in its output, and what ``overwrite`` may delete."""


@dataclass(frozen=True, kw_only=True)
class TrainClipSegJob:
    """Everything that a training of CLIPSeg is asked for.

    Attributes:
        recipe: how to train.
        options: where to, and on what.
        labels: a label table to learn from, without annotation.
        ontology: what its classes are called; None takes the table's own.
        dataset: instead of a table, images with truth or PhraseCut.
    """

    recipe: ClipSegRecipe
    options: TrainOptions
    labels: str | None = None
    ontology: Ontology | None = None
    dataset: Dataset | None = None


def run(job: TrainClipSegJob, console: Console | None = None) -> int:
    """Train a decoder and write its folder. Returns the exit status; see ``jobs.train.run_training``.

    Raises:
        MaskMillError: ``wrong_use`` unless either a table or a data set is given; and as ``run_training``.
    """
    if (job.labels is None) == (job.dataset is None):
        raise MaskMillError(
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
    return Prepared(
        make_task=functools.partial(ClipSegTask, make_model),
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
    )


def _finish(
    job: TrainClipSegJob,
    make_model: Callable[[torch.device], ClipSeg],
    samples: TripletSamples,
    checkpoint: Checkpoint,
    facts: Mapping[str, Any],
    console: Console,
) -> Finished:
    """Write the model's folder and its picture."""
    from models.precision import best_device

    model = make_model(best_device())
    model.decoder.load_state_dict(checkpoint.module)
    model.decoder.eval()
    last = checkpoint.lines[-1] if checkpoint.lines else {}
    metrics = {key: value for key, value in last.items() if isinstance(value, float) and key != "seconds"}
    settings = job.recipe.model
    storage = open_storage(job.options.output)
    artifacts = []
    if storage.is_local:
        artifacts = [storage.path(name) for name in (SHEET, RECORD_FILE, DECODER_FILE)]
        preview(model, samples, seed=job.recipe.loop.seed).save(artifacts[0])
    # Last of all: a folder with this record is a finished run.
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
    lines += [f"  picture        {path}" for path in artifacts[:1]]
    if record.hugging_face:
        lines.append(f'Use it: maskmill segment IMAGE --prompt "..." --weights {storage.uri} --output OUT')
    return Finished(lines, {}, artifacts)


def preview(model: ClipSeg, samples: Samples, *, seed: int, count: int = SHOWN) -> Image.Image:
    """Some of the samples that were trained on: image, what is asked, what is there, what is found.

    Args:
        model: trained.
        samples: see ``ClipSegTask``; those that cannot be read are passed over.
        seed: of the choice and of the augmentation.
        count: how many.
    """
    import torch
    from PIL import Image

    from models.clipseg import mix, normalize
    from pipeline.report.prompts import Found, overview

    device = model.clip.device
    panels: list[Image.Image] = []
    for index in samples.order(0, seed)[: 4 * count].tolist():
        if len(panels) == count:
            break
        try:
            sample = samples.load(index, np.random.default_rng((seed, index)))
            phrase, share = decode_phrase(sample["phrase"]), float(sample["text_weight"])
            image, support = (
                torch.from_numpy(sample[name])[None].to(device) for name in ("image", "support")
            )
            with torch.no_grad():
                texts = model.encode_text([phrase]) if share > 0 else None
                pictures = model.encode_prompt_images(normalize(support)) if share < 1 else texts
                assert pictures is not None
                conditional = pictures if texts is None else mix(texts, pictures, share)
                p = model(normalize(image), conditional)[0, 0].sigmoid().cpu().numpy()
        except MaskMillError:
            continue
        there = sample["mask"] == OBJECT
        union = int((there | (p > 0.5)).sum())
        iou = f"IoU {(there & (p > 0.5)).sum() / union:.2f}" if union else "rightly nothing"
        asked = f"text {share:.0%}" if share < 1 else "text"
        pixels = np.ascontiguousarray(sample["image"].transpose(1, 2, 0))
        example = np.ascontiguousarray(sample["support"].transpose(1, 2, 0)) if share < 1 else None
        panels.append(
            overview(
                "", pixels,
                [
                    Found("there", there.astype(np.uint8) * 255, there, f"{there.mean():.1%} of the pixels"),
                    Found(
                        phrase or "(picture alone)", np.rint(p * 255).astype(np.uint8), p > 0.5,
                        f"{asked}, {iou}", example,
                    ),
                ],
                side=160,
            )
        )  # fmt: skip
    columns = min(3, len(panels)) or 1
    width = max((panel.width for panel in panels), default=1)
    height = max((panel.height for panel in panels), default=1)
    sheet = Image.new("RGB", (columns * width, -(-len(panels) // columns) * height or 1), "white")
    for position, panel in enumerate(panels):
        sheet.paste(panel, (position % columns * width, position // columns * height))
    return sheet
