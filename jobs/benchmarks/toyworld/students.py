"""The MaskCLIP+ sections of ``maskmill benchmark toyworld``: students against their teacher.

For every seed, the toy teacher labels fresh scenes, and three students are trained as by
``maskmill train maskclip-plus``: annotation-free, with the truth of the seen classes (zero-shot), and fully
supervised. All are evaluated on the same scenes as the other rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from jobs.benchmarks.rows import claim, row
from jobs.benchmarks.toyworld.labelling import CORPUS_SEED, scene_set
from jobs.label import label_images
from jobs.labelling.options import LabelOptions
from jobs.train.maskclip_plus import train_student, unseen_ids
from jobs.train.networks import student_state
from jobs.train.run import INTERRUPTED, TrainOptions
from models.device import best_device, native_precision
from pipeline.datasets.pairs import open_pairs
from pipeline.evaluation.results import Claim, Section
from pipeline.files.storage import open_storage
from pipeline.labelling.labeller import Labeller
from pipeline.labelling.prepare import prepare_labeller
from pipeline.labelling.recipes import RECIPES
from pipeline.metrics.statistics import SegmentationStatistics, summarise
from pipeline.ontology.reading import load_ontology
from pipeline.toyworld import scenes as toyworld
from pipeline.tracking.tracker import OFF
from pipeline.trained.student import load_student, read_student_record
from pipeline.training.loop.checkpoints import CheckpointStore
from pipeline.training.maskclip_plus.recipes import MASKCLIP_PLUS_RECIPES

SECTION = "students"
"""Name for ``--row``."""
MOST_SEEDS = 3
"""Each seed trains three students, which takes minutes."""
PAPER = "Zhou et al., ECCV 2022"
TRAINING_SEED = CORPUS_SEED
"""Offset from the seed of the evaluation scenes to that of the training scenes."""
UNLABELLED = 1000
"""Training scenes of a student."""
FORMS = {"annotation-free": "toy", "zero-shot": "toy-zero-shot", "supervised": "toy-supervised"}

Runs = dict[str, list[float]]


def students(
    seeds: Sequence[int],
    scenes: int,
    folder: Path,
    console: Console,
    *,
    unlabelled: int = UNLABELLED,
    settings: Sequence[str] = (),
    forms: Mapping[str, str] = FORMS,
) -> tuple[list[Section], list[Claim]]:
    """Train and evaluate the students, reusing those already trained in ``folder``.

    Args:
        seeds: seeds of the scene sets.
        scenes: evaluation scenes per set.
        folder: for images, tables and students.
        console: for progress.
        unlabelled: training scenes per seed.
        settings: changes to all recipes.
        forms: recipe by form of student; the zero-shot section needs "zero-shot" and "supervised".

    Returns:
        Sections and claims of ``benchmark.json``.
    """
    found: dict[str, Runs] = {}
    for seed in seeds:
        for name, figures in _measure_seed(
            seed, scenes, folder / f"seed-{seed}", console, unlabelled, settings, forms
        ):
            runs = found.setdefault(name, {})
            for metric, value in figures.items():
                runs.setdefault(metric, []).append(value)
    free = Section(
        name="maskclip-plus",
        title="MaskCLIP+: students against their teacher",
        note=f"Students learned from {unlabelled} scenes that the toy teacher labelled. Class weights and "
        "the anchor to the teacher are ours: without them the small classes are lost.",
        chart="bars",
        metrics=("miou", "pixel_accuracy"),
        rows=tuple(row(name, found[name]) for name in ("teacher", "student, guided phase", "student")),
    )
    source = f"{PAPER}, section 4"
    teacher, student = found["teacher"], found["student"]
    claims = [
        claim(
            "Annotation-free, the student beats its teacher by 8 points of mIoU",
            source, student["miou"], teacher["miou"], margin=0.08,
        ),
        claim(
            "Self-training never falls below the guided phase by more than 1 point of mIoU",
            source, student["miou"], found["student, guided phase"]["miou"], margin=-0.01,
        ),
    ]  # fmt: skip
    if not {"zero-shot", "supervised"} <= set(forms):
        return [free], claims
    shown = ("teacher", "student, zero-shot", "student, fully supervised")
    zero_shot = Section(
        name="maskclip-plus-zero-shot",
        title="MaskCLIP+, zero-shot",
        note="Truth for ten seen classes only; sand, zebra, fish and cloud are unseen.",
        chart="bars",
        metrics=("miou_unseen", "miou_seen", "miou"),
        rows=tuple(row(name, found[name]) for name in shown),
    )
    zero, full = found["student, zero-shot"], found["student, fully supervised"]
    claims += [
        claim(
            "Zero-shot, the student beats its teacher on the unseen classes by 15 points of mIoU",
            source, zero["miou_unseen"], teacher["miou_unseen"], margin=0.15,
        ),
        claim(
            "Zero-shot, the seen classes are within 2 points of mIoU of full supervision",
            source, zero["miou_seen"], full["miou_seen"], margin=-0.02,
        ),
    ]  # fmt: skip
    return [free, zero_shot], claims


def missing(reason: str) -> Section:
    """The section to show if the training failed."""
    return Section(
        name="maskclip-plus",
        title="MaskCLIP+: students against their teacher",
        note="",
        chart=None,
        metrics=("miou",),
        rows=(row("students", {}, missing=reason),),
    )


def _measure_seed(
    seed: int,
    scenes: int,
    folder: Path,
    console: Console,
    unlabelled: int,
    settings: Sequence[str],
    forms: Mapping[str, str],
) -> list[tuple[str, Mapping[str, float]]]:
    ontology = load_ontology("toyworld")
    images, masks, table = folder / "images", folder / "masks", folder / "table"
    draw_scenes(images, masks, seed + TRAINING_SEED, unlabelled)
    options = LabelOptions(output=str(table), tracking=OFF)
    label_images(str(images), RECIPES["toy"], ontology, options, console=console)
    truth = open_pairs(images=str(images), masks=str(masks), ontology=ontology)
    precision = native_precision(best_device())
    teacher = prepare_labeller(RECIPES["toy"], ontology, precision=precision).build(precision=precision)
    unseen = unseen_ids(MASKCLIP_PLUS_RECIPES.recipes[FORMS["zero-shot"]].unseen, ontology)
    figures = [("teacher", measured(_maps(teacher, seed, scenes), seed, scenes, unseen))]
    for form, name in forms.items():
        output = folder / form
        recipe = MASKCLIP_PLUS_RECIPES.load(name, [f"loop.seed={seed}", *settings])
        status = train_student(
            str(table),
            recipe,
            # So small that they are trained in this process, also if there is a cluster.
            TrainOptions(output=str(output), workers=0, address="local", tracking=OFF),
            truth=None if form == "annotation-free" else truth,
            console=console,
        )
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        done = recipe.loop.iterations
        steps = {
            "annotation-free": [
                ("student, guided phase", recipe.selftrain.guided[1]),
                ("student", done),
            ],
            "zero-shot": [("student, zero-shot", done)],
            "supervised": [("student, fully supervised", done)],
        }[form]
        for title, step in steps:
            maps = _student_maps(str(output), step, seed, scenes, keep_average=recipe.keep_average)
            figures.append((title, measured(maps, seed, scenes, unseen)))
    return figures


def draw_scenes(images: Path, masks: Path, seed: int, count: int) -> None:
    """Write scenes as PNG files, and their true maps under the same names, unless they exist."""
    if images.exists() and len(list(images.iterdir())) == count:
        return
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(parents=True, exist_ok=True)
    drawn, maps, _captions = toyworld.generate(seed, count, 128)
    for index, (image, ids) in enumerate(zip(drawn, maps, strict=True)):
        Image.fromarray(ids).save(masks / f"scene_{index:04d}.png")
        Image.fromarray(image).save(images / f"scene_{index:04d}.png")


def _maps(labeller: Labeller, seed: int, scenes: int) -> list[np.ndarray]:
    made = scene_set(seed, scenes, 128)
    return [labeller.label([image], [(image.shape[0], image.shape[1])])[0].labels for image in made.images]


def _student_maps(output: str, step: int, seed: int, scenes: int, *, keep_average: bool) -> list[np.ndarray]:
    """Label maps of the student from the checkpoint of a step."""
    import torch

    record = read_student_record(output)
    student = load_student(record, device=torch.device("cpu"), dtype=torch.float32)
    checkpoint = CheckpointStore(open_storage(output)).read(step)
    student.load_state_dict(student_state(checkpoint, keep_average=keep_average))
    student.eval()
    with torch.inference_mode():
        return [
            student(torch.from_numpy(image).permute(2, 0, 1)[None])[0].argmax(0).numpy()
            for image in scene_set(seed, scenes, 128).images
        ]


def measured(
    maps: Sequence[np.ndarray], seed: int, scenes: int, unseen: Sequence[int]
) -> Mapping[str, float]:
    """MIoU over all, unseen and seen classes, and pixel accuracy, of a scene set's label maps."""
    ontology = load_ontology("toyworld")
    total = SegmentationStatistics.zero(ontology.num_classes)
    for truth, labels in zip(scene_set(seed, scenes, 128).labels, maps, strict=True):
        total = total + SegmentationStatistics.of(
            truth, labels, None, ontology.num_classes, ontology.ignore_index, boundary=False
        )
    groups = ["unseen" if index in unseen else "seen" for index in range(ontology.num_classes)]
    summary = summarise(total, groups)
    return {name: summary[name] for name in ("miou", "pixel_accuracy", "miou_unseen", "miou_seen")}
